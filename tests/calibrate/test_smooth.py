"""SmoothQuant's migration: the same layer, with its channels evened out."""

import pytest
import torch
from accuquant.calibrate.grid import Grid
from accuquant.calibrate.layers import QuantizedConv2d, QuantizedLinear
from accuquant.calibrate.smooth import channel_peaks, smooth, smoothable
from torch import nn

WEIGHT, ACTIVATION = Grid(8, signed=True, symmetric=True), Grid(8, signed=True, symmetric=True)


def layer(kind):
    """A layer, and an input with one channel a hundred times as wide as the others."""
    generator = torch.Generator().manual_seed(0)
    if kind == "linear":
        inner, shape = nn.Linear(6, 5), (40, 6)
    else:
        inner, shape = nn.Conv2d(6, 5, 1), (4, 6, 7, 7)
    with torch.no_grad():
        for p in inner.parameters():
            p.normal_(generator=generator)
    x = torch.randn(shape, generator=generator)
    x[:, 2] *= 100
    made = QuantizedLinear if kind == "linear" else QuantizedConv2d
    return made("layer", "body", inner, WEIGHT, ACTIVATION), x


def error(operator, x):
    """Of the quantized layer with ranges from min and max, relative to its output."""
    weight = operator.weight_quantizer
    weight.set_scale(weight.weight.flatten(1).abs().amax(1).reshape(weight.scale.shape) / WEIGHT.q_max)
    (seen,) = operator.parts((x,))
    operator.quantizers[0].set(*ACTIVATION.affine(seen.min(), seen.max()))
    with torch.no_grad():
        wanted = operator(x)
        operator.active = True
        got = operator(x)
        operator.active = False
    return float((got - wanted).square().mean() / wanted.square().mean())


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.8])
def test_the_product_stays_and_the_peaks_meet_the_formula(kind, alpha):
    operator, x = layer(kind)
    peaks = channel_peaks(x, operator)
    before = operator.weight_quantizer.weight.clone()
    smooth(operator, peaks, alpha)
    (divided,) = operator.parts((x,))
    m = operator.smoothing
    widest = before.abs().flatten(2).amax((0, 2)) if before.ndim > 2 else before.abs().amax(0)
    torch.testing.assert_close(m, peaks**alpha / widest ** (1 - alpha))
    torch.testing.assert_close(channel_peaks(divided, operator), peaks / m)
    moved = operator.weight_quantizer.weight
    torch.testing.assert_close(moved, before * (m if kind == "linear" else m[:, None, None]))


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_an_outlier_channel_costs_less(kind):
    operator, x = layer(kind)
    plain = error(operator, x)
    smooth(operator, channel_peaks(x, operator), 0.5)
    assert error(operator, x) < 0.5 * plain


def test_a_dead_channel_is_left_alone():
    operator, x = layer("linear")
    x[:, 4] = 0
    smooth(operator, channel_peaks(x, operator), 0.5)
    assert operator.smoothing[4] == 1
    assert torch.isfinite(operator.smoothing).all()


def test_only_linear_layers_and_pointwise_convolutions_of_one_input(tiny):
    chosen = dict(smoothable(tiny.prepare().operators))
    assert "mid.attn_1.q" in chosen
    assert "temb.dense.0" in chosen
    assert "mid.block_1.conv1" not in chosen
    conv = QuantizedConv2d("layer", "body", nn.Conv2d(6, 5, 1), WEIGHT, ACTIVATION, split=3)
    assert dict(smoothable({"layer": conv})) == {}
