"""Stable Diffusion 1 and 2: the authors' numbers from a whole file, which of two models it is, what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from accuquant.calibrate.families import ldm, ldm_facts, load_model
from accuquant.calibrate.model import quantize
from accuquant.calibrate.scheme import QuantScheme
from accuquant.export.companions import save_companions
from accuquant.export.graph import operator_nodes, trace_float
from accuquant.runtime.bundle import ByText
from accuquant.runtime.engines.base import EngineOptions
from accuquant.runtime.engines.onnxruntime import OnnxRuntimeEngine
from accuquant.runtime.errors import AccuQuantError
from accuquant.runtime.tokenizer import Tokenizer

REFERENCE = Path(__file__).parents[3] / "tools" / "reference" / "fashion-ddim.ckpt"
VERSIONS = ("1", "2")


def output(network, version, formula, stable):
    with torch.no_grad():
        x, t = formula.formula_input((2, 4, 8, 8)), torch.tensor([0.0, 617.0])
        return network(x, t, stable.context(formula, version)).numpy().ravel()


@pytest.mark.parametrize(("version", "name"), [("1", "model.ckpt"), ("2", "model.ckpt"), ("2", "model.safetensors")])
def test_agrees_with_the_authors_code(version, name, formula, stable, tmp_path):
    """1e-4 on outputs of order 1: only the order of float32 sums may differ."""
    model = load_model(stable.save(tmp_path, stable.whole(formula, version), stable.settings(version), name))
    assert (model.sample_shape, model.noise_schedule["prediction_type"]) == ((4, 8, 8), "epsilon")
    assert model.decoder.scale == 0.18215
    expected = stable.GOLDEN["unets"][version]["output"]
    np.testing.assert_allclose(output(model.network, version, formula, stable), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("version", VERSIONS)
def test_another_number_of_heads_would_be_seen(version, formula, stable, tmp_path):
    golden, config = stable.GOLDEN["unets"][version], stable.settings(version)
    config["model"]["params"]["unet_config"]["params"] = {k: v * 2 for k, v in golden["unet"].items()}
    network = load_model(stable.save(tmp_path, stable.whole(formula, version), config)).network
    assert np.abs(output(network, version, formula, stable) - golden["output"]).max() > 1e-3


def test_weights_of_half_precision_are_widened(formula, stable, tmp_path):
    state = {k: v.half() for k, v in stable.whole(formula, "1").items()}
    network = load_model(stable.save(tmp_path, state, stable.settings("1"))).network
    assert {p.dtype for p in network.parameters()} == {torch.float32}


def test_every_network_reaches_its_graph(formula, stable, tmp_path):
    """The companions' graphs are compared with their modules where they are written."""
    model = load_model(stable.save(tmp_path, stable.whole(formula, "2"), stable.settings("2")))
    operators = quantize(model, QuantScheme(weight_bits=4, activation_bits=8, policy="integer"))
    graph = trace_float(model.network, operators, model.sample_shape, model.condition([0]))
    assert operators.keys() <= operator_nodes(graph).keys()
    assert set(save_companions(model, tmp_path / "bundle")) == {"text_encoder", "decoder"}
    tokens = Tokenizer(stable.tokenizer(), "")(["w3 w4 w5"])
    later = tokens.copy()
    later[0, 5:] = 7
    engine = OnnxRuntimeEngine(tmp_path / "bundle" / "text_encoder.onnx", EngineOptions(1))
    before, after = (engine.run({"tokens": t})[0].copy() for t in (tokens, later))
    np.testing.assert_allclose(before[:5], after[:5], rtol=0, atol=1e-5)  # the mask is in the graph as well
    assert np.abs(before[5:] - after[5:]).max() > 1e-2


# -- two models with the same keys -----------------------------------------------------------------------------------


def returning(state, sign):
    """The weights changed so that the denoiser gives back white noise: its first skip, past all norms but the last.

    There silu(x) - silu(-x) = x.
    """
    unet = {k: torch.zeros_like(v) for k, v in state.items() if k.startswith(ldm.UNET)}
    for name in unet:
        if name.endswith("weight") and unet[name].ndim == 1:
            unet[name] += 1
    first, skip, last = (
        f"{ldm.UNET}{k}.weight" for k in ("input_blocks.0.0", "output_blocks.3.0.skip_connection", "out.2")
    )
    for i in range(32):
        unet[first][i, i % 4, 1, 1] = unet[last][i % 4, i, 1, 1] = 1 if i < 16 else -1
        unet[skip][i, -32 + i] = 1
    unet[last] *= sign / 4
    return state | unet


