"""What calibration leaves behind: integers, scales, and their way through the disk."""

import pytest
import torch
from accuquant.calibrate.recipe import Recipe, freeze
from accuquant.calibrate.scheme import QuantScheme
from accuquant.runtime.errors import AccuQuantError

SCHEME = QuantScheme(weight_bits=4, activation_bits=8)


@pytest.fixture
def operators(tiny):
    run = tiny.prepare()
    for operator in run.operators.values():
        for quantizer in operator.inputs:
            quantizer.set(torch.tensor(0.1), torch.tensor(0.0 if quantizer.grid.symmetric else 100.0))
        if operator.weight_quantizer is not None:
            w = operator.weight_quantizer
            w.set_scale(w.weight.flatten(1).abs().amax(1).clamp(min=1e-3).reshape(w.scale.shape) / w.grid.q_max)
    return run.operators


def test_round_trip(operators, tmp_path):
    recipe = freeze(operators, SCHEME, {"seed": 0})
    recipe.save(tmp_path)
    again = Recipe.load(tmp_path)
    assert again.facts == recipe.facts
    assert again.codes.keys() == again.scales.keys() == recipe.codes.keys()
    for name, codes in recipe.codes.items():
        assert torch.equal(again.codes[name], codes)
        assert torch.equal(again.scales[name], recipe.scales[name])


def test_codes_stay_within_the_bits_that_were_asked_for(operators):
    recipe = freeze(operators, SCHEME, {})
    for name, codes in recipe.codes.items():
        bits = recipe.facts.operators[name].weight_bits
        assert bits == SCHEME.weight_bits
        assert codes.dtype == torch.int8
        assert codes.min() >= -(1 << (bits - 1))
        assert codes.max() <= (1 << (bits - 1)) - 1
        assert recipe.scales[name].shape == (codes.shape[0],)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 0.0])
def test_an_activation_scale_that_is_not_usable_names_the_layer(operators, scale):
    operators["mid.attn_1.q"].inputs[0].log_scale.data.fill_(torch.tensor(scale).log())
    with pytest.raises(AccuQuantError, match=r"mid\.attn_1\.q"):
        freeze(operators, SCHEME, {})


def test_a_zero_point_that_is_not_finite_names_the_layer(operators):
    operators["mid.attn_1.q"].inputs[0].zero_point.data.fill_(float("nan"))
    with pytest.raises(AccuQuantError, match=r"mid\.attn_1\.q"):
        freeze(operators, SCHEME, {})


@pytest.mark.parametrize("scale", [float("nan"), 0.0, -1.0])
def test_a_weight_scale_that_is_not_usable_names_the_layer(operators, scale):
    operators["mid.attn_1.q"].weight_quantizer.scale[0] = scale
    with pytest.raises(AccuQuantError, match=r"mid\.attn_1\.q"):
        freeze(operators, SCHEME, {})


@pytest.mark.parametrize("name", ["recipe.json", "recipe.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "cut", "garbage"])
def test_a_damaged_recipe_is_a_user_error(operators, tmp_path, name, damage):
    freeze(operators, SCHEME, {}).save(tmp_path)
    path = tmp_path / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if damage == "cut" else b"\xff\xfe\x00\x01")
    with pytest.raises(AccuQuantError, match="no usable recipe"):
        Recipe.load(tmp_path)
