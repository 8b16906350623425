"""The operators that run in integers: convolution, linear layer, product of two activations.

    y = s_a s_w (q_a - z_a) * q_w + b       one scale per tensor for x, one per output channel for w, float bias

or, where weights alone are quantized, y = x * (s_w q_w) + b, a linear layer's in blocks of columns with a scale each;
and, where a target's kernel writes 8 bits, y on a grid of its own, and b on that of the sum, s_a s_w times integers.

The simulation multiplies codes, as the hardware does, and scales afterwards: that is exact in float32, and stays exact
with bfloat16 operands (codes are integers up to 255), which CPUs with AVX512-BF16 run twice as fast.

`quantize_operators` swaps every such module of a network for its quantized form, in place. While `active` is off a
quantized operator is exactly the float one, so that teacher and student share their weights.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..runtime.errors import AccuQuantError, near
from .grid import Grid, centred_codes, round_through
from .rounding import WeightQuantizer
from .scheme import OperatorKind, QuantScheme, Role

# Without a quantized form: compilers multiply transposed ones in float anyway, and no family has the others.
UNQUANTIZABLE = (nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class MatMul(nn.Module):
    """A product of two activations as a module, so that it has a name and can be quantized: (..., M, K) (..., K, N)."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.matmul(a, b)


QUANTIZABLE = (nn.Conv2d, nn.Linear, MatMul)


class RowTable(Protocol):
    """Which of a quantizer's sets of parameters the current call uses; sharing.py makes one."""

    current: int
    bounds: tuple[float, ...]

    def __len__(self) -> int: ...

    def row(self, timestep: float) -> int: ...


