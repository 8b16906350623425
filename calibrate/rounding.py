"""Weights on their grid, with a rounding that can be learned.

For a weight w with per-output-channel scale s, on the signed symmetric grid:

    nearest    w_q = s clamp(round(w / s))
    AdaRound   w_q = s clamp(floor(w / s) + h(v)),   h(v) = clip(1.2 sigmoid(v) - 0.1, 0, 1)       (Nagel et al. 2020)
               regulariser  sum 1 - |2 h(v) - 1|^beta,  beta annealed from 20 to 2
    offset     w_q = s clamp(round(w / s + d)),      |d| <= 1/2, straight through the rounding     (Cheng et al. 2023)

AdaRound trains on soft weights and hardens them slowly: exact at the end, but it wants thousands of iterations. The
offset form trains on the very integers that will be deployed, which suits a budget of hundreds. Both choose between
the two neighbours of w / s, and both start at rounding to nearest.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from .grid import Grid

Rounding = Literal["nearest", "adaround", "offset"]
ZETA, GAMMA = 1.1, -0.1


class WeightQuantizer(nn.Module):
    """A frozen float weight (C, ...) and how it is put on the grid; `forward` gives its codes as floats."""

    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        self.rounding: Rounding = "nearest"
        self.register_buffer("weight", weight.detach())  # the layer's own, which nobody writes to
        self.register_buffer("scale", torch.ones(weight.shape[0], *[1] * (weight.ndim - 1)))
        self.choice: nn.Parameter | None = None
        self.soft = False  # AdaRound only: train on the soft weights, deploy the hard ones
        self._shared: Tensor | None = None

    def set_scale(self, scale: Tensor) -> None:
        self.scale.copy_(scale)

    def learn(self, rounding: Rounding) -> None:
        """Attach the variable that learns the rounding: AdaRound's v or the offset d, one per weight."""
        self.rounding = rounding
        if rounding == "nearest":
            self.choice = None
            return
        v = self.weight / self.scale
        if rounding == "offset":
            start = torch.zeros_like(v)
        else:
            fraction = (v - v.floor()).clamp(1e-4, 1 - 1e-4)
            start = -torch.log((ZETA - GAMMA) / (fraction - GAMMA) - 1)
        self.choice = nn.Parameter(start)

    def forward(self) -> Tensor:
        return self._codes_with_gradient() if self._shared is None else self._shared

    def _codes_with_gradient(self) -> Tensor:
        v = self.weight / self.scale
        if self.rounding == "adaround" and self.soft:
            codes = v.floor() + self._h()
        elif self.choice is not None and self.rounding == "offset":
            moved = v + self.choice
            codes = moved + (torch.round(moved) - moved).detach()
        else:
            codes = self.codes().to(v.dtype)
        return codes.clamp(self.grid.q_min, self.grid.q_max)

    @torch.no_grad()
    def codes(self) -> Tensor:
        """The integers as they will be stored, int8 (C, ...)."""
        v = self.weight / self.scale
        if self.choice is None:
            codes = torch.round(v)
        elif self.rounding == "offset":
            codes = torch.round(v + self.choice)
        else:
            codes = v.floor() + (self._h() >= 0.5)
        return codes.clamp(self.grid.q_min, self.grid.q_max).to(torch.int8)

    def _h(self) -> Tensor:
        assert self.choice is not None
        return (torch.sigmoid(self.choice) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def regulariser(self, beta: float) -> Tensor:
        """Sum over weights of 1 - |2h - 1|^beta: zero once every choice is made."""
        return (1 - (2 * self._h() - 1).abs().pow(beta)).sum()

    @torch.no_grad()
    def project(self) -> None:
        """Keep the offset within its half code, so that only the two neighbours can be chosen."""
        if self.rounding == "offset" and self.choice is not None:
            self.choice.clamp_(-0.5, 0.5)


@contextmanager
def training_codes(weights: Iterable[WeightQuantizer]) -> Iterator[None]:
    """Within the block, weights are quantized once instead of at every network call, and soft if they are AdaRound's.

    The calls' gradients gather on the codes; leaving the block carries their sum on to the rounding variables.
    """
    learning = [w for w in weights if w.choice is not None]
    codes = []
    for weight in learning:
        weight.soft = True
        codes.append(weight._codes_with_gradient())
        weight._shared = codes[-1].detach().requires_grad_()
    try:
        yield
        for weight, code in zip(learning, codes, strict=True):
            assert weight._shared is not None
            if weight._shared.grad is not None:
                code.backward(weight._shared.grad)
    finally:
        for weight in learning:
            weight.soft, weight._shared = False, None


def annealed_beta(progress: float, warmup: float = 0.2) -> float:
    """AdaRound's beta at `progress` in [0, 1]: no pull during the warm-up (inf), then 20 down to 2 on a cosine."""
    if progress < warmup:
        return math.inf
    through = (progress - warmup) / (1 - warmup)
    return 2 + (20 - 2) * 0.5 * (1 + math.cos(math.pi * through))
