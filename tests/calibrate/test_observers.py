"""Ranges and histograms: shards merge, and the searched range loses no more than the full one."""

import pytest
import torch
from accuquant.calibrate.grid import Grid, dequantize, quantize
from accuquant.calibrate.observers import (
    BINS,
    Histogram,
    Range,
    max_weight_scale,
    min_max,
    mse_activation,
    mse_weight_scale,
    percentile,
)
from hypothesis import given
from hypothesis import strategies as st

KINDS = {
    "normal": lambda g: torch.randn(4000, generator=g),
    "silu": lambda g: torch.nn.functional.silu(2 * torch.randn(4000, generator=g)),
    "heavy": lambda g: torch.randn(4000, generator=g) ** 3,
    "positive": lambda g: torch.rand(4000, generator=g) + 0.5,
    "negative": lambda g: -torch.rand(4000, generator=g) - 0.5,
    "constant": lambda g: torch.full((100,), 0.3),
    "zero": lambda g: torch.zeros(100),
}


def seen(x: torch.Tensor) -> Histogram:
    r = Range()
    r.add(x)
    h = Histogram(r.low, r.high)
    h.add(x)
    return h


@given(st.integers(0, 1000), st.lists(st.integers(1, 50), min_size=1, max_size=6))
def test_merged_shards_equal_the_whole(seed, sizes):
    x = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(seed))
    whole, merged = Range(), Range()
    whole.add(x)
    for shard in x.split(sizes):
        part = Range()
        part.add(shard)
        merged.merge(part)
    assert merged == whole
    one, many = Histogram(whole.low, whole.high), Histogram(whole.low, whole.high)
    one.add(x)
    for shard in x.split(sizes):
        part = Histogram(whole.low, whole.high)
        part.add(shard)
        many.merge(part)
    assert torch.equal(one.counts, many.counts)
    assert one.counts.sum() == len(x)


def test_histograms_of_different_ranges_do_not_merge():
    with pytest.raises(ValueError, match="different ranges"):
        Histogram(0, 1).merge(Histogram(0, 2))


def test_the_extremes_are_counted():
    h = seen(torch.tensor([-1.0, 0.0, 1.0]))
    assert h.counts[0] == 1
    assert h.counts[-1] == 1
    assert h.centres[0] == pytest.approx(-1, abs=2 / BINS)
    assert h.centres[-1] == pytest.approx(1, abs=2 / BINS)


def error(h: Histogram, scale: torch.Tensor, zero: torch.Tensor, grid: Grid) -> float:
    x = h.centres
    return float(((x - dequantize(quantize(x, scale, zero, grid), scale, zero)).square() * h.counts).sum())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("form", [(False, False), (True, True)], ids=["uint", "int-symmetric"])
def test_the_searched_range_is_never_worse_than_the_full_one(kind, bits, form):
    grid = Grid(bits, signed=form[0], symmetric=form[1])
    x = KINDS[kind](torch.Generator().manual_seed(3))
    h = seen(x)
    searched, full = mse_activation(h, grid), min_max(h, grid)
    for scale, zero in (searched, full):
        assert scale > 0
        assert torch.isfinite(scale)
        assert zero == zero.round()
        assert grid.q_min <= zero <= grid.q_max
    assert error(h, *searched, grid) <= error(h, *full, grid) * (1 + 1e-12)


def test_a_heavy_tail_is_cut():
    """Cubed normals at 4 bits: the full range wastes most codes; the searched one loses a fifth less at least."""
    grid = Grid(4, signed=False, symmetric=False)
    x = KINDS["heavy"](torch.Generator().manual_seed(3)).double()
    h = seen(x)
    loss = {}
    for name, (scale, zero) in {"searched": mse_activation(h, grid), "full": min_max(h, grid)}.items():
        loss[name] = float((x - dequantize(quantize(x, scale, zero, grid), scale, zero)).square().mean())
    assert loss["searched"] < 0.8 * loss["full"]


def test_both_ends_are_searched():
    """One-sided values with an outlier on each side: the best range is not a scaled copy of the full one."""
    grid = Grid(4, signed=False, symmetric=False)
    x = torch.cat([KINDS["silu"](torch.Generator().manual_seed(1)), torch.tensor([-30.0, 12.0])])
    scale, zero = mse_activation(seen(x), grid)
    low, high = float(scale * (grid.q_min - zero)), float(scale * (grid.q_max - zero))
    assert low > -30 * 0.75
    assert abs(low / -30 - high / 12) > 0.04


@pytest.mark.parametrize("shape", [(8, 4, 3, 3), (16, 32), (5, 3, 1, 1)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_searched_weight_scale_beats_the_full_range_in_every_channel(shape, bits):
    grid = Grid(bits, signed=True, symmetric=True)
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)) ** 3
    w *= torch.logspace(-2, 1, shape[0]).reshape(-1, *[1] * (len(shape) - 1))

    def loss(scale):
        back = dequantize(quantize(w, scale, torch.zeros(()), grid), scale, torch.zeros(()))
        return (w - back).square().flatten(1).sum(1)

    searched, full = mse_weight_scale(w, grid), max_weight_scale(w, grid)
    assert searched.shape == full.shape == (shape[0], *[1] * (len(shape) - 1))
    assert (loss(searched) <= loss(full)).all()
    if bits < 8:  # at 8 bits this tail is worth keeping
        assert (loss(searched) < loss(full)).any()


def test_full_weight_range_clips_nothing():
    grid = Grid(4, signed=True, symmetric=True)
    w = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    v = w / max_weight_scale(w, grid)
    assert v.min() >= grid.q_min - 1e-5
    assert v.max() <= grid.q_max + 1e-5


@pytest.mark.parametrize("pick", [mse_weight_scale, max_weight_scale])
def test_a_dead_channel_gets_a_positive_scale_and_zero_codes(pick):
    grid = Grid(4, signed=True, symmetric=True)
    w = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    w[1] = 0
    scale = pick(w, grid)
    assert (scale > 0).all()
    assert (quantize(w, scale, torch.zeros(()), grid)[1] == 0).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_percentile_leaves_out_rare_values(symmetric):
    """A thousandth of the values far away: kept by 0.9999, left out by 0.99; without them it is nearly min-max."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(100_000, generator=generator) * 2 - 1
    far = x.clone()
    far[::1000] = 50.0
    grid = Grid(8, signed=symmetric, symmetric=symmetric)

    def scale(values, kept):
        seen = Histogram(float(values.min()), float(values.max()))
        seen.add(values)
        return float(percentile(seen, grid, kept)[0])

    full = 1 / 127 if symmetric else 2 / 255
    assert scale(x, 0.9999) == pytest.approx(full, rel=0.02)
    assert scale(far, 0.99) == pytest.approx(full, rel=0.06)  # a bin is 1/40 of the range
    assert scale(far, 0.9999) > 10 * full
