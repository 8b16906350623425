"""Ranges from data: what values reach a quantizer, and which range loses least.

A range observer keeps min and max, a histogram counts values between fixed edges; both merge, so shards may be observed
apart. The MSE range is the one that minimises

    E || x - Q(x; s, z) ||^2,      [low, high] = [f_lo min, f_hi max],      f_lo, f_hi in (0, 1]

with the expectation over the histogram; both ends are searched, since SiLU outputs are one-sided.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .grid import Grid, dequantize, quantize

BINS = 2048  # eight to a code of an 8-bit grid: the histogram's own error stays far below the grid's
SHRINK = 24  # candidates per end


@dataclass
class Histogram:
    """Counts of values in BINS equal bins between low and high."""

    low: float
    high: float
    counts: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.float64))

    def add(self, x: Tensor) -> None:
        self.counts += torch.histc(x.detach().float(), BINS, self.low, self.high).double().cpu()

    def merge(self, other: "Histogram") -> None:
        if (self.low, self.high) != (other.low, other.high):
            raise ValueError("histograms of different ranges cannot be merged")
        self.counts += other.counts

    @property
    def centres(self) -> Tensor:
        width = (self.high - self.low) / BINS
        return self.low + width * (torch.arange(BINS, dtype=torch.float64) + 0.5)


@dataclass
class Range:
    """Smallest and largest value seen."""

    low: float = float("inf")
    high: float = float("-inf")

    def add(self, x: Tensor) -> None:
        low, high = torch.aminmax(x.detach())
        self.low, self.high = min(self.low, float(low)), max(self.high, float(high))

    def merge(self, other: "Range") -> None:
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)


def min_max(seen: Histogram, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale and zero point, float64 scalars, of the whole observed range."""
    return grid.affine(torch.tensor(seen.low, dtype=torch.float64), torch.tensor(seen.high, dtype=torch.float64))


def percentile(seen: Histogram, grid: Grid, kept: float = 0.9999) -> tuple[Tensor, Tensor]:
    """Scale and zero point, float64 scalars, of the range between the quantiles (1 - kept) / 2 and (1 + kept) / 2."""
    share = seen.counts.cumsum(0) / seen.counts.sum()
    low = int((share < (1 - kept) / 2).sum())
    high = min(BINS - 1, int((share < (1 + kept) / 2).sum()))
    width = (seen.high - seen.low) / BINS
    edges = torch.tensor([seen.low + width * low, seen.low + width * (high + 1)], dtype=torch.float64)
    return grid.affine(edges[0], edges[1])


def mse_activation(seen: Histogram, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale and zero point, float64 scalars, of the range with the least squared error."""
    shrink = torch.linspace(1.0, 1.0 / SHRINK, SHRINK, dtype=torch.float64)
    if grid.symmetric:
        low, high = seen.low * shrink, seen.high * shrink
    else:
        low = (seen.low * shrink).repeat_interleave(SHRINK)
        high = (seen.high * shrink).repeat(SHRINK)
    scale, zero_point = grid.affine(low, high)
    x = seen.centres[None, :]
    s, z = scale[:, None], zero_point[:, None]
    error = (x - dequantize(quantize(x, s, z, grid), s, z)).square() @ seen.counts
    best = int(error.argmin())
    return scale[best], zero_point[best]


def mse_weight_scale(weight: Tensor, grid: Grid, candidates: int = 64) -> Tensor:
    """Per-output-channel scale (C, 1, ...) of a weight (C, ...) with the least squared error of rounding to nearest."""
    flat = weight.detach().flatten(1)
    full, zero = grid.affine(flat.amin(1, keepdim=True), flat.amax(1, keepdim=True))
    best, least = full, torch.full_like(full, float("inf"))
    for shrink in torch.linspace(1.0, 0.4, candidates).tolist():
        scale = full * shrink
        error = (flat - dequantize(quantize(flat, scale, zero, grid), scale, zero)).square().sum(1, keepdim=True)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best.reshape(-1, *[1] * (weight.ndim - 1))


def max_weight_scale(weight: Tensor, grid: Grid) -> Tensor:
    """Per-output-channel scale (C, 1, ...) that clips nothing."""
    flat = weight.detach().flatten(1)
    scale, _ = grid.affine(flat.amin(1), flat.amax(1))
    return scale.reshape(-1, *[1] * (weight.ndim - 1))
