"""The DiT family: the authors' own numbers, guidance, and a sentence for what is wrong or missing."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accuquant.calibrate.families import dit, load_model
from accuquant.calibrate.families.dit_net import DiT, DitConfig
from accuquant.calibrate.model import quantize
from accuquant.calibrate.scheme import QuantScheme
from accuquant.export.graph import operator_nodes, trace_float
from accuquant.runtime.bundle import ByClass
from accuquant.runtime.errors import AccuQuantError

GOLDEN = json.loads((Path(__file__).parent / "golden_dit.json").read_text())["cases"]
LEARNED = "learned variance, patches of 2"


def checkpoint(folder, formula, case, flags=None, wrap=lambda state: state):
    state = {name: torch.empty(shape) for name, shape in case["state"].items()}
    torch.save(wrap(formula.formula_weights(state)), folder / "m.pt")
    (folder / "m.yml").write_text(yaml.safe_dump(case["flags"] if flags is None else flags))
    return folder / "m.pt"


def output(network, formula, case):
    with torch.no_grad():
        x = formula.formula_input((2, case["channels"], 8, 8))
        return network(x, torch.tensor([0.0, 617.0]), torch.tensor(case["classes"])).numpy().ravel()


@pytest.mark.parametrize("name", GOLDEN)
def test_agrees_with_the_authors_code(name, formula, tmp_path):
    """From file to output, the variance left out. 1e-4 on outputs of order 1: the order of float32 sums."""
    model = load_model(checkpoint(tmp_path, formula, GOLDEN[name]))
    assert model.family == "dit"
    assert model.sample_shape == (GOLDEN[name]["channels"], 8, 8)
    np.testing.assert_allclose(output(model.network, formula, GOLDEN[name]), GOLDEN[name]["output"], rtol=0, atol=1e-4)


def test_the_wrong_number_of_heads_would_be_seen(formula, tmp_path):
    case = GOLDEN[LEARNED]
    model = load_model(checkpoint(tmp_path, formula, case, {"num_heads": 6}))
    assert np.abs(output(model.network, formula, case) - case["output"]).max() > 1e-3


def test_a_shifted_timestep_embedding_would_be_seen(formula, tmp_path, monkeypatch):
    """Others convert these weights with frequencies over (half - 1), which loads and is wrong."""
    case = GOLDEN[LEARNED]

    def shifted(t, dim, shift):
        assert shift == 0
        half = dim // 2
        angle = t[:, None] * torch.exp(-np.log(10000) * torch.arange(half) / (half - 1))[None]
        return torch.cat([angle.cos(), angle.sin()], 1)

    model = load_model(checkpoint(tmp_path, formula, case))
    monkeypatch.setattr("accuquant.calibrate.families.dit_net.timestep_embedding", shifted)
    assert np.abs(output(model.network, formula, case) - case["output"]).max() > 1e-3


def test_the_ema_weights_of_a_training_file_are_taken(formula, tmp_path):
    case = GOLDEN[LEARNED]

    def training(state):
        return {"model": {k: torch.zeros_like(v) for k, v in state.items()}, "ema": state, "opt": {}}

    model = load_model(checkpoint(tmp_path, formula, case, wrap=training))
    np.testing.assert_allclose(output(model.network, formula, case), case["output"], rtol=0, atol=1e-4)


def test_guidance_leads_from_the_class_for_none(formula, tmp_path):
    model = load_model(checkpoint(tmp_path, formula, GOLDEN[LEARNED]))
    assert model.conditioning == ByClass(classes=5, null=5, guidance=4.0)
    x, t = formula.formula_input((2, 4, 8, 8)), torch.tensor([617.0, 617.0])
    with torch.no_grad():
        wanted, free = (model.network(x, t, torch.tensor(y)) for y in ([1, 3], [5, 5]))
        guided = model.guided(4.0)(x, t, y=torch.tensor([1, 3]))
    torch.testing.assert_close(guided, free + 4 * (wanted - free), rtol=1e-4, atol=1e-5)


def test_every_operator_has_a_role_and_reaches_the_graph(formula, tmp_path):
    model = load_model(checkpoint(tmp_path, formula, GOLDEN[LEARNED]))
    operators = quantize(model, QuantScheme(weight_bits=4, activation_bits=8, policy="integer"))
    roles = {name: operator.role for name, operator in operators.items()}
    assert roles["x_embedder.proj"] == "first"
    assert roles["final_layer.linear"] == "last"
    assert roles["t_embedder.mlp.0"] == roles["blocks.1.adaLN_modulation.1"] == "time"
    assert roles["final_layer.adaLN_modulation.1"] == "time"
    assert roles["blocks.0.attn.qk"] == "attention"
    assert roles["blocks.0.mlp.fc1"] == "body"
    assert model.block_of("blocks.1.mlp.fc1") == "blocks.1"
    graph = trace_float(model.network, operators, model.sample_shape, model.condition([0]))
    assert operators.keys() <= operator_nodes(graph).keys()


@pytest.mark.parametrize(
    ("width", "depth", "millions"), [(384, 12, 33), (768, 12, 131), (1024, 24, 458), (1152, 28, 675)]
)
def test_the_published_models_are_known_by_their_width(width, depth, millions, tmp_path):
    """S, B, L and XL with patches of 2, on meta tensors; sizes as published, learned variance included there."""
    with torch.device("meta"):
        network = DiT(DitConfig(32, 2, 4, width, depth, dit.HEADS[width], 4 * width, 1000))
    found = dit.shape_from_keys(network.state_dict(), tmp_path / "m.pt", dit._heads(tmp_path / "m.pt", None, width))
    assert found == network.config
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({}, "num_heads is None"),
        ({"num_heads": 5}, "5 heads do not divide the width of 48"),
        ({"num_heads": 0}, "num_heads is 0"),
        (["a"], "num_heads is None"),
    ],
)
def test_heads_that_do_not_fit_are_named(formula, tmp_path, flags, words):
    with pytest.raises(AccuQuantError, match=words):
        load_model(checkpoint(tmp_path, formula, GOLDEN[LEARNED], flags))


def test_without_its_yaml_an_unknown_width_says_what_is_missing(formula, tmp_path):
    path = checkpoint(tmp_path, formula, GOLDEN[LEARNED])
    path.with_suffix(".yml").unlink()
    with pytest.raises(AccuQuantError, match=r"write num_heads into m\.yml"):
        load_model(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("blocks.1.mlp.fc2.weight"), "does not fit the network its keys describe"),
        (lambda s: s.update(pos_embed=torch.zeros(1, 15, 48)), "15 positions and 2 blocks make no transformer"),
        (lambda s: s.update({"final_layer.linear.weight": torch.zeros(12 * 4, 48)}), "4 channels in and 12 out"),
        (lambda s: s["final_layer.linear.bias"].fill_(float("nan")), "not finite in final_layer.linear.bias"),
    ],
)
def test_damaged_weights_are_named(formula, tmp_path, change, words):
    def damage(state):
        change(state)
        return state

    with pytest.raises(AccuQuantError, match=words):
        load_model(checkpoint(tmp_path, formula, GOLDEN[LEARNED], wrap=damage))
