"""CompVis's trained text encoder: the authors' numbers, and a text-to-image checkpoint from file to prompts."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accuquant.calibrate.families import bert_text, load_model
from accuquant.runtime.bundle import ByText
from accuquant.runtime.errors import AccuQuantError
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

HERE = Path(__file__).parent
LDM = json.loads((HERE / "golden_ldm.json").read_text())
GOLDEN, DENOISER = LDM["texts"]["BERTEmbedder"], LDM["cases"]["classes, heads of 16, two deep"]
LENGTH = 6
WORDS = ["<pad>", "<unk>", "red", "blue", "apple", "heart"]


def tokenizer(length=LENGTH, words=WORDS):
    library = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    library.pre_tokenizer = Whitespace()
    library.enable_padding(length=length, pad_id=0, pad_token="<pad>")
    library.enable_truncation(length)
    return library.to_str()


def weights(formula, case):
    return formula.formula_weights({name: torch.empty(shape) for name, shape in case["state"].items()})


def test_agrees_with_the_authors_code(formula, tmp_path):
    """1e-4 on outputs of order 1: only the order of float32 sums may differ."""
    (tmp_path / "model.tokenizer.json").write_text(tokenizer())
    text = bert_text.load(weights(formula, GOLDEN), tmp_path / "model.ckpt")
    made = text.network(torch.tensor(GOLDEN["tokens"])).numpy().ravel()
    np.testing.assert_allclose(made, GOLDEN["output"], rtol=0, atol=1e-4)


def checkpoint(formula, folder, said=None, **text):
    """A latent model with cross-attention of width 24, and a text encoder of that width."""
    state = weights(formula, DENOISER)
    del state["cond_stage_model.embedding.weight"]
    width = next(v.shape[1] for k, v in state.items() if k.endswith("attn2.to_k.weight"))
    encoder = bert_text.BertText(40, LENGTH, width, 1).state_dict()
    state |= {f"{bert_text.PREFIX}{k}": v for k, v in formula.formula_weights(encoder).items()}
    torch.save({"state_dict": state}, folder / "model.ckpt")
    params = {
        "linear_start": 0.0015,
        "linear_end": 0.0195,
        "image_size": 8,
        "unet_config": {"params": DENOISER["unet"]},
    }
    (folder / "model.yaml").write_text(yaml.safe_dump({"model": {"params": params}} | (said or {})))
    if text.get("length", LENGTH):
        (folder / "model.tokenizer.json").write_text(tokenizer(**text))
    return folder / "model.ckpt"


def test_a_text_to_image_checkpoint_takes_prompts(formula, tmp_path):
    model = load_model(checkpoint(formula, tmp_path, {"prompts": ["red apple", "blue heart"]}))
    assert model.conditioning == ByText(examples=("red apple", "blue heart"), guidance=5.0)
    told = model.condition([0, 1, 2])
    assert told["context"].shape[:2] == (3, LENGTH)
    torch.testing.assert_close(told["context"][0], told["context"][2], rtol=0, atol=0)  # two examples, in turns
    x, t = formula.formula_input((3, 3, 8, 8)), torch.tensor([617.0] * 3)
    with torch.no_grad():
        plain, guided = model.network(x, t, **told), model.guided(3.0)(x, t, **told)
        none = model.network(x, t, context=model.text([""])[0].expand(3, -1, -1))
    assert (plain[0] - plain[1]).abs().max() > 1e-3
    torch.testing.assert_close(guided, none + 3 * (plain - none), rtol=1e-4, atol=1e-4)


def test_without_prompts_of_its_own_it_is_calibrated_with_ours(formula, tmp_path):
    assert len(load_model(checkpoint(formula, tmp_path)).conditioning.examples) >= 16


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ({"length": 0}, "a text encoder without its tokenizer; put the tokenizer.json"),
        ({"length": 7}, "makes 7 tokens out of 6; the text encoder reads 6 out of 40"),
        ({"words": [f"w{i}" for i in range(40)] + ["<pad>", "<unk>"]}, "out of 42; the text encoder reads 6 out of 40"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_named(formula, tmp_path, text, words):
    with pytest.raises(AccuQuantError) as error:
        load_model(checkpoint(formula, tmp_path, **text))
    assert words in str(error.value)
