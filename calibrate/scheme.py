"""What is quantized to how many bits, on which grid: data, not code.

The bits come from the user (`--bits 4/8`), the grid from the target's hardware, the exceptions from a layer policy over
roles that the family assigns ("first", "last", "time", "body", "attention").
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..runtime.errors import AccuQuantError
from .float8 import Float8
from .grid import Grid

Role = Literal["first", "last", "time", "body", "attention"]
OperatorKind = Literal["conv", "linear", "matmul"]
TargetName = Literal["cpu", "onnxruntime", "tensorrt"]
PolicyName = Literal["standard", "integer", "uniform"]
ContainerName = Literal["packed", "int8"]
GraphRest = Literal["float32", "float16", "bfloat16"]
Attention = Literal["auto", "float", "quantized"]
Number = Literal["integer", "float8"]

UNQUANTIZED = 16  # bits of activations that are left as they are: weights alone are quantized; or of weights too
BLOCKS = (64, 32, 16)  # columns that may share a scale where only a linear layer's weight is quantized


@dataclass(frozen=True)
class Target:
    """The grids a target's integer kernels take; weights are always signed, symmetric, one scale per output channel."""

    activation_signed: bool
    activation_symmetric: bool
    describes: str
    conv_output: bool = False  # integer convolutions write 8 bits too
    beyond_integers: bool = False  # 8-bit floats, weights alone, a rest of 16 bits
    fused_attention: bool = False  # one float kernel for both products and the softmax, which integers would break up


# CPU kernels (VNNI) take unsigned, shifted activations at no cost, which is worth 3-4 dB after SiLU; between two
# activations (attention) they want signed ones. ONNX Runtime's integer convolution writes 8 bits as well as it reads
# them. TensorRT takes symmetric int8 and nothing else.
TARGETS: Mapping[TargetName, Target] = {
    "cpu": Target(False, False, "OpenVINO on CPU: uint8 activations with zero point"),
    "onnxruntime": Target(False, False, "ONNX Runtime on CPU: uint8 into and out of convolutions", conv_output=True),
    "tensorrt": Target(
        True,
        True,
        "TensorRT and TensorRT-RTX: symmetric int8 activations",
        beyond_integers=True,
        fused_attention=True,
    ),
}


@dataclass(frozen=True)
class Policy:
    """Roles that stay in float, and roles whose weights or activations keep 8 bits whatever is asked."""

    in_float: frozenset[Role]
    weights_in_8_bits: frozenset[Role]
    activations_in_8_bits: frozenset[Role]
    describes: str


_ENDS: frozenset[Role] = frozenset({"first", "last"})
_TIME: frozenset[Role] = frozenset({"time"})

# The ends are a thousandth of the network's weights and work. Where noise is strong the output is nearly the input: 8
# bits of the latent are then 8 bits of the prediction, and at W8A8 most of what the whole network errs by.
POLICIES: Mapping[PolicyName, Policy] = {
    "standard": Policy(_ENDS, frozenset(), _TIME, "ends in float, the time embedding's activations in 8 bits"),
    "integer": Policy(frozenset(), _ENDS | _TIME, _ENDS | _TIME, "ends and time embedding in 8 bits"),
    "uniform": Policy(frozenset(), frozenset(), frozenset(), "the bits asked for, everywhere"),
}


