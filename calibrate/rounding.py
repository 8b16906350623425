"""Weights on their grid, with a rounding that can be learned.

For a weight w with per-output-channel scale s, on a signed symmetric grid (of 8-bit floats, `floor` and `round` are to
codes, and h and d count in steps between them):

    nearest    w_q = s clamp(round(w / s))
    AdaRound   w_q = s clamp(floor(w / s) + h(v)),   h(v) = clip(1.2 sigmoid(v) - 0.1, 0, 1)       (Nagel et al. 2020)
               regulariser  mean of 1 - |2 h(v) - 1|^beta,  beta annealed from 20 to 2
    offset     w_q = s clamp(round(w / s + d)),      |d| <= 1/2, straight through the rounding     (Cheng et al. 2023)

AdaRound trains on soft weights and hardens them slowly: exact at the end, but it wants thousands of iterations. The
offset form trains on the very integers that will be deployed, which suits a budget of hundreds. Both choose between
the two neighbours of w / s, and both start at rounding to nearest - of the layer's weight, or of what gptq.py puts in
its place.

The scale can be learned too, as s = s_0 exp(g) with one g per output channel; its gradient is LSQ's, through the codes
(straight through the rounding) and through the product. AdaRound keeps the neighbours its scale gave it: its codes have
no gradient with respect to s.
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
    """A frozen float weight (C, ...) and how it is put on the grid; `forward` gives its codes as floats.

    With `block`, so many columns of a weight (C, K) share a scale, and each block is a row of its own: (C K / block,
    block). `matrix` is the weight with its own rows again.
    """

    weight: Tensor
    start: Tensor

    def __init__(self, weight: Tensor, grid: Grid, block: int | None = None) -> None:
        super().__init__()
        self.grid, self.channels, self.block = grid, len(weight), block
        weight = weight if block is None else weight.reshape(-1, block)
        self.rounding: Rounding = "nearest"
        self._own: Tensor | None = None  # what `weight` was before it was compensated
        self.register_buffer("weight", weight.detach())  # the layer's own, which nobody writes to
        self.register_buffer("start", torch.ones(weight.shape[0], *[1] * (weight.ndim - 1)))
        self.choice: nn.Parameter | None = None
        self.gain: nn.Parameter | None = None
        self.soft = False  # AdaRound only: train on the soft weights, deploy the hard ones
        self._shared: Tensor | None = None

    @property
    def scale(self) -> Tensor:
        """One per output channel, (C, 1, ...)."""
        return self.start if self.gain is None else self.start * self.gain.exp()

    @property
    def matrix(self) -> tuple[Tensor, Tensor]:
        """The weight as (C, K), and the scale of each of its entries, broadcast to the same shape."""
        return self.weight.reshape(self.channels, -1), self.scale.expand_as(self.weight).reshape(self.channels, -1)

    def set_scale(self, scale: Tensor) -> None:
        self.start.copy_(scale)
        self.gain = None

    def compensate(self, weight: Tensor) -> None:
        """Round `weight` from now on: the layer's own and what makes up for the rounding of its other entries."""
        self._own = self._own if self.compensated else self.weight
        self.weight = weight

    @property
    def compensated(self) -> bool:
        return self._own is not None

    def restore(self) -> None:
        """Round the layer's own weight again."""
        if self._own is not None:
            self.weight, self._own = self._own, None

    def learn(self, rounding: Rounding, scale: bool = False) -> None:
        """Attach the variables that are learned: AdaRound's v or the offset d, one per weight; g, one per channel."""
        self.rounding = rounding
        if scale:
            self.gain = nn.Parameter(torch.zeros_like(self.start))
        if rounding == "nearest":
            self.choice = None
            return
        v = self.weight / self.start
        if rounding == "offset":
            start = torch.zeros_like(v)
        else:
            fraction = ((v - self.grid.below(v)) / self.grid.step(v)).clamp(1e-4, 1 - 1e-4)
            if self.compensated:  # only the rounded weight resembles the layer's own
                fraction = 0.1 + 0.8 * (fraction > 0.5)
            start = -torch.log((ZETA - GAMMA) / (fraction - GAMMA) - 1)
        self.choice = nn.Parameter(start)

    def forward(self) -> Tensor:
        return self._codes_with_gradient() if self._shared is None else self._shared

    def _codes_with_gradient(self) -> Tensor:
        if self.rounding == "adaround":
            v = (self.weight / self.scale).detach()
            up = self._h() if self.soft else (self._h() >= 0.5).to(v.dtype)
            codes = self.grid.below(v) + self.grid.step(v) * up
        else:
            v = self.weight / self.scale
            if self.choice is None:
                moved, taken = v, self.grid.nearest(v)
            else:
                moved, taken = v + self.grid.step(v) * self.choice, self.grid.neighbour(v, self.choice)
            codes = moved + (taken - moved).detach()
        return self.grid.clamp(codes)

    @torch.no_grad()
    def codes(self) -> Tensor:
        """The codes as they will be stored, (C, ...): int8, or the grid's own type if they are no integers."""
        soft, self.soft = self.soft, False
        try:
            return self._codes_with_gradient().to(self.grid.dtype)
        finally:
            self.soft = soft

    def _h(self) -> Tensor:
        assert self.choice is not None
        return (torch.sigmoid(self.choice) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def regulariser(self, beta: float) -> Tensor:
        """Mean over the layer's weights of 1 - |2h - 1|^beta, the undecided share: zero once every choice is made."""
        return (1 - (2 * self._h() - 1).abs().pow(beta)).mean()

    @torch.no_grad()
    def project(self) -> None:
        """Keep the offset within its half code, so that only the two neighbours can be chosen."""
        if self.rounding == "offset" and self.choice is not None:
            self.choice.clamp_(-0.5, 0.5)


@contextmanager
def training_codes(weights: Iterable[WeightQuantizer]) -> Iterator[None]:
    """Within the block, weights are quantized once instead of at every network call, and soft if they are AdaRound's.

    The calls' gradients gather on the codes; leaving the block carries their sum on to the variables.
    """
    learning = [w for w in weights if w.choice is not None or w.gain is not None]
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
