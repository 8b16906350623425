"""Does a lowered graph keep its target's rules? A lint that names the node, the rule and the repair.

Compilers accept much that they then run in float, or run wrongly; these are the rules under which they do neither. The
TensorRT ones were measured on TensorRT-RTX 1.7, the CPU ones on OpenVINO 2026.4 and ONNX Runtime 1.32:

    operands    both inputs of a quantized operator come from DequantizeLinear, through Reshape or Transpose at most
    scales      finite and positive; an activation's is a rank-0 float32 constant; a weight's one per output channel,
                or, where a linear layer's weight alone is quantized, one per block of its columns
    tensorrt    signed int8 with zero points of zero; float biases; int4 only through a requantization, and of even size
    cpu         no signed 8-bit quantizer behind a Concat: OpenVINO 2026.4 loses the sign there
    onnxruntime a convolution writes 8 bits, linear layers are MatMul, weights reach DequantizeLinear as int8: all else
                is multiplied in float, after dequantizing the weights at every step
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ..calibrate.scheme import TargetName
from ..runtime.errors import AccuQuantError
from .graph import operator_nodes

MOVES = frozenset({"Reshape", "Transpose"})  # what may stand between DequantizeLinear and an operator
ELEMENTWISE = frozenset({"Relu", "Mul", "Clip"})  # through which OpenVINO still sees the Concat
SHOWN = 3


@dataclass(frozen=True)
class Violation:
    node: str
    rule: str
    repair: str

    def __str__(self) -> str:
        return f"{self.node}: {self.rule}; {self.repair}"


@dataclass(frozen=True)
class Operand:
    """An input of a quantized operator: the DequantizeLinear it comes from, and what that one reads."""

    operator: ir.Node
    index: int
    dequantize: ir.Node

    @property
    def where(self) -> str:
        return f"{self.operator.name}, input {self.index}"

    @property
    def codes(self) -> ir.Value:
        value = self.dequantize.inputs[0]
        assert value is not None
        return value

    @property
    def is_weight(self) -> bool:
        return self.codes.const_value is not None or self.requantized is not None or self.widened

    @property
    def widened(self) -> bool:
        """Are its codes a constant of another type?"""
        cast = self.codes.producer()
        source = cast.inputs[0] if cast is not None and cast.op_type == "Cast" else None
        return source is not None and source.const_value is not None

    @property
    def requantized(self) -> ir.Node | None:
        """The int4 DequantizeLinear behind a requantization, if there is one."""
        quantize = self.codes.producer()
        source = quantize.inputs[0] if quantize is not None and quantize.op_type == "QuantizeLinear" else None
        outer = source.producer() if source is not None else None
        if outer is None or outer.op_type != "DequantizeLinear":
            return None
        stored = outer.inputs[0]
        return outer if stored is not None and stored.const_value is not None else None


Rule = Callable[[Operand], Iterator[Violation]]


def check_target(model: ir.Model, operators: Iterable[str], target: TargetName, *, weights_alone: bool = False) -> None:
    """Check every quantized operator of a lowered graph; of those whose `weights_alone` are quantized, the weights.

    Raises:
        AccuQuantError: rules are broken; the first few are named, with their repairs.
    """
    found = violations(model, operators, target, weights_alone=weights_alone)
    if found:
        more = f" (and {len(found) - SHOWN} more)" if len(found) > SHOWN else ""
        told = ". ".join(str(v) for v in found[:SHOWN])
        raise AccuQuantError(f"the graph breaks the rules of target {target}: {told}{more}")


def violations(
    model: ir.Model, operators: Iterable[str], target: TargetName, *, weights_alone: bool = False
) -> list[Violation]:
    """All broken rules, in the operators' order."""
    nodes = operator_nodes(model)
    found: list[Violation] = []
    for name in operators:
        node = nodes.get(name)
        if node is None:
            found.append(Violation(name, "no node of that name", "recipe and checkpoint do not fit"))
            continue
        for index in (1,) if weights_alone else (0, 1):
            operand = _operand(node, index)
            if isinstance(operand, Violation):
                found.append(operand)
            else:
                found += [v for rule in RULES[target] for v in rule(operand)]
        found += [v for rule in NODE_RULES[target] for v in rule(node)]
    return found


def _operand(node: ir.Node, index: int) -> Operand | Violation:
    value = node.inputs[index]
    producer = value.producer() if value is not None else None
    while producer is not None and producer.op_type in MOVES:
        value = producer.inputs[0]
        producer = value.producer() if value is not None else None
    if producer is None or producer.op_type != "DequantizeLinear":
        came = "a constant or graph input" if producer is None else f"{producer.op_type} {producer.name}"
        rule = f"comes from {came}, not from DequantizeLinear"
        return Violation(f"{node.name}, input {index}", rule, "put Q/DQ directly before the operator")
    return Operand(node, index, producer)


