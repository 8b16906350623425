"""8-bit floats: codes as hardware rounds them, on every value there is, and what calibration does with them."""

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from accuquant.calibrate.float8 import LARGEST, Float8
from accuquant.calibrate.grid import centred_codes, dequantize, fake_quantize, quantize
from accuquant.calibrate.observers import max_weight_scale
from accuquant.calibrate.recipe import Recipe, freeze
from accuquant.calibrate.rounding import WeightQuantizer, training_codes
from accuquant.calibrate.scheme import QuantScheme
from hypothesis import given
from hypothesis import strategies as st

GRID = Float8()
ONE, ZERO = torch.tensor(1.0), torch.tensor(0.0)
EVERY_CODE = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
CODES = torch.from_numpy(np.unique(EVERY_CODE[np.isfinite(EVERY_CODE)]))
finite = st.floats(-2000, 2000, width=32)


def test_every_code_is_its_own_nearest_and_has_a_step_to_the_next():
    assert len(CODES) == 253  # 256 without two NaNs and the second zero
    assert torch.equal(quantize(CODES, ONE, ZERO, GRID).float(), CODES)
    positive = CODES[CODES >= 0]
    assert torch.equal(positive[:-1] + GRID.step(positive[:-1]), positive[1:])


@given(st.lists(finite, min_size=1, max_size=40))
def test_codes_are_those_of_the_type_itself(xs):
    x = torch.tensor(xs)
    expected = x.numpy().clip(-LARGEST, LARGEST).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(quantize(x, ONE, ZERO, GRID).float().numpy(), expected)


def test_half_way_goes_to_the_even_mantissa_and_beyond_the_end_to_the_end():
    x = torch.tensor([17.0, 19.0, -17.0, 2.0**-10, 3 * 2.0**-10, 464.0, 1e4, -1e4])
    assert quantize(x, ONE, ZERO, GRID).tolist() == [16.0, 20.0, -16.0, 0.0, 2.0**-8, 448.0, 448.0, -448.0]


def test_codes_equal_the_onnx_operators_half_way_cases_included():
    import onnxruntime
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None])],
        [
            helper.make_tensor("s", TensorProto.FLOAT, [], [0.25]),
            helper.make_tensor("z", TensorProto.FLOAT8E4M3FN, [], [0.0]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    middles = (CODES[1:] + CODES[:-1]) / 2
    x = torch.cat([CODES, middles, torch.tensor([500.0, -500.0])]) * 0.25
    scale = torch.tensor(0.25)
    ours = dequantize(quantize(x, scale, ZERO, GRID), scale, ZERO)
    np.testing.assert_array_equal(ours.numpy(), session.run(None, {"x": x.numpy()})[0])


@given(finite, st.floats(2.0**-6, 8, width=32))
def test_the_code_below_and_the_next_enclose_a_value(x, scale):
    v = (torch.tensor(x) / torch.tensor(scale)).clamp(-LARGEST, LARGEST - 32)
    low = GRID.below(v)
    assert low <= v < low + GRID.step(v)
    for code in (low, low + GRID.step(v)):
        assert GRID.nearest(code) == code


def test_a_range_is_covered_from_end_to_end():
    scale, zero = GRID.affine(torch.tensor(-3.0), torch.tensor(2.0))
    assert zero == 0
    assert math.isclose(float(scale), 3.0 / LARGEST, rel_tol=1e-6)


def test_gradients_are_straight_through_inside_and_stop_at_the_ends():
    x = torch.tensor([1.3, -70.0, 600.0], requires_grad=True)
    scale = torch.tensor(1.25, requires_grad=True)
    centred_codes(x, scale, ZERO, GRID).sum().backward()
    assert torch.allclose(x.grad, torch.tensor([0.8, 0.8, 0.0]))
    assert torch.allclose(scale.grad, -(1.3 / 1.25 - 70.0 / 1.25) / torch.tensor(1.25))
    y = fake_quantize(torch.tensor([600.0]), scale, ZERO, GRID)
    assert y == 448 * 1.25


@pytest.mark.parametrize("rounding", ["nearest", "offset", "adaround"])
def test_learned_rounding_starts_at_the_nearest_code_and_can_reach_the_neighbours(rounding):
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    quantizer = WeightQuantizer(weight, GRID)
    quantizer.set_scale(max_weight_scale(weight, GRID))
    nearest = quantizer.codes().float()
    quantizer.learn(rounding)
    assert quantizer.codes().dtype == torch.float8_e4m3fn
    assert torch.equal(quantizer.codes().float(), nearest)
    if rounding == "nearest":
        return
    with training_codes([quantizer]):
        quantizer().sum().backward()
    assert (quantizer.choice.grad >= 0).all()
    assert (quantizer.choice.grad > 0).float().mean() > 0.9  # beyond the last code there is nothing to choose
    with torch.no_grad():
        quantizer.choice += 0.5 if rounding == "offset" else 20.0
    v = weight / quantizer.scale
    upper = GRID.clamp(GRID.below(v) + GRID.step(v))
    moved = quantizer.codes().float()
    assert ((moved == upper) | (moved == nearest)).all()
    assert (moved > nearest).float().mean() > 0.3


def test_a_recipe_holds_8_bit_floats(tiny, tmp_path):
    from accuquant.calibrate.families.ddim import role_of
    from accuquant.calibrate.layers import quantize_operators

    scheme = QuantScheme(weight_bits=8, activation_bits=8, number="float8", target="tensorrt")
    operators = quantize_operators(tiny.unet(), scheme, role_of)
    for operator in operators.values():
        if operator.weight_quantizer is not None:
            operator.weight_quantizer.set_scale(max_weight_scale(operator.weight_quantizer.weight, GRID))
    freeze(operators, scheme, {}).save(tmp_path)
    read = Recipe.load(tmp_path)
    name = "mid.block_1.conv1"
    assert read.container(name) == "float8"
    assert read.facts.operators[name].inputs[0].number == "float8"
    assert torch.equal(read.codes[name].float(), operators[name].weight_quantizer.codes().float())
