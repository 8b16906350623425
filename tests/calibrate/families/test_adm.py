"""The ADM family: the authors' own numbers, both qkv orders, and a sentence for what is wrong or missing."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accuquant.calibrate.families import adm, load_model
from accuquant.calibrate.families.adm_unet import AdmConfig, AdmUNet, timestep_embedding
from accuquant.calibrate.layers import quantize_operators
from accuquant.calibrate.model import quantize
from accuquant.calibrate.scheme import QuantScheme
from accuquant.export.graph import operator_nodes, trace_float
from accuquant.runtime.bundle import ByClass
from accuquant.runtime.errors import AccuQuantError

GOLDEN = json.loads((Path(__file__).parent / "golden_adm.json").read_text())["cases"]
LEGACY = "legacy order, heads of 16, residual resampling, learned variance"


def checkpoint(folder, formula, case, flags=None):
    """The case's state dict in the authors' layout, 1x1 convolutions over positions and all, its flags beside it."""
    state = {name: torch.empty(shape) for name, shape in case["state"].items()}
    torch.save(formula.formula_weights(state), folder / "m.pt")
    (folder / "m.yml").write_text(yaml.safe_dump(flags or case["flags"]))
    return folder / "m.pt"


def output(network, formula, case):
    given = {"y": torch.tensor(case["classes"])} if "classes" in case else {}
    with torch.no_grad():
        return network(formula.formula_input((2, 3, 8, 8)), torch.tensor([0.0, 617.0]), **given).numpy().ravel()


@pytest.mark.parametrize("name", GOLDEN)
def test_agrees_with_the_authors_code(name, formula, tmp_path):
    """From file to output. 1e-4 on outputs of order 1: only the order of float32 sums may differ."""
    model = load_model(checkpoint(tmp_path, formula, GOLDEN[name]))
    assert model.family == "adm"
    assert model.sample_shape == (3, 8, 8)
    np.testing.assert_allclose(output(model.network, formula, GOLDEN[name]), GOLDEN[name]["output"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", GOLDEN)
def test_the_wrong_qkv_order_would_be_seen(name, formula, tmp_path):
    flags = GOLDEN[name]["flags"]
    wrong = flags | {"use_new_attention_order": not flags["use_new_attention_order"]}
    model = load_model(checkpoint(tmp_path, formula, GOLDEN[name], wrong))
    assert np.abs(output(model.network, formula, GOLDEN[name]) - GOLDEN[name]["output"]).max() > 1e-2


def test_the_wrong_number_of_heads_would_be_seen(formula, tmp_path):
    case = GOLDEN[LEGACY]
    model = load_model(checkpoint(tmp_path, formula, case, case["flags"] | {"num_head_channels": 32}))
    assert np.abs(output(model.network, formula, case) - case["output"]).max() > 1e-2


def test_embedding_is_cosines_then_sines():
    got = timestep_embedding(torch.tensor([0.0, 10.0]), 8)
    rate = 10000.0 ** (-np.arange(4) / 4)
    np.testing.assert_allclose(got[0].numpy(), [1] * 4 + [0] * 4, atol=1e-7)
    np.testing.assert_allclose(got[1].numpy(), np.concatenate([np.cos(10 * rate), np.sin(10 * rate)]), atol=1e-5)


@pytest.mark.parametrize(("shape", "facts"), adm.PUBLISHED.items())
def test_the_published_models_are_known_by_their_keys(shape, facts, tmp_path):
    """At full shape, without memory: meta tensors have names and shapes, which is all that is looked at."""
    channels, mult, blocks = shape
    levels = {64: (1, 2, 3), 128: (2, 3, 4), 256: (3, 4, 5), 512: (4, 5, 6)}[facts.image_size]
    with torch.device("meta"):
        network = AdmUNet(AdmConfig(3, 6, channels, mult, blocks, levels))
    found = adm.shape_from_keys(network.state_dict(), tmp_path / "published.pt")
    assert (found["model_channels"], found["channel_mult"], found["num_res_blocks"]) == shape
    assert found["attention"] == levels
    assert found["resblock_updown"]
    assert found["scale_shift_norm"]
    assert adm._facts(tmp_path / "published.pt", None, found)[0] == facts
    # The published sizes, learned variance and class embedding excepted: 296 M at 64, 422 M at 128, 554 M at 256.
    millions = sum(p.numel() for p in network.parameters()) / 1e6
    assert millions == pytest.approx({64: 295, 128: 421, 256: 553, 512: 558}[facts.image_size], rel=0.01)


def test_every_operator_has_a_role_and_reaches_the_graph(formula, tmp_path):
    model = load_model(checkpoint(tmp_path, formula, GOLDEN[LEGACY]))
    operators = quantize(model, QuantScheme(weight_bits=4, activation_bits=8, policy="integer"))
    assert operators["input_blocks.0.0"].role == "first"
    assert operators["out.2"].role == "last"
    assert operators["time_embed.0"].role == operators["middle_block.0.emb_layers.1"].role == "time"
    assert operators["middle_block.1.qk"].role == "attention"
    assert operators["middle_block.1.qkv"].role == "body"
    assert model.block_of("output_blocks.1.1.qkv") == "output_blocks.1.1"
    nodes = operator_nodes(trace_float(model.network, operators, model.sample_shape))
    assert operators.keys() <= nodes.keys()


# -- what is refused -------------------------------------------------------------------------------------------------


def refusal(path):
    with pytest.raises(AccuQuantError) as error:
        load_model(path)
    return str(error.value)


def test_a_file_without_its_flags_says_what_is_missing(formula, tmp_path):
    path = checkpoint(tmp_path, formula, GOLDEN[LEGACY])
    path.with_suffix(".yml").unlink()
    assert "put the training flags beside it as m.yml" in refusal(path)


def test_a_class_conditional_model_says_so_and_cannot_be_guided(formula, tmp_path):
    model = load_model(checkpoint(tmp_path, formula, GOLDEN["five classes"]))
    assert "5 classes" in model.found
    assert model.conditioning == ByClass(classes=5)
    assert model.condition([3, 4, 5])["y"].tolist() == [3, 4, 0]
    with pytest.raises(AccuQuantError, match="nothing that stands for none"):
        model.guided(2.0)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"image_size": 9}, "image_size 9 cannot be halved 1 times"),
        ({"image_size": 8, "num_head_channels": 24}, "num_head_channels 24 does not divide the 64 channels of level 1"),
        ({"image_size": 8, "num_heads": 5}, "num_heads 5 does not divide"),
        ({"image_size": 8, "noise_schedule": "sqrt"}, "noise_schedule"),
        ({"num_heads": 2}, "image_size: Field required"),
        ({"image_size": 8, "num_head_channels": 0}, "num_head_channels 0"),
        (["a", "list"], "flags of guided-diffusion's scripts expected"),
    ],
)
def test_flags_that_do_not_fit_are_named(formula, tmp_path, flags, words):
    assert words in refusal(checkpoint(tmp_path, formula, GOLDEN[LEGACY], flags))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("input_blocks.1.0.in_layers.2.weight"), "does not fit the network its keys describe"),
        (lambda s: s.pop("output_blocks.2.0.out_layers.3.weight"), "copy the checkpoint again"),
        (lambda s: [s.pop(k) for k in list(s) if k.startswith("output_blocks.2.")], "stages are missing"),
        (lambda s: s["out.2.bias"].fill_(float("nan")), "not finite in out.2.bias"),
        (lambda s: s.update({"out.2.weight": torch.zeros(5, 32, 3, 3)}), "3 channels in and 5 out"),
        (lambda s: s.update({"extra.weight": torch.zeros(2)}), "does not fit"),
    ],
)
def test_damaged_state_dicts_are_named(formula, tmp_path, change, words):
    path = checkpoint(tmp_path, formula, GOLDEN[LEGACY])
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)
    assert words in refusal(path)


def test_bare_quantization_keeps_the_float_output(formula, tmp_path):
    model = load_model(checkpoint(tmp_path, formula, GOLDEN[LEGACY]))
    before = output(model.network, formula, GOLDEN[LEGACY])
    quantize_operators(model.network, QuantScheme(weight_bits=8, activation_bits=8), model.role_of)
    np.testing.assert_array_equal(output(model.network, formula, GOLDEN[LEGACY]), before)