class ActivationQuantizer(nn.Module):
    """Per-tensor quantization with learnable log scale and, on asymmetric grids, learnable zero point.

    With a table there is a scale for each stretch of the chain, around one zero point.
    """

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.zero_point = nn.Parameter(torch.zeros(()), requires_grad=not grid.symmetric)
        self.table: RowTable | None = None

    @torch.no_grad()
    def set(self, scale: Tensor, zero_point: Tensor, row: int | None = None) -> None:
        """Set the parameters; of the scales that of one row, if there is a table and `row` is given."""
        here = ... if row is None or self.table is None else row
        self.log_scale[here] = scale.log().to(self.log_scale)
        self.zero_point.copy_(zero_point)

    @property
    def scale(self) -> Tensor:
        """() or, with a table, (K,)."""
        return self.log_scale.exp()

    def current_scale(self) -> Tensor:
        """Of the call that is under way, ()."""
        return self.scale if self.table is None else self.scale[self.table.current]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Centred codes of x, and the scale that turns them back into values."""
        scale, zero_point = self.current_scale(), self.zero_point.clamp(self.grid.q_min, self.grid.q_max)
        return centred_codes(x, scale, zero_point, self.grid), scale


class QuantizedOperator(nn.Module):
    """What every quantized operator has: name, role, switch, a quantizer per activation input, a type to compute in.

    `output` is the quantizer of what it writes, None where kernels write floats.
    """

    kind: OperatorKind

    def __init__(self, name: str, role: Role, input_grids: list[Grid], weight: WeightQuantizer | None = None) -> None:
        super().__init__()
        self.name, self.role, self.active = name, role, False
        self.compute = torch.float32
        self.inputs = nn.ModuleList(ActivationQuantizer(grid) for grid in input_grids)
        self.output: ActivationQuantizer | None = None
        self.weight_quantizer = weight
        self.shift: nn.Parameter | None = None
        self.smoothing: Tensor | None = None  # (C,) of the input, which smooth.py moved into the weight

    def learn_bias(self) -> None:
        """Attach what is learned on top of the float bias, one number per output channel; zero to begin with."""
        weight = self.weight_quantizer
        if weight is not None:
            self.shift = nn.Parameter(weight.scale.new_zeros(weight.channels))

    def bias(self, given: Tensor | None) -> Tensor | None:
        """The layer's own bias and what was learned on top of it, (C,)."""
        if self.shift is None:
            return given
        return self.shift if given is None else given + self.shift

    @property
    def layer(self) -> nn.Conv2d | nn.Linear:
        """What it is in float; a product of activations has no layer."""
        raise TypeError(f"{self.name} has no weight")

    @property
    def input_quantizers(self) -> list[ActivationQuantizer]:
        return cast(list[ActivationQuantizer], list(self.inputs))

    @property
    def quantizers(self) -> list[ActivationQuantizer]:
        """Those of the inputs in their order, and that of the output behind them."""
        return self.input_quantizers + ([] if self.output is None else [self.output])

    def parts(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """What each input quantizer sees of the operator's inputs."""
        return inputs

    def input_codes(self, index: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scale of an input; where weights alone are quantized, it and one."""
        if not self.inputs:
            return x, x.new_ones(())
        codes, scale = self.input_quantizers[index](x)
        return codes.to(self.compute), scale

    def written(self, y: Tensor) -> Tensor:
        """What the kernel's reader gets of the result."""
        if self.output is None:
            return y
        codes, scale = self.output(y)
        return codes * scale

    def weight_codes(self) -> tuple[Tensor, Tensor]:
        """Codes (C, ...) and scale (C,) in float32; where inputs have no codes, the weight itself and ones."""
        weight = cast(WeightQuantizer, self.weight_quantizer)
        if self.inputs:
            return weight().to(self.compute), weight.scale.flatten()
        return (weight() * weight.scale).reshape(self.layer.weight.shape), weight.scale.new_ones(weight.channels)


class QuantizedConv2d(QuantizedOperator):
    """A convolution; with `split`, the input's first channels and the others have a quantizer each.

    Raises:
        AccuQuantError: padding that is not zero, or a split whose parts would be written on grids of their own.
    """

    kind = "conv"

    def __init__(
        self,
        name: str,
        role: Role,
        conv: nn.Conv2d,
        weight: Grid,
        activation: Grid | None,
        split: int | None = None,
        output: Grid | None = None,
    ) -> None:
        parts = 1 if split is None else 2
        super().__init__(name, role, [activation] * parts if activation else [], WeightQuantizer(conv.weight, weight))
        if conv.padding_mode != "zeros":
            raise AccuQuantError(
                f"layer {name} pads with padding_mode {conv.padding_mode!r}; only 'zeros' can be quantized, which stay "
                f"zero in codes: keep the layer in float (--in-float {name})"
            )
        if split is not None and output is not None:
            raise AccuQuantError(f"layer {name}: a split convolution cannot write 8 bits; leave --split out")
        self.conv = conv.requires_grad_(False)
        self.split = split
        self.output = None if output is None else ActivationQuantizer(output)

    @property
    def layer(self) -> nn.Conv2d | nn.Linear:
        return self.conv

    def parts(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        (x,) = inputs
        if self.smoothing is not None:
            x = x * self.smoothing.reciprocal()[:, None, None]
        return (x,) if self.split is None else (x[:, : self.split], x[:, self.split :])

    def forward(self, x: Tensor) -> Tensor:
        if not self.active:
            return cast(Tensor, self.conv(x))
        w_codes, w_scale = self.weight_codes()
        y, first = None, 0
        for index, part in enumerate(self.parts((x,))):
            codes, scale = self.input_codes(index, part)
            product = self.conv._conv_forward(codes, w_codes[:, first : first + codes.shape[1]], None).float()
            first += codes.shape[1]
            scaled = product * (scale * w_scale)[:, None, None]
            y = scaled if y is None else y + scaled
        assert y is not None
        bias = self.bias(self.conv.bias)
        if bias is not None and self.output is not None:
            bias = round_through(bias / (scale * w_scale)) * (scale * w_scale)
        return self.written(y if bias is None else y + bias[:, None, None])


class QuantizedLinear(QuantizedOperator):
    kind = "linear"

    def __init__(
        self,
        name: str,
        role: Role,
        linear: nn.Linear,
        weight: Grid,
        activation: Grid | None,
        block: int | None = None,
    ) -> None:
        quantizer = WeightQuantizer(linear.weight, weight, block)
        super().__init__(name, role, [] if activation is None else [activation], quantizer)
        self.linear = linear.requires_grad_(False)

    @property
    def layer(self) -> nn.Conv2d | nn.Linear:
        return self.linear

    def parts(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        return inputs if self.smoothing is None else (inputs[0] * self.smoothing.reciprocal(),)

    def forward(self, x: Tensor) -> Tensor:
        if not self.active:
            return cast(Tensor, self.linear(x))
        (x,) = self.parts((x,))
        (x_codes, x_scale), (w_codes, w_scale) = self.input_codes(0, x), self.weight_codes()
        y = F.linear(x_codes, w_codes).float() * (x_scale * w_scale)
        bias = self.bias(self.linear.bias)
        return y if bias is None else y + bias


class QuantizedMatMul(QuantizedOperator):
    kind = "matmul"

    def __init__(self, name: str, role: Role, left: Grid, right: Grid) -> None:
        super().__init__(name, role, [left, right])

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        if not self.active:
            return torch.matmul(a, b)
        (a_codes, a_scale), (b_codes, b_scale) = self.input_codes(0, a), self.input_codes(1, b)
        return torch.matmul(a_codes, b_codes).float() * (a_scale * b_scale)


def quantize_operators(
    network: nn.Module, scheme: QuantScheme, role_of: Callable[[str], Role], splits: Mapping[str, int] | None = None
) -> dict[str, QuantizedOperator]:
    """Replace Conv2d, Linear and MatMul in `network` by their quantized forms, and return these by name.

    Those whose role the scheme's policy keeps in float, or that a pattern of the scheme matches, stay what they are, of
    whatever kind.

    `splits` names the convolutions that are quantized in two parts, and the channels of the first (splits.py).

    Raises:
        AccuQuantError: the network holds no such operator, one to be quantized of a kind that has no quantized form, or
            none that one of the scheme's patterns matches.
    """
    made: dict[str, QuantizedOperator] = {}
    names: list[str] = []
    used: set[str] = set()
    for name, module in list(network.named_modules()):
        if not isinstance(module, QUANTIZABLE + UNQUANTIZABLE):
            continue
        names.append(name)
        role, patterns = role_of(name), scheme.left_out(name)
        used |= set(patterns)
        if patterns or scheme.stays_float(role):
            continue
        if isinstance(module, UNQUANTIZABLE):
            raise AccuQuantError(
                f"layer {name} is a {type(module).__name__}, which has no quantized form; Conv2d, Linear and products "
                f"of attention have one: keep the layer in float (--in-float {name})"
            )
        if isinstance(module, nn.Conv2d):
            made[name] = QuantizedConv2d(
                name,
                role,
                module,
                scheme.weight_grid(role),
                scheme.activation_grid(role, "conv"),
                (splits or {}).get(name),
                scheme.output_grid("conv"),
            )
        elif isinstance(module, nn.Linear):
            made[name] = QuantizedLinear(
                name,
                role,
                module,
                scheme.weight_grid(role),
                scheme.activation_grid(role, "linear"),
                scheme.weight_block(module.in_features),
            )
        elif isinstance(module, MatMul):
            grid = scheme.activation_grid(role, "matmul")
            if grid is not None:
                made[name] = QuantizedMatMul(name, role, grid, grid)
    if unused := [pattern for pattern in scheme.in_float if pattern not in used]:
        raise AccuQuantError(
            f"layer {unused[0]} is to stay in float, and no layer of the network has that name "
            f"({near(unused[0], names)}); a * stands for any part of a name (--in-float 'mid.*')"
        )
    if not made and not scheme.nothing_quantized:
        raise AccuQuantError(
            f"the network has no convolution, linear layer or attention product to quantize: of {len(names)} none is "
            f"left by policy {scheme.described}; choose another --policy, or export with --bits fp16 --target tensorrt"
        )
    for name, operator in made.items():
        parent, _, leaf = name.rpartition(".")
        setattr(network.get_submodule(parent), leaf, operator)
    return made


@contextmanager
def quantization(
    operators: dict[str, QuantizedOperator], active: bool, compute: torch.dtype = torch.float32
) -> Iterator[None]:
    """Switch quantization on or off for the block, multiplying in `compute`; then back to what it was."""
    before = {name: (operator.active, operator.compute) for name, operator in operators.items()}
    for operator in operators.values():
        operator.active, operator.compute = active, compute
    try:
        yield
    finally:
        for name, operator in operators.items():
            operator.active, operator.compute = before[name]


def fast_compute(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it natively, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
