"""CLIP's text transformer and tokenizer: the authors' numbers, and each choice that no key tells."""

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from accuquant.calibrate.families import clip_text, clip_tokenizer
from accuquant.runtime.errors import AccuQuantError
from accuquant.runtime.tokenizer import Tokenizer

TEXTS = json.loads((Path(__file__).parent / "golden_sd.json").read_text())["texts"]
STATE = {"1": clip_text.HUGGING_FACE, "2": clip_text.OPEN_CLIP}


@pytest.fixture
def build(monkeypatch):
    """Golden encoders have a small vocabulary, whose tokenizer is not what is tested."""
    monkeypatch.setattr(clip_text, "find_tokenizer", lambda *_: "")
    return lambda state: clip_text.load(state, Path("model.ckpt")).network


def weights(formula, version):
    """The formula's, but far enough from 0 before the activation that GELU and its approximation differ."""
    made = formula.formula_weights({name: torch.empty(shape) for name, shape in TEXTS[version]["state"].items()})
    return {k: 20 * v if k.endswith(("fc1.bias", "c_fc.bias")) else v for k, v in made.items()}


def output(network, version):
    with torch.no_grad():
        return network(torch.tensor(TEXTS[version]["tokens"])).flatten()[::7].numpy()


@pytest.mark.parametrize("version", TEXTS)
def test_agrees_with_the_authors_code(version, formula, build):
    """1e-4 on outputs of order 1: only the order of float32 sums may differ."""
    network = build(weights(formula, version))
    np.testing.assert_allclose(output(network, version), TEXTS[version]["output"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("version", TEXTS)
def test_names_without_text_model_and_constants_among_weights_are_known(version, formula, build):
    state = {k.replace("text_model.", ""): v for k, v in weights(formula, version).items()}
    inside = {"1": "embeddings.position_ids", "2": "attn_mask"}[version]
    state |= {STATE[version] + k: torch.zeros(3) for k in (inside, "text_projection", "logit_scale")}
    # Numbers of the formula follow sorted names, so only the layout is compared.
    assert output(build(state), version).shape == np.shape(TEXTS[version]["output"])


def changed(network, **choice):
    """The same weights under another choice."""
    other = clip_text.ClipText(replace(network.config, **choice))
    other.load_state_dict(network.state_dict())
    return other


@pytest.mark.parametrize("version", TEXTS)
@pytest.mark.parametrize("choice", ["approximate", "heads", "epsilon"])
def test_a_wrong_choice_would_be_seen(version, choice, formula, build):
    network = build(weights(formula, version))
    wrong = {"approximate": not network.config.approximate, "heads": 4, "epsilon": 1e-1}[choice]
    apart = np.abs(output(changed(network, **{choice: wrong}), version) - TEXTS[version]["output"]).max()
    assert apart > 3e-4  # three times what the authors' numbers are held to
    assert network.config.epsilon == 1e-5


def test_the_last_layer_is_the_one_left_out(formula, build):
    """Run, it would be seen; and so would another one left out in its place."""
    state = weights(formula, "2")
    network = build(state)
    assert network.config.depth == 2
    last = f"{clip_text.OPEN_CLIP}transformer.resblocks."
    swapped = {k.replace(f"{last}1.", f"{last}x.").replace(f"{last}2.", f"{last}1."): v for k, v in state.items()}
    swapped = {k.replace(f"{last}x.", f"{last}2."): v for k, v in swapped.items()}
    assert np.abs(output(build(swapped), "2") - TEXTS["2"]["output"]).max() > 1e-2
    longer = dict(state)
    for name in [k for k in state if k.startswith(f"{last}2.")]:
        longer[name.replace(f"{last}2.", f"{last}3.")] = state[name]
    assert np.abs(output(build(longer), "2") - TEXTS["2"]["output"]).max() > 1e-2


@pytest.fixture
def returned(formula, monkeypatch):
    """Version 2's encoder as it came back from diffusers, and the paddings that were asked for."""
    monkeypatch.setattr(clip_text, "OPEN_CLIP_WIDTH", 128)
    monkeypatch.setattr(clip_text, "OPEN_CLIP_LAYERS", 3)
    asked = []
    monkeypatch.setattr(clip_text, "find_tokenizer", lambda *given: asked.append(given[2]) or "")

    def made(whole):
        inside = clip_text.inside(weights(formula, "2"), clip_text.OPEN_CLIP)
        renamed = clip_text.from_open_clip(inside, Path("model.ckpt"), whole=whole)
        return {f"{clip_text.HUGGING_FACE}text_model.{key}": value for key, value in renamed.items()}

    return made, asked


@pytest.mark.parametrize("whole", [True, False])
def test_version_2_in_the_layout_of_version_1_is_known_by_its_width(whole, returned):
    """With the layer that is never run or without it: GELU itself, filled up with "!"."""
    made, asked = returned
    network = clip_text.load(made(whole), Path("model.ckpt")).network
    np.testing.assert_allclose(output(network, "2"), TEXTS["2"]["output"], rtol=0, atol=1e-4)
    assert asked == ["!"]


def test_another_number_of_layers_of_that_width_is_refused(returned, monkeypatch):
    monkeypatch.setattr(clip_text, "OPEN_CLIP_LAYERS", 24)
    with pytest.raises(AccuQuantError, match=r"128 wide, as Stable Diffusion 2's, and has 3 layers .* not 23 or 24"):
        clip_text.load(returned[0](True), Path("model.ckpt"))


@pytest.mark.parametrize("version", TEXTS)
def test_a_token_sees_none_behind_it(version, formula, build):
    network = build(weights(formula, version))
    tokens = torch.tensor(TEXTS[version]["tokens"])
    with torch.no_grad():
        first, second = network(tokens), network(tokens[:, [0, 1, 2, 3, 7, 6, 5, 4]])
    torch.testing.assert_close(first[:, :4], second[:, :4], rtol=0, atol=1e-6)
    assert (first[1, 4:] - second[1, 4:]).abs().max() > 1e-2


# -- the tokenizer ---------------------------------------------------------------------------------------------------


@lru_cache
def clip(padding):
    """Once for all: a vocabulary of this size takes a while."""
    merges = clip_tokenizer.published_merges()
    return Tokenizer(clip_tokenizer.tokenizer_json(merges, clip_tokenizer.vocabulary(merges), 77, padding), "CLIP's")


# By transformers' CLIPTokenizer, with either padding.
KNOWN = {
    "a photo of a cat": [49406, 320, 1125, 539, 320, 2368, 49407],
    "": [49406, 49407],
    "A  Red\tApple's!!! 12": [49406, 320, 736, 3055, 568, 995, 272, 273, 49407],
    "Crème brûlée, 3½ €!": [49406, 1075, 12138, 614, 711, 127, 119, 75, 13489, 267, 274, 33613, 34919, 256, 49407],
}


@pytest.mark.parametrize(("padding", "number"), [(clip_tokenizer.END, 49407), ("!", 0)])
def test_texts_become_the_tokens_of_the_original(padding, number):
    made = clip(padding)
    assert (made.size, made.length) == (49408, 77)
    for text, expected in KNOWN.items():
        np.testing.assert_array_equal(made([text])[0], [*expected, *[number] * (77 - len(expected))])


def test_what_is_too_long_ends_with_the_end():
    row = clip("!")(["cat " * 200])[0]
    assert row[0] == 49406
    assert row[-1] == 49407
    assert set(row[1:-1]) == {2368}


@pytest.mark.parametrize(("version", "padding"), [("1", 49407), ("2", 0)])
def test_each_model_pads_as_it_was_trained(version, padding, formula, tmp_path):
    state = weights(formula, version)
    name = next(k for k in state if "token_embedding" in k)
    state[name] = torch.zeros(49408, 128)
    text = clip_text.load(state, tmp_path / "model.ckpt")
    assert Tokenizer(text.tokenizer, "")(["cat"])[0].tolist() == [49406, 2368, 49407, *[padding] * 5]


def test_another_vocabulary_wants_its_tokenizer(formula, tmp_path):
    with pytest.raises(AccuQuantError) as error:
        clip_text.load(weights(formula, "1"), tmp_path / "model.ckpt")
    assert "knows 60 tokens, CLIP's tokenizer 49408" in str(error.value)
    assert "beside it as model.tokenizer.json" in str(error.value)
