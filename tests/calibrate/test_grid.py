"""Grids: codes as hardware rounds them, and gradients as LSQ defines them."""

import numpy as np
import pytest
import torch
from accuquant.calibrate.grid import Grid, centred_codes, dequantize, fake_quantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st

GRIDS = [
    Grid(bits, signed=signed, symmetric=symmetric)
    for bits in (2, 4, 6, 8)
    for signed, symmetric in ((True, True), (True, False), (False, False), (False, True))
]
grids = st.sampled_from(GRIDS)
values = st.lists(st.floats(-300, 300, width=32), min_size=1, max_size=30)
scales = st.floats(2.0**-10, 8, width=32)


def zero_points(grid: Grid) -> st.SearchStrategy[int]:
    return st.integers(grid.q_min, grid.q_max)


@pytest.mark.parametrize(
    ("bits", "signed", "low", "high"),
    [(8, True, -128, 127), (8, False, 0, 255), (4, True, -8, 7), (4, False, 0, 15), (2, True, -2, 1)],
)
def test_codes_of_a_grid(bits, signed, low, high):
    grid = Grid(bits, signed=signed, symmetric=True)
    assert (grid.q_min, grid.q_max) == (low, high)
    assert grid.dtype == (torch.int8 if signed else torch.uint8)


@pytest.mark.parametrize("bits", [0, 1, 9, 16])
def test_bits_without_integer_hardware_are_refused(bits):
    with pytest.raises(ValueError, match=f"{bits}-bit"):
        Grid(bits, signed=True, symmetric=True)


@given(values, scales, grids, st.data())
def test_codes_equal_numpy(xs, scale, grid, data):
    zero = data.draw(zero_points(grid))
    x = np.array(xs, np.float32)
    expected = np.clip(np.rint(x / np.float32(scale)) + zero, grid.q_min, grid.q_max)
    got = quantize(torch.from_numpy(x), torch.tensor(scale, dtype=torch.float32), torch.tensor(float(zero)), grid)
    assert got.dtype == grid.dtype
    np.testing.assert_array_equal(got.numpy(), expected)


def test_half_goes_to_even():
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    codes = quantize(x, torch.tensor(1.0), torch.tensor(0.0), Grid(8, signed=True, symmetric=True))
    assert codes.tolist() == [-2, -2, 0, 0, 2, 2]


@pytest.mark.parametrize("signed", [True, False])
def test_codes_equal_the_onnx_operator(signed):
    """QuantizeLinear and DequantizeLinear of ONNX's own reference, per tensor, half-way cases included."""
    onnx = pytest.importorskip("onnx")
    reference = pytest.importorskip("onnx.reference")
    from onnx import helper

    grid = Grid(8, signed=signed, symmetric=False)
    kind = onnx.TensorProto.INT8 if signed else onnx.TensorProto.UINT8
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
        ],
        "g",
        [
            helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [None]),
            helper.make_tensor_value_info("s", onnx.TensorProto.FLOAT, []),
            helper.make_tensor_value_info("z", kind, []),
        ],
        [
            helper.make_tensor_value_info("q", kind, [None]),
            helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [None]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)])
    session = reference.ReferenceEvaluator(model)
    zero = -3 if signed else 117
    x = np.concatenate([np.arange(-400, 400) * 0.125, np.random.default_rng(0).normal(0, 20, 2000)])
    x = x.astype(np.float32)
    q, y = session.run(None, {"x": x, "s": np.float32(0.25), "z": np.array(zero, np.int8 if signed else np.uint8)})
    scale, zero_point = torch.tensor(0.25), torch.tensor(float(zero))
    codes = quantize(torch.from_numpy(x), scale, zero_point, grid)
    np.testing.assert_array_equal(codes.numpy(), q)
    np.testing.assert_array_equal(dequantize(codes, scale, zero_point).numpy(), y)


