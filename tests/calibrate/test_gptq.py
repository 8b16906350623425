"""Rounding that makes up for its own errors: the closed form it follows, and what it gains on whole layers."""

import pytest
import torch
from accuquant.calibrate import gptq
from accuquant.calibrate.grid import Grid
from accuquant.calibrate.initialise import initialise
from accuquant.calibrate.layers import QuantizedConv2d, QuantizedOperator, quantization
from accuquant.calibrate.observers import max_weight_scale
from torch import nn

INT4 = Grid(4, signed=True, symmetric=True)


def problem(columns=12, rows=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return weight, max_weight_scale(weight, INT4), mix @ mix.T


def rounded(values, scale):
    return (values / scale).round().clamp(INT4.q_min, INT4.q_max) * scale


def damped(moments):
    return moments + gptq.DAMPING * moments.diagonal().mean() * torch.eye(len(moments), dtype=moments.dtype)


def test_free_columns_are_the_least_squares_answer_to_the_rounded_ones():
    """With the columns F rounded, those left are  w_R + (w_F - q_F) H_FR H_RR^-1,  minimising the error over them."""
    weight, scale, moments = problem()
    seen = gptq.round_columns(weight, scale, INT4, moments.clone())
    h = damped(moments)
    order = h.diagonal().argsort(descending=True, stable=True)
    taken = rounded(seen, scale)
    for j in range(1, len(order)):
        fixed, free = order[:j], order[j:]
        expected = weight[:, free] + (weight - taken)[:, fixed] @ h[fixed][:, free] @ torch.linalg.inv(h[free][:, free])
        assert torch.allclose(seen[:, order[j]], expected[:, 0], atol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_correlated_inputs_lose_less_than_by_rounding_to_nearest(seed):
    weight, scale, moments = problem(columns=300, rows=8, seed=seed)

    def error(values):
        difference = weight - rounded(values, scale)
        return float((difference @ moments * difference).sum())

    assert error(gptq.round_columns(weight, scale, INT4, moments.clone())) < 0.75 * error(weight)


def test_a_scale_for_each_block_of_columns_is_used_for_those_columns():
    """With blocks of one scale each the result is that of one scale; a block's scale touches no other block's codes."""
    weight, scale, moments = problem(columns=12, rows=5)
    one = gptq.round_columns(weight, scale, INT4, moments.clone())
    assert torch.equal(gptq.round_columns(weight, scale.expand(5, 12), INT4, moments.clone()), one)
    generator = torch.Generator().manual_seed(1)
    blocks = (scale * (0.5 + torch.rand(5, 3, generator=generator, dtype=torch.float64))).repeat_interleave(4, 1)
    alone = torch.cat([moments[k : k + 4, k : k + 4] for k in (0, 4, 8)], 1)
    apart = torch.block_diag(*alone.split(4, 1))
    h = gptq.DAMPING * apart.diagonal().mean()  # the damping is of all columns; give each block the same
    whole = gptq.round_columns(weight, blocks, INT4, apart.clone())
    for k in (0, 4, 8):
        part = apart[k : k + 4, k : k + 4]
        own = gptq.DAMPING * part.diagonal().mean()
        part = part + (h - own) * torch.eye(4, dtype=part.dtype)
        made = gptq.round_columns(weight[:, k : k + 4], blocks[:, k : k + 1], INT4, part)
        assert torch.allclose(rounded(made, blocks[:, k : k + 1]), rounded(whole[:, k : k + 4], blocks[:, k : k + 1]))


def test_inputs_without_correlation_round_to_nearest():
    weight, scale, moments = problem()
    assert torch.equal(gptq.round_columns(weight, scale, INT4, moments.diagonal().diag()), weight)


def test_inputs_that_were_always_zero_leave_the_weight_alone():
    weight, scale, moments = problem()
    assert torch.equal(gptq.round_columns(weight, scale, INT4, torch.zeros_like(moments)), weight)


@pytest.mark.parametrize(("stride", "padding", "kernel"), [(1, 1, 3), (2, 0, 3), (1, 0, 1)])
def test_columns_of_a_convolution_are_what_its_flattened_weight_multiplies(stride, padding, kernel):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, kernel, stride, padding, bias=False)
    activation = Grid(8, signed=False, symmetric=False)
    operator = QuantizedConv2d("conv", "body", conv, INT4, activation, split=2)
    for quantizer in operator.quantizers:
        quantizer.set(torch.tensor(0.05), torch.tensor(120.0))
    x = torch.randn(2, 3, 9, 9)
    on_grid = (torch.round(x / 0.05) * 0.05).clamp(-120 * 0.05, 135 * 0.05)
    columns = gptq._columns(operator, (x,))
    expected = conv(on_grid).permute(0, 2, 3, 1).flatten(0, 2)
    assert torch.allclose(columns @ conv.weight.flatten(1).T, expected, atol=1e-5)


def started(tiny, **settings):
    run = tiny.prepare(**settings)
    initialise(run.network, run.operators, run.plan, run.teacher, "mse")
    return run


def end_error(run):
    with quantization(run.operators, active=True), torch.no_grad():
        t = torch.full((run.teacher.states.shape[1],), run.plan.steps[2].timestep)
        return float((run.network(run.teacher.states[2], t) - run.teacher.outputs[2]).square().mean())


def test_a_network_errs_less_and_its_float_form_is_untouched(tiny):
    run = started(tiny, steps=6)
    x, t = run.teacher.states[0], torch.full((run.teacher.states.shape[1],), run.plan.steps[0].timestep)
    before = end_error(run)
    with quantization(run.operators, active=False), torch.no_grad():
        as_it_was = run.network(x, t)
    calls = []
    gptq.compensate(run.network, run.operators, run.plan, run.teacher, lambda *at: calls.append(at))
    with quantization(run.operators, active=False), torch.no_grad():
        assert torch.equal(run.network(x, t), as_it_was)
    assert end_error(run) < 0.7 * before
    assert calls[-1][0] == calls[-1][1] == len(calls)


def codes(run):
    return {n: op.weight_quantizer.codes() for n, op in run.operators.items() if op.weight_quantizer is not None}


def test_operators_that_do_not_fit_together_take_more_passes_to_the_same_codes(tiny, monkeypatch):
    whole, parts = started(tiny, steps=4), started(tiny, steps=4)
    gptq.compensate(whole.network, whole.operators, whole.plan, whole.teacher)
    monkeypatch.setattr(gptq, "BYTES", 1 << 20)
    assert len(list(gptq._passes(parts.operators))) > 3
    gptq.compensate(parts.network, parts.operators, parts.plan, parts.teacher)
    for name, expected in codes(whole).items():
        assert torch.equal(codes(parts)[name], expected), name


def test_wide_layers_are_rounded_in_parts(tiny, monkeypatch):
    nearest, run = started(tiny, steps=6), started(tiny, steps=6)
    monkeypatch.setattr(gptq, "COLUMNS", 100)
    gptq.compensate(run.network, run.operators, run.plan, run.teacher)
    assert end_error(run) < end_error(nearest)


def test_grouped_convolutions_round_to_nearest():
    conv = nn.Conv2d(4, 4, 3, groups=2)
    grid = Grid(8, signed=False, symmetric=False)
    operators: dict[str, QuantizedOperator] = {"conv": QuantizedConv2d("conv", "body", conv, INT4, grid)}
    assert list(gptq._passes(operators)) == []


@pytest.mark.parametrize("rounding", ["nearest", "offset", "adaround"])
def test_learning_starts_at_the_codes_it_found(tiny, tmp_path, rounding):
    """Whatever the form that rounding is learned in, no iterations leave these codes."""
    expected = started(tiny, steps=4)
    gptq.compensate(expected.network, expected.operators, expected.plan, expected.teacher)
    settings = {"initialisation": "mse", "compensate": "always", "rounding": rounding, "iterations": 0}
    run = tiny.prepare(steps=4, **settings)
    run.start(tmp_path)
    for name, found in codes(run).items():
        assert torch.equal(found, codes(expected)[name]), name