class QuantScheme(BaseModel):
    """Bits, target and policy of one quantization; resolves to a grid for every operator and input."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight_bits: int = Field(ge=2, le=UNQUANTIZED)
    activation_bits: int = Field(ge=2, le=UNQUANTIZED)
    number: Number = "integer"
    target: TargetName = "cpu"
    policy: PolicyName = "standard"
    attention: Attention = "auto"  # its products; auto leaves them in float where the target fuses them so
    container: ContainerName = "packed"  # of weights of up to 4 bits: two in a byte, or one
    reserve: float = Field(0.1, ge=0, le=1)  # share of low-bit weights that keeps 8 bits; sensitivity.py
    split: bool = False  # a scale for each part of a concatenation that a convolution reads; splits.py
    in_float: tuple[str, ...] = ()  # patterns of operators that stay in float beside the policy's, as a shell's
    rest: GraphRest = "float32"  # of the graph's nodes that are not integer, where a target takes types as they stand

    @model_validator(mode="after")
    def _the_target_has_it(self) -> "QuantScheme":
        for what, bits in (("weights", self.weight_bits), ("activations", self.activation_bits)):
            if 8 < bits < UNQUANTIZED:
                raise ValueError(f"{bits}-bit {what}; 2 to 8 bits, or 16 for none quantized")
        if self.weight_bits == UNQUANTIZED and (self.activation_bits != UNQUANTIZED or self.rest == "float32"):
            raise ValueError("16-bit weights are for graphs of 16 bits throughout: --bits fp16 or bf16, for tensorrt")
        if self.number == "float8" and (self.weight_bits, self.activation_bits) != (8, 8):
            raise ValueError("8-bit floats are 8 bits, for weights and activations")
        if TARGETS[self.target].beyond_integers:
            return self
        if self.rest != "float32":
            raise ValueError(
                f"rest {self.rest} is for target tensorrt; CPUs choose it on loading (accuquant-sample --rest)"
            )
        if self.number == "float8" or self.activation_bits == UNQUANTIZED:
            raise ValueError(f"{self.name} is for --target tensorrt; {self.target} is {TARGETS[self.target].describes}")
        return self

    @property
    def name(self) -> str:
        if self.nothing_quantized:
            return "FP16" if self.rest == "float16" else "BF16"
        return "FP8" if self.number == "float8" else f"W{self.weight_bits}A{self.activation_bits}"

    @property
    def nothing_quantized(self) -> bool:
        return self.weight_bits == UNQUANTIZED

    @property
    def weights_alone(self) -> bool:
        return self.activation_bits == UNQUANTIZED

    @property
    def described(self) -> str:
        """The policy in words, with what is kept in 8 bits beside it."""
        if self.nothing_quantized:
            return f"{self.rest} throughout"
        kept = f", up to {self.reserve:.0%} of the weights in 8 bits" if self.reserve and self.weight_bits < 8 else ""
        attention = "" if self.attention_quantized else ", attention products in float"
        more = f", {len(self.in_float)} more operators in float" if self.in_float else ""
        if any(set(pattern) & set("*?[") for pattern in self.in_float):
            more = f", in float too {' '.join(self.in_float)}"
        return f"{self.policy} ({POLICIES[self.policy].describes}{attention}{kept}{more})"

    def stays_float(self, role: Role) -> bool:
        if role == "attention" and not self.attention_quantized:
            return True
        return self.nothing_quantized or role in POLICIES[self.policy].in_float

    def left_out(self, name: str) -> list[str]:
        """The patterns by which an operator of that name stays in float, whatever its role."""
        return [pattern for pattern in self.in_float if fnmatchcase(name, pattern)]

    @property
    def attention_quantized(self) -> bool:
        """TensorRT has a fused kernel for attention in 16 bits and in 8-bit floats, and none in integers."""
        if self.attention == "auto":
            return self.number == "float8" or not TARGETS[self.target].fused_attention
        return self.attention == "quantized"

    def weight_grid(self, role: Role) -> Grid:
        if self.number == "float8":
            return Float8()
        kept = role in POLICIES[self.policy].weights_in_8_bits
        return Grid(8 if kept else self.weight_bits, signed=True, symmetric=True)

    def weight_block(self, columns: int) -> int | None:
        """How many of a linear layer's columns share a scale; None gives each output channel one.

        A block of all columns would be dequantized by a kernel of its own.
        """
        return next((b for b in BLOCKS if columns % b == 0 and b < columns), None) if self.weights_alone else None

    def activation_grid(self, role: Role, kind: OperatorKind) -> Grid | None:
        """None where activations are not quantized."""
        if self.weights_alone:
            return None
        if self.number == "float8":
            return Float8()
        bits = 8 if role in POLICIES[self.policy].activations_in_8_bits else self.activation_bits
        if kind == "matmul":
            return Grid(bits, signed=True, symmetric=True)
        target = TARGETS[self.target]
        return Grid(bits, signed=target.activation_signed, symmetric=target.activation_symmetric)

    def output_grid(self, kind: OperatorKind) -> Grid | None:
        """The grid on which the target's kernel writes its result, if it does not write floats."""
        target = TARGETS[self.target]
        if kind != "conv" or not target.conv_output:
            return None
        return Grid(8, signed=target.activation_signed, symmetric=target.activation_symmetric)


def parse_precision(text: str) -> dict[str, Any]:
    """What `--bits` says, as fields of a scheme: "fp8", "fp16", "bf16", or bits as `parse_bits` reads them.

    Raises:
        AccuQuantError: not of that form, or out of range.
    """
    if text.strip().lower() in ("fp8", "float8"):
        return {"weight_bits": 8, "activation_bits": 8, "number": "float8"}
    for rest, short in (("float16", "fp16"), ("bfloat16", "bf16")):
        if text.strip().lower() in (rest, short):
            return {"weight_bits": UNQUANTIZED, "activation_bits": UNQUANTIZED, "rest": rest}
    weight_bits, activation_bits = parse_bits(text)
    return {"weight_bits": weight_bits, "activation_bits": activation_bits}


def parse_bits(text: str) -> tuple[int, int]:
    """Weight and activation bits of "4/8", "W4A8", "8" or "4" (one number is the weights'; activations take 8).

    Raises:
        AccuQuantError: not of that form, or out of range.
    """
    cleaned = text.strip().lower().replace("w", "").replace("a", "/")
    parts = cleaned.split("/")
    if len(parts) > 2 or not all(p.isdecimal() for p in parts):
        raise AccuQuantError(
            f"--bits {text!r} is not understood; write weights/activations, such as 4/8 or 8/8, or 4, fp8, fp16, bf16"
        )
    weight, activation = int(parts[0]), int(parts[1]) if len(parts) == 2 else 8
    for what, bits, more in (("weight", weight, ()), ("activation", activation, (UNQUANTIZED,))):
        if not 2 <= bits <= 8 and bits not in more:
            raise AccuQuantError(f"--bits {text!r}: {bits}-bit {what}s; integer kernels take 2 to 8 bits")
    return weight, activation
