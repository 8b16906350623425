"""The grid of 8-bit floats, E4M3: four bits of exponent, three of mantissa, no infinity (OCP FP8 specification, 2023).

    codes   +- m 2^(e - 3),  8 <= m <= 15,  -6 <= e <= 8   up to 448, and multiples of 2^-9 below 2^-6
    step    2^(e - 3)        for 2^e <= |v| < 2^(e + 1)

Codes lie close where values are small and far apart where they are large, sixteen to every doubling. So the scale
hardly matters for what is lost, as long as nothing reaches 448 and little falls below 2^-6. Beyond 448 there is no
code: values saturate, as QuantizeLinear has it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .grid import Grid

LARGEST = 448
MANTISSA = 3
LEAST_EXPONENT = -6


@dataclass(frozen=True)
class Float8(Grid):
    """E4M3; symmetric by nature."""

    bits: int = 8
    signed: bool = True
    symmetric: bool = True

    @property
    def q_min(self) -> int:
        return -LARGEST

    @property
    def q_max(self) -> int:
        return LARGEST

    @property
    def dtype(self) -> torch.dtype:
        return torch.float8_e4m3fn

    def step(self, v: Tensor) -> Tensor:
        exponent = torch.frexp(v.detach()).exponent - 1  # v = m 2^exponent with 1 <= |m| < 2; of zero it is -1
        exponent = exponent.clamp(min=LEAST_EXPONENT).masked_fill(v == 0, LEAST_EXPONENT)
        return torch.ldexp(torch.ones_like(v), exponent - MANTISSA)

    def nearest(self, v: Tensor) -> Tensor:
        step = self.step(v)
        return torch.round(v / step) * step

    def below(self, v: Tensor) -> Tensor:
        step = self.step(v)
        return torch.floor(v / step) * step

    def neighbour(self, v: Tensor, offset: Tensor) -> Tensor:
        # Moved across a power of two, v finds codes at half the step, and would pass its neighbour.
        low, step = self.below(v), self.step(v)
        return self.nearest(v + step * offset).clamp(low, low + step)
