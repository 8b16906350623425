"""The operators that run in integers: convolution, linear layer, product of two activations.

    y = Q_a(x) * Q_w(w) + b          one scale per tensor for x, one per output channel for w, float bias

`quantize_operators` swaps every such module of a network for its quantized form, in place. While `active` is off a
quantized operator is exactly the float one, so that teacher and student share their weights.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..runtime.errors import AccuQuantError
from .grid import Grid, fake_quantize
from .rounding import WeightQuantizer
from .scheme import OperatorKind, QuantScheme, Role


class MatMul(nn.Module):
    """A product of two activations as a module, so that it has a name and can be quantized: (..., M, K) (..., K, N)."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.matmul(a, b)


class ActivationQuantizer(nn.Module):
    """Per-tensor fake quantization with learnable log scale and, on asymmetric grids, learnable zero point."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.zero_point = nn.Parameter(torch.zeros(()), requires_grad=not grid.symmetric)

    def set(self, scale: Tensor, zero_point: Tensor) -> None:
        with torch.no_grad():
            self.log_scale.copy_(scale.log())
            self.zero_point.copy_(zero_point)

    @property
    def scale(self) -> Tensor:
        return self.log_scale.exp()

    def forward(self, x: Tensor) -> Tensor:
        zero_point = self.zero_point.clamp(self.grid.q_min, self.grid.q_max)
        return fake_quantize(x, self.scale, zero_point, self.grid)


class QuantizedOperator(nn.Module):
    """What every quantized operator has: a name, a role, a switch, and a quantizer per activation input."""

    kind: OperatorKind

    def __init__(self, name: str, role: Role, input_grids: list[Grid]) -> None:
        super().__init__()
        self.name, self.role, self.active = name, role, False
        self.inputs = nn.ModuleList(ActivationQuantizer(grid) for grid in input_grids)
        self.weight_quantizer: WeightQuantizer | None = None

    def quantized_input(self, index: int, x: Tensor) -> Tensor:
        return cast(Tensor, self.inputs[index](x))


class QuantizedConv2d(QuantizedOperator):
    kind = "conv"

    def __init__(self, name: str, role: Role, conv: nn.Conv2d, weight: Grid, activation: Grid) -> None:
        super().__init__(name, role, [activation])
        self.conv = conv.requires_grad_(False)
        self.weight_quantizer = WeightQuantizer(conv.weight, weight)

    def forward(self, x: Tensor) -> Tensor:
        if not self.active:
            return cast(Tensor, self.conv(x))
        weight = cast(WeightQuantizer, self.weight_quantizer)()
        return self.conv._conv_forward(self.quantized_input(0, x), weight, self.conv.bias)


class QuantizedLinear(QuantizedOperator):
    kind = "linear"

    def __init__(self, name: str, role: Role, linear: nn.Linear, weight: Grid, activation: Grid) -> None:
        super().__init__(name, role, [activation])
        self.linear = linear.requires_grad_(False)
        self.weight_quantizer = WeightQuantizer(linear.weight, weight)

    def forward(self, x: Tensor) -> Tensor:
        if not self.active:
            return cast(Tensor, self.linear(x))
        weight = cast(WeightQuantizer, self.weight_quantizer)()
        return F.linear(self.quantized_input(0, x), weight, self.linear.bias)


class QuantizedMatMul(QuantizedOperator):
    kind = "matmul"

    def __init__(self, name: str, role: Role, left: Grid, right: Grid) -> None:
        super().__init__(name, role, [left, right])

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        if not self.active:
            return torch.matmul(a, b)
        return torch.matmul(self.quantized_input(0, a), self.quantized_input(1, b))


def quantize_operators(
    network: nn.Module, scheme: QuantScheme, role_of: Callable[[str], Role]
) -> dict[str, QuantizedOperator]:
    """Replace every Conv2d, Linear and MatMul of `network` by its quantized form, and return them by name.

    Raises:
        AccuQuantError: the network holds no such operator, or a kind of convolution that has no quantized form yet.
    """
    made: dict[str, QuantizedOperator] = {}
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Conv1d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
            raise AccuQuantError(f"layer {name} is a {type(module).__name__}, which has no quantized form yet")
        role = role_of(name)
        if isinstance(module, nn.Conv2d):
            made[name] = QuantizedConv2d(
                name, role, module, scheme.weight_grid(role), scheme.activation_grid(role, "conv")
            )
        elif isinstance(module, nn.Linear):
            made[name] = QuantizedLinear(
                name, role, module, scheme.weight_grid(role), scheme.activation_grid(role, "linear")
            )
        elif isinstance(module, MatMul):
            grid = scheme.activation_grid(role, "matmul")
            made[name] = QuantizedMatMul(name, role, grid, grid)
    if not made:
        raise AccuQuantError("the network has no convolution, linear layer or attention product to quantize")
    for name, operator in made.items():
        parent, _, leaf = name.rpartition(".")
        setattr(network.get_submodule(parent), leaf, operator)
    return made


@contextmanager
def quantization(operators: dict[str, QuantizedOperator], active: bool) -> Iterator[None]:
    """Switch quantization on or off for the block, then back to what it was."""
    before = {name: operator.active for name, operator in operators.items()}
    for operator in operators.values():
        operator.active = active
    try:
        yield
    finally:
        for name, operator in operators.items():
            operator.active = before[name]
