"""How far apart two correct engines may be: what values on a rounding boundary can do to a result.

    v = x / s + z,    a tie if |v - floor(v) - 1/2| < e (|v| + levels),    e = EPSILON, of results OF_SUMS

Some engines divide by the scale, some multiply by its reciprocal, some add the zero point in the same rounding or count
from the lowest level; all are right to float32's last digits, and at a tie their codes are one apart. With d = s where
a value is a tie and 0 elsewhere, results of a layer, and of a product, differ by no more than

    |w| * d,    |a| d_b + d_a |b| + d_a d_b,

and by a step of its grid where the result is written on one. Everything else is the same integer sum in all of them.
Through a whole network no such bound holds: there ties are broken in several ways, and what comes out is compared.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..calibrate.layers import ActivationQuantizer, QuantizedConv2d, QuantizedMatMul, QuantizedOperator

EPSILON = 2.0**-22  # four roundings of float32
OF_SUMS = 2.0**-18  # in float32 and any order; some engines have integers to add up, some what these stand for
COINS = 6  # ways to break ties by a coin for each

TieBreak = Callable[[Tensor], Tensor]  # of values v: how far to move them, as a share of |v| + levels


class Ties:
    """Filled while an operator runs inside `watch_ties`: where the values that it quantizes are ties."""

    def __init__(self, operator: QuantizedOperator) -> None:
        self._operator = operator
        self._values, self._steps = list[Tensor](), list[Tensor]()  # of the inputs: magnitudes, and d
        self._written: tuple[Tensor, Tensor] | None = None  # where the result is a tie, and its step

    def _see(self, quantizer: ActivationQuantizer, given: tuple[Tensor, ...], made: tuple[Tensor, Tensor]) -> None:
        written = quantizer is self._operator.output
        codes, scale = made
        v, levels = given[0] / scale, quantizer.grid.q_max - quantizer.grid.q_min + 1
        distance = (v - v.floor() - 0.5).abs()
        found = distance < (OF_SUMS if written else EPSILON) * (v.abs() + levels)
        if written:
            self._written = found, scale
        else:
            self._values.append((codes * scale).abs())
            self._steps.append(found * scale)

    def slack(self) -> Tensor:
        """By how much each result may differ, zero where no tie reaches it; of the result's shape."""
        operator = self._operator
        if isinstance(operator, QuantizedMatMul):
            (left, right), (d_left, d_right) = self._values, self._steps
            found = left @ d_right + d_left @ (right + d_right)
        else:
            codes, scale = operator.weight_codes()
            weight = codes.float().abs() * scale.reshape(-1, *[1] * (codes.ndim - 1))
            steps = torch.cat(self._steps, 1) if isinstance(operator, QuantizedConv2d) else self._steps[0]
            if isinstance(operator, QuantizedConv2d):
                conv = operator.conv
                found = F.conv2d(steps, weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
            else:
                found = F.linear(steps, weight)
        if self._written is None:
            return found
        ties, step = self._written
        return found + (ties | (found > 0)) * step


@contextmanager
def watch_ties(operator: QuantizedOperator) -> Iterator[Ties]:
    ties = Ties(operator)
    handles = [quantizer.register_forward_hook(ties._see) for quantizer in operator.quantizers]
    try:
        yield ties
    finally:
        for handle in handles:
            handle.remove()


def tie_breaks() -> Iterator[TieBreak]:
    """All up, all down, and by a coin for each value."""
    for share in (EPSILON, -EPSILON, OF_SUMS, -OF_SUMS):
        yield partial(torch.full_like, fill_value=share)
    for seed in range(COINS):
        yield partial(_coins, torch.Generator().manual_seed(seed))


def _coins(generator: torch.Generator, v: Tensor) -> Tensor:
    return torch.empty(v.shape).uniform_(-OF_SUMS, OF_SUMS, generator=generator).to(v)


@contextmanager
def ties_broken(operators: Mapping[str, QuantizedOperator], way: TieBreak) -> Iterator[None]:
    """Meanwhile operators quantize values that were moved over the boundaries that they lie on."""

    def move(quantizer: ActivationQuantizer, given: tuple[Tensor, ...]) -> Tensor:
        x, levels = given[0], quantizer.grid.q_max - quantizer.grid.q_min + 1
        return x + (x.abs() + levels * quantizer.current_scale()) * way(x)

    quantizers = [quantizer for operator in operators.values() for quantizer in operator.quantizers]
    handles = [quantizer.register_forward_pre_hook(move) for quantizer in quantizers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