@given(values, scales, grids, st.data())
def test_quantizing_twice_is_quantizing_once(xs, scale, grid, data):
    s, z = torch.tensor(scale), torch.tensor(float(data.draw(zero_points(grid))))
    once = dequantize(quantize(torch.tensor(xs), s, z, grid), s, z)
    assert torch.equal(dequantize(quantize(once, s, z, grid), s, z), once)


@given(values, scales, grids, st.data())
def test_training_and_deployment_agree(xs, scale, grid, data):
    """fake_quantize and centred_codes are the same integers as quantize."""
    x, s, z = torch.tensor(xs), torch.tensor(scale), torch.tensor(float(data.draw(zero_points(grid))))
    codes = quantize(x, s, z, grid)
    assert torch.equal(centred_codes(x, s, z, grid), codes.float() - z)
    assert torch.equal(fake_quantize(x, s, z, grid), dequantize(codes, s, z))


def test_a_fractional_zero_point_acts_as_its_rounding():
    grid = Grid(4, signed=False, symmetric=False)
    x, s = torch.linspace(-3, 3, 50), torch.tensor(0.3)
    for z in (3.4, 3.6):
        assert torch.equal(
            fake_quantize(x, s, torch.tensor(z), grid), fake_quantize(x, s, torch.tensor(z).round(), grid)
        )


@given(st.floats(-1e4, 1e4), st.floats(-1e4, 1e4), grids)
def test_affine_represents_zero_exactly_and_covers_the_range(one, other, grid):
    low, high = torch.tensor(min(one, other), dtype=torch.float64), torch.tensor(max(one, other), dtype=torch.float64)
    scale, zero = grid.affine(low, high)
    assert scale > 0
    assert zero == zero.round()
    assert grid.q_min <= zero <= grid.q_max
    if grid.symmetric:
        assert zero == 0
        if not grid.signed:
            # An unsigned symmetric grid is for values that are never negative.
            low, high = low.clamp(min=0.0), high.clamp(min=0.0)
    nothing = torch.zeros((), dtype=torch.float64)
    assert dequantize(quantize(nothing, scale, zero, grid), scale, zero) == 0
    for end in (low, high):
        # Rounding the zero point moves the range by half a code, rounding the value by another half.
        assert (dequantize(quantize(end, scale, zero, grid), scale, zero) - end).abs() <= scale * (1 + 1e-9)


def test_affine_is_elementwise():
    grid = Grid(4, signed=True, symmetric=True)
    low, high = torch.tensor([-1.0, -2.0, 0.0]), torch.tensor([0.5, 7.0, 0.0])
    scale, zero = grid.affine(low, high)
    assert scale.shape == zero.shape == (3,)
    for i in range(3):
        assert scale[i] == grid.affine(low[i], high[i])[0]


def surrogate(x, scale, zero, grid, residue):
    """s clamp(x / s + residue): Q with its rounding frozen, which is what "straight through" differentiates."""
    return scale * (x / scale + residue).clamp(grid.q_min - zero, grid.q_max - zero)