@pytest.fixture
def published(formula, stable, monkeypatch):
    """A file of the golden shape, as if that were published in two versions."""
    noise = ldm_facts.Facts(image_size=8, linear_start=0.00085, linear_end=0.012, num_head_channels=8)
    other = noise.model_copy(update={"parameterization": "v", "image_size": 16})
    shape = (32, (1, 2), stable.WIDTH)
    monkeypatch.setitem(ldm_facts.PUBLISHED, shape, ldm_facts.Published("Two", noise, other))
    return stable.whole(formula, "2")


def test_a_network_that_gives_noise_back_predicts_noise(published, stable, tmp_path):
    model = load_model(stable.save(tmp_path, returning(published, 1)))
    assert (model.noise_schedule["prediction_type"], model.sample_shape) == ("epsilon", (4, 8, 8))
    assert "predicts eps at 8x8, judged by its weights" in model.found
    assert "gives back 1.0" in model.found


@pytest.mark.parametrize("sign", [0, -1])
def test_any_other_predicts_v(sign, published, stable, tmp_path):
    model = load_model(stable.save(tmp_path, returning(published, sign) if sign else published))
    assert (model.noise_schedule["prediction_type"], model.sample_shape) == ("v_prediction", (4, 16, 16))
    assert "predicts v at 16x16" in model.found


def test_a_yaml_overrules_the_weights(published, stable, tmp_path):
    config = stable.settings("2", parameterization="v", image_size=16)
    model = load_model(stable.save(tmp_path, returning(published, 1), config))
    assert (model.noise_schedule["prediction_type"], model.sample_shape) == ("v_prediction", (4, 16, 16))


def test_a_trained_network_gives_noise_back():
    """The reference model, which was trained to predict noise, tells so by the same sign."""
    model = load_model(REFERENCE)
    last = model.noise_schedule["num_train_timesteps"] - 1
    channels, size, _ = model.sample_shape
    assert ldm_facts.returned_noise(model.network, channels, size, last, {}) == pytest.approx(1, abs=0.1)


def test_an_ideal_network_of_v_gives_almost_nothing_back():
    """Of data of one picture, whose v is known: a e - s x_0 with e = (x - a x_0) / s."""
    picture, signal = torch.linspace(-1, 1, 4)[:, None, None].expand(4, 32, 32), 0.0047**0.5
    deviation = (1 - signal**2) ** 0.5

    def ideal(x, t):
        return signal * (x - signal * picture) / deviation - deviation * picture

    assert ldm_facts.returned_noise(ideal, 4, 32, 999, {}) == pytest.approx(signal / deviation, abs=0.02)


# -- what is refused -------------------------------------------------------------------------------------------------


def more_channels(state, channels):
    first = f"{ldm.UNET}input_blocks.0.0.weight"
    state[first] = torch.zeros(32, channels, 3, 3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: more_channels(s, 9), "9 channels in and 4 out: an inpainting model"),
        (lambda s: more_channels(s, 5), "5 channels in and 4 out: a depth-to-image model"),
        (lambda s: more_channels(s, 6), "6 channels in and 4 out; models given a picture"),
        (
            lambda s: s.update({f"{ldm.UNET}label_emb.0.0.weight": torch.zeros(1)}),
            "(label_emb): of pictures, as unCLIP's, is not supported",
        ),
        (
            lambda s: s.pop("cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.bias"),
            "encoder.layers.1.mlp.fc1.bias is missing",
        ),
        (
            lambda s: s.update({"cond_stage_model.transformer.text_model.new.weight": torch.zeros(1)}),
            "new.weight is left over",
        ),
    ],
)
def test_other_models_are_refused_by_name(change, words, formula, stable, tmp_path):
    state = stable.whole(formula, "1")
    change(state)
    with pytest.raises(AccuQuantError) as error:
        load_model(stable.save(tmp_path, state, stable.settings("1")))
    assert words in str(error.value)


def test_prompts_come_from_the_yaml(formula, stable, tmp_path):
    config = stable.settings("1") | {"prompts": ["w1 w2"]}
    model = load_model(stable.save(tmp_path, stable.whole(formula, "1"), config))
    assert model.conditioning == ByText(examples=("w1 w2",), guidance=7.5)
