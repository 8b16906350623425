"""Classes and prompts as rows, tokenizers with one length, and a sentence for what does not fit."""

import pytest
from accuquant.runtime.bundle import ByClass, ByText
from accuquant.runtime.conditions import Classes, check_guidance, prompts_of
from accuquant.runtime.errors import AccuQuantError
from accuquant.runtime.tokenizer import Tokenizer
from tokenizers import Tokenizer as Library
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

KNOWN = ByClass(classes=5, null=4)


def test_a_seed_has_a_class_or_prompt_of_its_own():
    assert Classes(KNOWN).wishes([7, 2**63 + 4]) == [2, (2**63 + 4) % 5]
    assert prompts_of([0, 4, 5], ["a", "b", "c"]) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("wish", "words"), [(5, "class 5 is out of range; the network knows 0 to 4"), (-1, "class -1")]
)
def test_classes_that_do_not_exist_are_named(wish, words):
    with pytest.raises(AccuQuantError, match=words):
        Classes(KNOWN).rows([0, wish])


def test_classes_take_no_negative_prompt():
    with pytest.raises(AccuQuantError, match="takes no negative prompt"):
        Classes(KNOWN).free("ugly")


@pytest.mark.parametrize(
    ("known", "guidance", "words"),
    [
        (None, 2.0, "the network takes no condition"),
        (ByClass(classes=5), 2.0, "nothing that stands for none"),
        (KNOWN, float("nan"), "out of range"),
        (KNOWN, -1.0, "out of range"),
    ],
)
def test_guidance_that_a_network_cannot_have_is_refused(known, guidance, words):
    with pytest.raises(AccuQuantError, match=words):
        check_guidance(known, guidance)


def test_guidance_that_it_can_have_is_not():
    check_guidance(KNOWN, 2.0)
    check_guidance(ByText(examples=("a",)), 7.5)
    check_guidance(None, 1.0)


def words(length=4):
    library = Library(WordLevel({"<pad>": 0, "<unk>": 1, "red": 2, "apple": 3}, unk_token="<unk>"))
    library.pre_tokenizer = Whitespace()
    if length:
        library.enable_padding(length=length, pad_id=0, pad_token="<pad>")
        library.enable_truncation(length)
    return library.to_str()


def test_every_text_has_the_encoders_length():
    tokenizer = Tokenizer(words(), "t")
    assert tokenizer(["red apple", "", "red red red red green"]).tolist() == [[2, 3, 0, 0], [0, 0, 0, 0], [2, 2, 2, 2]]
    assert tokenizer.length == 4


@pytest.mark.parametrize("text", ["", "{}", "not json"])
def test_what_is_no_tokenizer_is_refused(text):
    with pytest.raises(AccuQuantError, match=r"b/t\.json is not a tokenizer\.json"):
        Tokenizer(text, "b/t.json")


def test_a_tokenizer_of_any_length_is_refused():
    with pytest.raises(AccuQuantError, match="does not pad and truncate to one length"):
        Tokenizer(words(0), "t")
