"""Grids, and quantization onto them as pure functions.

With scale s > 0 and zero point z, on the codes q_min..q_max:

    q(x)  = clamp(round(x / s) + z, q_min, q_max)          round half to even, as ONNX QuantizeLinear does
    Q(x)  = s (q(x) - z)

where `round` is to the nearest code: an integer, or on float8.py's grid a float of 8 bits. `centred_codes` gives
q(x) - z as floats: a convolution of those, times the scales, is the arithmetic of the hardware itself, exact in float32
(sums below 2^24) and with bfloat16 operands (integers up to 256). Its gradients are those of LSQ and LSQ+ (Esser et al.
2020; Bhalgat et al. 2020): straight through the rounding, exact elsewhere.
With v = x / s and `in` meaning that v + z did not leave the grid, for c = q - z and Q = s c:

    dc/dx = [in] / s          dc/ds = -v [in] / s          dc/dz = -[not in]
    dQ/dx = [in]              dQ/ds = q - z - v [in]       dQ/dz = -s [not in]
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """The codes of an integer type, possibly of fewer bits than its container (6-bit values in an int8, say)."""

    bits: int
    signed: bool
    symmetric: bool

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"{self.bits}-bit grid: 2 to 8 bits have integer hardware paths")

    @property
    def q_min(self) -> int:
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def q_max(self) -> int:
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    @property
    def dtype(self) -> torch.dtype:
        """The container that codes are stored and computed in."""
        return torch.int8 if self.signed else torch.uint8

    def step(self, v: Tensor) -> Tensor | float:
        """How far the codes around v are from each other."""
        return 1.0

    def nearest(self, v: Tensor) -> Tensor:
        """v rounded to a code, half to even; not clamped to the grid's ends."""
        return torch.round(v)

    def below(self, v: Tensor) -> Tensor:
        """The code at or below v; `step(v)` above it is the next."""
        return v.floor()

    def neighbour(self, v: Tensor, offset: Tensor) -> Tensor:
        """Of the two codes around v the one nearest to v moved by `offset` steps, |offset| <= 1/2."""
        return self.nearest(v + offset)

    def clamp(self, v: Tensor) -> Tensor:
        return v.clamp(self.q_min, self.q_max)

    def affine(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and integer zero point (as float) that cover [low, high] and represent 0 exactly; elementwise."""
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        if self.symmetric:
            scale = torch.maximum(-low / -self.q_min, high / self.q_max) if self.signed else high / self.q_max
            zero_point = torch.zeros_like(scale)
            return scale.clamp(min=TINY), zero_point
        scale = ((high - low) / (self.q_max - self.q_min)).clamp(min=TINY)
        return scale, (self.q_min - low / scale).round().clamp(self.q_min, self.q_max)


TINY = 1e-8  # a dead channel or an always-zero input still needs a positive scale


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """Codes q(x) in the grid's container type; scale and zero_point broadcast against x."""
    return grid.clamp(grid.nearest(x / scale) + zero_point).to(grid.dtype)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return (codes.to(scale.dtype) - zero_point) * scale


def centred_codes(x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """q(x) - z in x's float type, with the gradients above. A fractional zero point is rounded first."""
    return _CentredCodes.apply(x, scale, zero_point, grid)


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """Q(x) with the gradients above for x, scale and zero_point."""
    return centred_codes(x, scale, zero_point, grid) * scale


def round_through(x: Tensor) -> Tensor:
    """round(x), with the gradient of x."""
    return x + (torch.round(x) - x).detach()


class _CentredCodes(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, zero_point, grid):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN205
        zero = torch.round(zero_point)
        rounded = grid.nearest(x / scale)
        codes = rounded.clamp(grid.q_min - zero, grid.q_max - zero)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(x, scale, zero, rounded == codes)
        return codes

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN205
        x, scale, zero, inside = ctx.saved_tensors
        kept = grad * inside
        through = kept / scale
        grad_scale = grad_zero = None
        if ctx.needs_input_grad[1]:
            dot = (
                torch.dot(through.flatten(), x.flatten()) if scale.ndim == 0 else (through * x).sum_to_size(scale.shape)
            )
            grad_scale = -dot / scale
        if ctx.needs_input_grad[2]:
            # A difference of tensors, not of sums: Adam would make steps of the rounding where nothing is clipped.
            grad_zero = (kept - grad).sum_to_size(zero.shape)
        return through if ctx.needs_input_grad[0] else None, grad_scale, grad_zero, None