def _scales(operand: Operand) -> Iterator[Violation]:
    value = operand.dequantize.inputs[1]
    constant = None if value is None else value.const_value
    if constant is None:
        yield Violation(operand.where, "its scale is computed at run time", "make it a constant of the graph")
        return
    scale = constant.numpy()
    if not np.all(np.isfinite(scale) & (scale > 0)):
        bad = int(np.flatnonzero(~(np.isfinite(scale) & (scale > 0)))[0])
        rule = f"scale {bad} of {scale.size} is {scale.flatten()[bad]:g}"
        yield Violation(operand.where, rule, "calibrate again, or leave that channel's scale at that of its neighbours")
    axis = operand.dequantize.attributes.get("axis")
    channels = _output_axis(operand.operator)
    if "block_size" in operand.dequantize.attributes:
        if operand.operator.op_type == "Conv" or axis is None or axis.as_int() == channels:
            yield Violation(operand.where, "has a scale for each block", "keep blocks for the columns of linear layers")
    elif operand.is_weight:
        if scale.ndim != 1 or axis is None or axis.as_int() != channels:
            rule = f"its weight has a scale of shape {scale.shape} along axis {axis and axis.as_int()}"
            yield Violation(operand.where, rule, f"use one scale per output channel, axis {channels}")
    elif scale.ndim != 0 or scale.dtype != np.float32:
        rule = f"its scale is {scale.dtype} of shape {scale.shape}, with which it runs in float"
        yield Violation(operand.where, rule, "use one float32 scalar")


def _symmetric_int8(operand: Operand) -> Iterator[Violation]:
    zero = operand.dequantize.inputs[2] if len(operand.dequantize.inputs) > 2 else None
    if zero is not None and zero.const_value is not None:
        values = zero.const_value.numpy()
        if values.dtype == np.uint8:
            yield Violation(operand.where, "is uint8, which saturates at 127 there", "calibrate for tensorrt")
        elif np.any(values.astype(np.int64)):
            yield Violation(operand.where, "has a zero point that is not zero", "calibrate for tensorrt")


def _int4_in_two_steps(operand: Operand) -> Iterator[Violation]:
    codes = operand.codes.const_value
    both = isinstance(_operand(operand.operator, 0), Operand)
    if both and codes is not None and codes.dtype in (ir.DataType.INT4, ir.DataType.UINT4):
        yield Violation(operand.where, "feeds int4 straight into the operator", "requantize it to int8 (s / 16)")
    outer = operand.requantized
    packed = outer.inputs[0].const_value if outer is not None and outer.inputs[0] is not None else None
    if packed is not None and packed.size % 2:
        yield Violation(operand.where, f"is an int4 tensor of {packed.size} elements", "store odd sizes as int8")


def _no_sign_behind_concat(operand: Operand) -> Iterator[Violation]:
    quantize = operand.codes.producer()
    if quantize is None or len(quantize.inputs) < 3 or quantize.inputs[2] is None:
        return
    zero = quantize.inputs[2].const_value
    value = quantize.inputs[0]
    producer = value.producer() if value is not None else None
    while producer is not None and producer.op_type in ELEMENTWISE:
        value = producer.inputs[0]
        producer = value.producer() if value is not None else None
    signed = zero is not None and zero.dtype == ir.DataType.INT8
    if signed and producer is not None and producer.op_type == "Concat" and operand.operator.op_type == "Conv":
        yield Violation(operand.where, f"is signed and reads {producer.name}", "use uint8 with zero point 128")


def _weights_as_int8(operand: Operand) -> Iterator[Violation]:
    codes = operand.codes.const_value
    if codes is not None and codes.dtype in (ir.DataType.INT4, ir.DataType.UINT4):
        yield Violation(operand.where, "feeds int4 straight into DequantizeLinear", "cast it to int8 before")


def _linear_is_matmul(node: ir.Node) -> Iterator[Violation]:
    if node.op_type == "Gemm":
        yield Violation(node.name or "?", "is a Gemm, which is multiplied in float there", "use MatMul and Add")


def _conv_writes_8_bits(node: ir.Node) -> Iterator[Violation]:
    readers = {usage.node.op_type for usage in node.outputs[0].uses()}
    if node.op_type == "Conv" and readers != {"QuantizeLinear"}:
        read = ", ".join(sorted(readers)) or "the graph's output"
        yield Violation(node.name or "?", f"writes floats for {read}", "put one QuantizeLinear directly behind it")


def _float_bias(node: ir.Node) -> Iterator[Violation]:
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    producer = bias.producer() if bias is not None else None
    if producer is not None and producer.op_type == "DequantizeLinear":
        yield Violation(node.name or "?", "has a quantized bias", "keep biases float")


def _output_axis(operator: ir.Node) -> int:
    """The axis of the weight along which output channels lie."""
    if operator.op_type == "MatMul":
        return 1
    if operator.op_type == "Gemm":
        transposed = operator.attributes.get("transB")
        return 0 if transposed is not None and transposed.as_int() else 1
    return 0


RULES: Mapping[TargetName, tuple[Rule, ...]] = {
    "tensorrt": (_scales, _symmetric_int8, _int4_in_two_steps),
    "cpu": (_scales, _no_sign_behind_concat),
    "onnxruntime": (_scales, _weights_as_int8),
}

NODE_RULES: Mapping[TargetName, tuple[Callable[[ir.Node], Iterator[Violation]], ...]] = {
    "tensorrt": (_float_bias,),
    "cpu": (),
    "onnxruntime": (_linear_is_matmul, _conv_writes_8_bits),
}