@settings(deadline=None)
@given(grids, st.integers(0, 10_000), st.data())
def test_gradients_equal_finite_differences(grid, seed, data):
    """For x, scale and zero point, in float64, away from the kinks at the grid's ends."""
    rng = np.random.default_rng(seed)
    zero = torch.tensor(float(data.draw(zero_points(grid))), dtype=torch.float64)
    scale = torch.tensor(rng.uniform(0.05, 2), dtype=torch.float64)
    x = torch.from_numpy(rng.normal(0, float(scale) * (grid.q_max - grid.q_min) / 2, 40))
    v = x / scale
    residue = v.round() - v
    inside = (v.round() + zero >= grid.q_min) & (v.round() + zero <= grid.q_max)
    edge = (v.round() + zero == grid.q_min) | (v.round() + zero == grid.q_max)
    x, residue, inside = x[~edge], residue[~edge], inside[~edge]
    if not len(x):
        return
    leaves = [t.clone().requires_grad_() for t in (x, scale.expand_as(x), zero.expand_as(x))]
    fake_quantize(*leaves, grid).sum().backward()
    h = 1e-6
    for k, leaf in enumerate(leaves):
        if k == 2:
            continue
        moved = []
        for sign in (1, -1):
            arguments = [x, scale.expand_as(x), zero.expand_as(x)]
            arguments[k] = arguments[k] + sign * h
            moved.append(surrogate(*arguments, grid, residue))
        torch.testing.assert_close(leaf.grad, (moved[0] - moved[1]) / (2 * h), rtol=1e-5, atol=1e-6)
    # The zero point is an integer: its finite difference is that of one code, exact outside the range.
    step = torch.where(inside, 0.0, -scale)
    torch.testing.assert_close(leaves[2].grad, step, rtol=1e-12, atol=0)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_scale_gradient_is_lsq(grid):
    """round(v) - v inside; the clip level, less the zero point, outside."""
    rng = np.random.default_rng(1)
    zero = float((grid.q_min + grid.q_max) // 2) if not grid.symmetric else 0.0
    x = torch.from_numpy(rng.normal(0, grid.q_max, 200))
    s = torch.full_like(x, 0.7).requires_grad_()
    z = torch.full_like(x, zero)
    fake_quantize(x, s, z, grid).sum().backward()
    v = x / 0.7
    expected = torch.where(
        v.round() < grid.q_min - zero,
        grid.q_min - zero,
        torch.where(v.round() > grid.q_max - zero, grid.q_max - zero, v.round() - v),
    )
    torch.testing.assert_close(s.grad, expected, rtol=1e-12, atol=1e-12)


def test_outside_the_range_the_derivatives_are_exact():
    """No surrogate needed: Q itself is differentiable in s there, and steps by -s in z."""
    grid = Grid(4, signed=False, symmetric=False)
    for x in (-9.0, 40.0):
        s, z = torch.tensor(0.5, dtype=torch.float64), torch.tensor(5.0, dtype=torch.float64)
        x = torch.tensor(x, dtype=torch.float64)
        leaves = [t.clone().requires_grad_() for t in (x, s, z)]
        fake_quantize(*leaves, grid).backward()
        h = 1e-4
        by_scale = (fake_quantize(x, s + h, z, grid) - fake_quantize(x, s - h, z, grid)) / (2 * h)
        by_zero = fake_quantize(x, s, z + 1, grid) - fake_quantize(x, s, z, grid)
        torch.testing.assert_close(leaves[1].grad, by_scale, rtol=1e-9, atol=0)
        torch.testing.assert_close(leaves[2].grad, by_zero, rtol=1e-9, atol=0)
        assert leaves[0].grad == 0


@pytest.mark.parametrize("shape", [(), (3, 1, 1), (1, 3, 1, 1), (2, 1, 1, 1)])
def test_gradients_of_broadcast_parameters_are_sums_over_what_they_serve(shape):
    grid = Grid(4, signed=True, symmetric=False)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64) * 3
    weight = torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64)
    s = (torch.rand(shape, generator=generator, dtype=torch.float64) + 0.2).requires_grad_()
    z = torch.full(shape, 2.0, dtype=torch.float64, requires_grad=True)
    (fake_quantize(x, s, z, grid) * weight).sum().backward()
    full_s = s.detach().expand_as(x).clone().requires_grad_()
    full_z = z.detach().expand_as(x).clone().requires_grad_()
    (fake_quantize(x, full_s, full_z, grid) * weight).sum().backward()
    assert s.grad.shape == s.shape
    torch.testing.assert_close(s.grad, full_s.grad.sum_to_size(shape))
    torch.testing.assert_close(z.grad, full_z.grad.sum_to_size(shape))


def test_codes_multiply_exactly_in_bfloat16():
    """The claim that lets calibration multiply in bfloat16: centred codes up to 256 survive the cast."""
    codes = torch.arange(-256, 257).float()
    assert torch.equal(codes.bfloat16().float(), codes)
