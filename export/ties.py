"""Results on which two correct engines may differ: those that a value on a rounding boundary reaches.

    v = x / s + z,    a tie if |v - floor(v) - 1/2| < e (|v| + levels),    e = EPSILON, of results OF_SUMS

Some engines divide by the scale, some multiply by its reciprocal, some add the zero point in the same rounding or count
from the lowest level; all are right to float32's last digits, and at a tie their codes are one apart. A convolution
spreads that over its window, a linear layer over a row, a product over a row or a column. Every other result is the
same integer sum in all of them.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from ..calibrate.layers import ActivationQuantizer, QuantizedConv2d, QuantizedMatMul, QuantizedOperator

EPSILON = 2.0**-22  # four roundings of float32
OF_SUMS = 2.0**-18  # in float32 and any order; some engines have integers to add up, some what these stand for


class Ties:
    """Filled while an operator runs inside `watch_ties`: where the values that it quantizes are ties."""

    def __init__(self, operator: QuantizedOperator) -> None:
        self._operator, self._inputs = operator, list[Tensor]()
        self._output: Tensor | None = None

    def _see(self, quantizer: ActivationQuantizer, given: tuple[Tensor, ...], made: tuple[Tensor, Tensor]) -> None:
        written = quantizer is self._operator.output
        v, levels = given[0] / made[1], quantizer.grid.q_max - quantizer.grid.q_min + 1
        distance = (v - v.floor() - 0.5).abs()
        found = distance < (OF_SUMS if written else EPSILON) * (v.abs() + levels)
        if written:
            self._output = found
        else:
            self._inputs.append(found)

    def reached(self) -> Tensor:
        """Which results they reach, of a shape that broadcasts against the result's."""
        operator = self._operator
        if isinstance(operator, QuantizedConv2d):
            conv = operator.conv
            seen = torch.cat(self._inputs, 1).any(1, keepdim=True).float()
            window = torch.ones(1, 1, *conv.kernel_size, device=seen.device)
            found = F.conv2d(seen, window, None, conv.stride, conv.padding, conv.dilation) > 0
        elif isinstance(operator, QuantizedMatMul):
            left, right = self._inputs
            found = left.any(-1, keepdim=True) | right.any(-2, keepdim=True)
        else:
            found = self._inputs[0].any(-1, keepdim=True)
        return found if self._output is None else found | self._output


@contextmanager
def watch_ties(operator: QuantizedOperator) -> Iterator[Ties]:
    ties = Ties(operator)
    handles = [quantizer.register_forward_hook(ties._see) for quantizer in operator.quantizers]
    try:
        yield ties
    finally:
        for handle in handles:
            handle.remove()
