"""SmoothQuant: move the spread between input channels from activations to weights (Xiao et al., ICML 2023).

    y = W x = (W diag(m)) (diag(m)^-1 x),        m_j = max |x_j|^alpha / max_i |w_ij|^(1 - alpha)

for linear layers and 1x1 convolutions. One scale per tensor has to cover its widest channel; divided by m, channels are
alike, and the per-output-channel scales of the weights take what was moved. alpha = 0 leaves activations to themselves,
1 evens them out completely.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .layers import QuantizedConv2d, QuantizedLinear, QuantizedOperator

SMALLEST = 1e-5  # of a channel's largest value: a dead channel is left as it is


def smoothable(operators: dict[str, QuantizedOperator]) -> Iterator[tuple[str, QuantizedOperator]]:
    """Linear layers and 1x1 convolutions that read one tensor with one scale."""
    for name, operator in operators.items():
        if len(operator.inputs) != 1:
            continue
        if isinstance(operator, QuantizedLinear) or (
            isinstance(operator, QuantizedConv2d)
            and operator.conv.kernel_size == (1, 1)
            and operator.conv.groups == 1
            and operator.split is None
        ):
            yield name, operator


@torch.no_grad()
def channel_peaks(x: Tensor, operator: QuantizedOperator) -> Tensor:
    """max |x_j| over everything but the input channels, (C,)."""
    axis = 1 if isinstance(operator, QuantizedConv2d) else x.ndim - 1
    return x.abs().amax([d for d in range(x.ndim) if d != axis])


@torch.no_grad()
def smooth(operator: QuantizedOperator, peaks: Tensor, alpha: float) -> None:
    """Divide the operator's input channels by m, and multiply its weight's; `peaks` (C,) is max |x_j|."""
    quantizer = operator.weight_quantizer
    assert quantizer is not None
    weight = operator.layer.weight.detach()
    widest = weight.abs().amax([d for d in range(weight.ndim) if d != 1])
    m = peaks.clamp(min=SMALLEST) ** alpha / widest.clamp(min=SMALLEST) ** (1 - alpha)
    m = torch.where((peaks > SMALLEST) & (widest > SMALLEST), m, torch.ones_like(m))
    operator.smoothing = m
    quantizer.weight = weight * m.view(1, -1, *[1] * (weight.ndim - 2))
