"""Ties: how far results move when a value on a rounding boundary goes the other way is told, and nothing more."""

import pytest
import torch
from accuquant.calibrate.grid import Grid
from accuquant.calibrate.layers import QuantizedConv2d, QuantizedLinear, QuantizedMatMul
from accuquant.export.ties import watch_ties
from torch import nn

GRID = Grid(8, signed=False, symmetric=False)
SCALE, ZERO = 0.1, 117.0


def ready(operator):
    for quantizer in operator.quantizers:
        quantizer.set(torch.tensor(SCALE), torch.tensor(ZERO))
    if (weight := operator.weight_quantizer) is not None:
        operator.layer.weight.data.abs_().clamp_(min=0.05)  # no code is zero, which a tie would not reach
        weight.set_scale(weight.weight.flatten(1).abs().amax(1).reshape(weight.scale.shape) / 127)
    operator.active = True
    return operator


def conv(split=None, **settings):
    layer = nn.Conv2d(6, 5, 3, **settings)
    return ready(QuantizedConv2d("c", "body", layer, Grid(8, True, True), GRID, split))


def away_from_ties(*shape):
    """Values a quarter of a step from the nearest boundary, at least."""
    return SCALE * (torch.randint(-50, 50, shape) + torch.rand(shape) / 2 - 0.25)


@torch.no_grad()
def runs(operator, given, place):
    """How far one value at `place` of the first input, on a boundary, is said to move results, and how far it does."""
    x = given[0].clone()

    def at(v):
        x[place] = SCALE * v
        with watch_ties(operator) as ties:
            return operator(x, *given[1:]), ties.slack()

    (below, none), (_, slack), (above, neither) = at(7.499), at(7.5), at(7.501)
    assert not torch.stack([none, neither]).any(), "a thousandth of a step away is no tie"
    return slack, (above - below).abs()


@pytest.mark.parametrize(
    "operator",
    [conv(), conv(padding=1), conv(stride=2, padding=1), conv(padding=2, dilation=2), conv(split=4, padding=1)],
)
def test_a_convolution_spreads_a_tie_over_its_window(operator):
    slack, changed = runs(operator, [away_from_ties(2, 6, 9, 9)], (1, 5, 4, 3))
    assert changed.any()
    torch.testing.assert_close(slack, changed, atol=1e-5, rtol=0)


def test_a_linear_layer_spreads_a_tie_over_its_row():
    operator = ready(QuantizedLinear("l", "body", nn.Linear(8, 3), Grid(8, True, True), GRID))
    slack, changed = runs(operator, [away_from_ties(2, 5, 8)], (1, 2, 7))
    torch.testing.assert_close(slack, changed, atol=1e-5, rtol=0)
    assert (slack > 0).sum() == 3


def test_a_product_spreads_a_tie_over_a_row_or_a_column():
    operator = ready(QuantizedMatMul("m", "attention", GRID, GRID))
    left, right = away_from_ties(2, 3, 4), away_from_ties(2, 4, 5)
    slack, changed = runs(operator, [left, right], (1, 2, 3))
    torch.testing.assert_close(slack, changed, atol=1e-5, rtol=0)
    right[0, 1, 4] = SCALE * 7.5
    with watch_ties(operator) as ties:
        operator(left, right)
    assert ties.slack().nonzero().tolist() == [[0, 0, 4], [0, 1, 4], [0, 2, 4]]


def test_where_the_result_is_rounded_too_its_ties_are_ties():
    """Of an identity: a result half a step of its own grid from the next is one, where no input is."""
    layer = nn.Conv2d(1, 1, 1)
    nn.init.ones_(layer.weight)
    nn.init.zeros_(layer.bias)
    operator = ready(QuantizedConv2d("o", "body", layer, Grid(8, True, True), GRID, output=GRID))
    operator.output.set(torch.tensor(2 * SCALE), torch.tensor(ZERO))
    x = SCALE * torch.tensor([[[[1.0, 2.0], [3.0, 4.1]]]])
    with watch_ties(operator) as ties, torch.no_grad():
        operator(x)
    torch.testing.assert_close(ties.slack(), 2 * SCALE * torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]]))


def test_nothing_is_watched_behind_the_block():
    operator = conv()
    with watch_ties(operator):
        pass
    assert not any(quantizer._forward_hooks for quantizer in operator.quantizers)
