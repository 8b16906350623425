"""What is quantized to how many bits, on which grid: data, not code.

The bits come from the user (`--bits 4/8`), the grid from the target's hardware, the exceptions from a layer policy over
roles that the family assigns ("first", "last", "time", "body", "attention").
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..runtime.errors import AccuQuantError
from .grid import Grid

Role = Literal["first", "last", "time", "body", "attention"]
OperatorKind = Literal["conv", "linear", "matmul"]
TargetName = Literal["cpu", "onnxruntime", "tensorrt"]
PolicyName = Literal["standard", "integer", "uniform"]
ContainerName = Literal["packed", "int8"]
GraphRest = Literal["float32", "float16"]

SIGNED_8 = Grid(8, signed=True, symmetric=True)


@dataclass(frozen=True)
class Target:
    """The grids a target's integer kernels take; weights are always signed, symmetric, one scale per output channel."""

    activation_signed: bool
    activation_symmetric: bool
    describes: str
    conv_output: bool = False  # integer convolutions write 8 bits too


# CPU kernels (VNNI) take unsigned, shifted activations at no cost, which is worth 3-4 dB after SiLU; between two
# activations (attention) they want signed ones. ONNX Runtime's integer convolution writes 8 bits as well as it reads
# them. TensorRT takes symmetric int8 and nothing else.
TARGETS: Mapping[TargetName, Target] = {
    "cpu": Target(False, False, "OpenVINO on CPU: uint8 activations with zero point"),
    "onnxruntime": Target(False, False, "ONNX Runtime on CPU: uint8 into and out of convolutions", conv_output=True),
    "tensorrt": Target(True, True, "TensorRT and TensorRT-RTX: symmetric int8 activations"),
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

    weight_bits: int = Field(ge=2, le=8)
    activation_bits: int = Field(ge=2, le=8)
    target: TargetName = "cpu"
    policy: PolicyName = "standard"
    container: ContainerName = "packed"  # of weights of up to 4 bits: two in a byte, or one
    reserve: float = Field(0.1, ge=0, le=1)  # share of low-bit weights that keeps 8 bits; sensitivity.py
    split: bool = False  # a scale for each part of a concatenation that a convolution reads; splits.py
    rest: GraphRest = "float32"  # of the graph's nodes that are not integer, where a target takes types as they stand

    @model_validator(mode="after")
    def _rest_is_for_tensorrt(self) -> "QuantScheme":
        if self.rest != "float32" and self.target != "tensorrt":
            raise ValueError(
                f"rest {self.rest} is for target tensorrt; CPUs choose it on loading (accuquant-sample --rest)"
            )
        return self

    @property
    def name(self) -> str:
        return f"W{self.weight_bits}A{self.activation_bits}"

    @property
    def described(self) -> str:
        """The policy in words, with what is kept in 8 bits beside it."""
        kept = f", up to {self.reserve:.0%} of the weights in 8 bits" if self.reserve and self.weight_bits < 8 else ""
        return f"{self.policy} ({POLICIES[self.policy].describes}{kept})"

    def stays_float(self, role: Role) -> bool:
        return role in POLICIES[self.policy].in_float

    def weight_grid(self, role: Role) -> Grid:
        kept = role in POLICIES[self.policy].weights_in_8_bits
        return Grid(8 if kept else self.weight_bits, signed=True, symmetric=True)

    def activation_grid(self, role: Role, kind: OperatorKind) -> Grid:
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


def parse_bits(text: str) -> tuple[int, int]:
    """Weight and activation bits of "4/8", "W4A8", "8" or "4" (one number is the weights'; activations take 8).

    Raises:
        AccuQuantError: not of that form, or out of range.
    """
    cleaned = text.strip().lower().replace("w", "").replace("a", "/")
    parts = cleaned.split("/")
    if len(parts) > 2 or not all(p.isdecimal() for p in parts):
        raise AccuQuantError(f"--bits {text!r} is not understood; write weights/activations, such as 4/8 or 8/8, or 4")
    weight, activation = int(parts[0]), int(parts[1]) if len(parts) == 2 else 8
    for what, bits in (("weight", weight), ("activation", activation)):
        if not 2 <= bits <= 8:
            raise AccuQuantError(f"--bits {text!r}: {bits}-bit {what}s; integer kernels take 2 to 8 bits")
    return weight, activation
