"""What may be asked of a bundle, by what it takes; refusals name the parameter."""

import pytest
from accuquant.runtime.bundle import ByClass, ByText
from accuquant.runtime.errors import AccuQuantError
from accuquant.runtime.serve.batching import Wish
from accuquant.runtime.serve.painter import UnfitError
from accuquant.runtime.serve.server import Server

CLASSES = ByClass(classes=10, null=10, guidance=3.0)
TEXT = ByText(examples=("red apple",), guidance=3.0)


def refused(painter, parameter, *asked, **more):
    with pytest.raises(UnfitError) as error:
        painter.wishes(*asked, **more)
    assert error.value.parameter == parameter
    return str(error.value)


def test_a_bundle_of_nothing_takes_empty_prompts_only(house):
    painter = house.by_hand()
    assert painter.wishes("", [3, 4]) == [Wish(3), Wish(4)]
    assert "send an empty one" in refused(painter, "prompt", "a cat", [3])
    assert "takes no condition" in refused(painter, "guidance_scale", "", [3], guidance=2.0)
    refused(painter, "negative_prompt", "", [3], "dogs")


@pytest.mark.parametrize("prompt", ["a cat", "10", "-1", "1.5", "9" * 30, "１０"])
def test_a_bundle_of_classes_takes_their_numbers_only(house, prompt):
    assert "a number from 0 to 9" in refused(house.by_hand(CLASSES), "prompt", prompt, [3])


def test_a_class_is_chosen_by_prompt_or_left_to_the_seed(house):
    painter = house.by_hand(CLASSES)
    assert painter.wishes("7", [3])[0].condition == 7
    assert painter.wishes(" ", [3])[0].condition is None


def test_a_bundle_of_texts_takes_any_and_negative_ones_where_it_is_guided(house):
    guided = house.by_hand(TEXT, guidance=3.0)
    assert guided.wishes("a cat", [3], "dogs", 5.0) == [Wish(3, "a cat", "dogs", 5.0)]
    plain = house.by_hand(TEXT, guidance=1.0)
    refused(plain, "negative_prompt", "a cat", [3], "dogs")
    assert "--guidance" in refused(plain, "guidance_scale", "a cat", [3], guidance=2.0)
    assert plain.wishes("a cat", [3], guidance=1.0)[0].guidance == 1.0


def asked(painter, *wishes):
    painter.paint(wishes, lambda *_: None)
    return painter.pipeline.asked


def test_every_wish_of_a_batch_reaches_the_engine_as_it_is(house):
    guided = house.by_hand(TEXT, guidance=3.0)
    assert asked(guided, Wish(1, "a cat", "dogs", 5.0), Wish(2, "a dog")) == {
        "classes": None, "prompts": ["a cat", "a dog"], "unwanted": ["dogs", ""], "guidance": [5.0, 3.0],
    }  # fmt: skip
    assert asked(house.by_hand(CLASSES), Wish(13, 7), Wish(13)) == {
        "classes": [7, 3], "prompts": None, "unwanted": ["", ""], "guidance": None,
    }  # fmt: skip


@pytest.mark.parametrize("guidance", [-1.0, float("inf")])
def test_guidance_out_of_range_is_refused(house, guidance):
    assert "out of range" in refused(house.by_hand(TEXT, guidance=3.0), "guidance_scale", "a", [3], guidance=guidance)


def test_steps_and_size_are_the_bundles_own(house):
    painter = house.by_hand()
    painter.check_steps(None)
    painter.check_steps(house.rows)
    painter.check_size("auto")
    painter.check_size("4x4")
    with pytest.raises(UnfitError, match="samples in 4 steps, which its plan is made for, not in 20"):
        painter.check_steps(20)
    with pytest.raises(UnfitError, match="paints 4x4, not 1024x1024"):
        painter.check_size("1024x1024")


def test_two_bundles_of_one_name_are_refused(house):
    with pytest.raises(AccuQuantError, match="the same name"):
        Server([house.by_hand(), house.by_hand()])
