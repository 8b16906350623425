"""The rules of a target: each looks at one place of a graph, and says what is broken there and how to mend it.

Compilers accept much that they then run in float, or run wrongly; these are the rules under which they do neither. The
TensorRT ones were measured on TensorRT-RTX 1.7, the CPU ones on OpenVINO 2026.4 and ONNX Runtime 1.32:

    scales      constants, finite and positive; an activation's is a rank-0 float32; a weight's one per output channel,
                or, where a linear layer's weight alone is quantized, one per block of its columns
    pairs       a QuantizeLinear has the scale, the zero point and the axis of the DequantizeLinear that reads it, and
                that zero point is a constant of 8 bits
    tensorrt    signed int8 with zero points of zero; float biases; int4 only through a requantization, and of even
                size; one type for all that an operator reads
    cpu         no signed 8-bit quantizer behind a Concat: OpenVINO 2026.4 loses the sign there
    onnxruntime a convolution writes 8 bits, linear layers are MatMul, weights reach DequantizeLinear as int8: all else
                is multiplied in float, after dequantizing the weights at every step
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ..calibrate.scheme import TargetName
from .operands import Operand, operand

ELEMENTWISE = frozenset({"Relu", "Mul", "Clip"})  # through which OpenVINO still sees the Concat
EIGHT_BITS = frozenset({ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.FLOAT8E4M3FN})
FOUR_BITS = frozenset({ir.DataType.INT4, ir.DataType.UINT4})


@dataclass(frozen=True)
class Violation:
    node: str
    rule: str
    repair: str

    def __str__(self) -> str:
        return f"{self.node}: {self.rule}; {self.repair}"


def _scales(place: Operand) -> Iterator[Violation]:
    """Of the DequantizeLinear and of all that stands before it."""
    yield from _scale(place, place.dequantize, place.where)
    for node in (place.quantize, place.requantized):
        if node is not None:
            yield from _scale(place, node, f"{place.where}, {node.op_type} {node.name}")


def _scale(place: Operand, node: ir.Node, where: str) -> Iterator[Violation]:
    scale = _constant(node, 1)
    if scale is None:
        yield Violation(where, "its scale is computed at run time", "make it a constant of the graph")
        return
    yield from _usable(scale, where)
    axis, channels = node.attributes.get("axis"), place.output_axis
    if "block_size" in node.attributes:
        if place.operator.op_type == "Conv" or axis is None or axis.as_int() == channels:
            yield Violation(where, "has a scale for each block", "keep blocks for the columns of linear layers")
    elif place.is_weight:
        if scale.ndim != 1 or axis is None or axis.as_int() != channels:
            rule = f"its weight has a scale of shape {scale.shape} along axis {axis and axis.as_int()}"
            yield Violation(where, rule, f"use one scale per output channel, axis {channels}")
    elif scale.ndim != 0 or scale.dtype != np.float32:
        rule = f"its scale is {scale.dtype} of shape {scale.shape}, with which it runs in float"
        yield Violation(where, rule, "use one float32 scalar")


def _usable(scale: np.ndarray, where: str) -> Iterator[Violation]:
    usable = np.isfinite(scale) & (scale > 0)
    if not usable.all():
        first = int(np.flatnonzero(~usable)[0])
        repair = "calibrate again, or leave that channel's scale at that of its neighbours"
        if scale.dtype != np.float32:
            repair = f"{scale.dtype} may not reach as far as it: export with --rest bfloat16 or float32"
        yield Violation(where, f"scale {first} of {scale.size} is {float(scale.flatten()[first]):g}", repair)


def _pairs(place: Operand) -> Iterator[Violation]:
    if place.quantize is not None:
        yield from _pair(place.quantize, place.dequantize, f"{place.where}, QuantizeLinear {place.quantize.name}")


def _pair(quantize: ir.Node, dequantize: ir.Node, where: str) -> Iterator[Violation]:
    """Codes must mean the same to who writes and who reads them."""
    zero = quantize.inputs[2] if len(quantize.inputs) > 2 else None
    if zero is not None and (zero.const_value is None or zero.dtype not in EIGHT_BITS):
        found = "computed at run time" if zero.const_value is None else str(zero.dtype)
        yield Violation(where, f"its zero point is {found}", "make it a constant of int8, uint8 or float8")
        return
    for index, what in ((1, "scale"), (2, "zero point")):
        # Without a zero point it is zero.
        written, read = (_constant(node, index) for node in (quantize, dequantize))
        written, read = (np.zeros(()) if value is None else value.astype(np.float64) for value in (written, read))
        if (written.ndim and read.ndim and written.shape != read.shape) or np.any(written != read):
            rule = f"its {what} is {_told(written)}, and {_told(read)} where the codes are read"
            yield Violation(where, rule, f"give both the same {what}")
            return
    axes = [node.attributes.get_int("axis", 1) for node in (quantize, dequantize)]
    scale = _constant(quantize, 1)
    if scale is not None and scale.ndim and axes[0] != axes[1]:
        rule = f"its axis is {axes[0]}, and {axes[1]} where the codes are read"
        yield Violation(where, rule, "give both the same axis")


def _told(value: np.ndarray) -> str:
    return f"{float(value.flatten()[0]):g}" if value.size == 1 else f"one of {value.size} values"


def _symmetric_int8(place: Operand) -> Iterator[Violation]:
    for node in (place.dequantize, place.quantize):
        if node is None:
            continue
        where = place.where if node is place.dequantize else f"{place.where}, QuantizeLinear {node.name}"
        zero = _constant(node, 2)
        if zero is None and node is place.quantize and node.attributes.get_int("output_dtype", 0) == 0:
            yield Violation(where, "has no zero point, which makes it uint8", "give it an int8 zero point of 0")
        elif zero is not None and zero.dtype == np.uint8:
            yield Violation(where, "is uint8, which saturates at 127 there", "calibrate for tensorrt")
        elif zero is not None and np.any(zero.astype(np.int64)):
            yield Violation(where, "has a zero point that is not zero", "calibrate for tensorrt")


def _int4_in_two_steps(place: Operand) -> Iterator[Violation]:
    codes = place.codes.const_value
    both = operand(place.operator, 0) is not None
    if both and codes is not None and codes.dtype in FOUR_BITS:
        yield Violation(place.where, "feeds int4 straight into the operator", "requantize it to int8 (s / 16)")
    outer = place.requantized
    packed = outer.inputs[0].const_value if outer is not None and outer.inputs[0] is not None else codes
    if packed is not None and packed.dtype in FOUR_BITS and packed.size % 2:
        yield Violation(place.where, f"is an int4 tensor of {packed.size} elements", "store odd sizes as int8")


def _no_sign_behind_concat(place: Operand) -> Iterator[Violation]:
    quantize = place.quantize
    if quantize is None or len(quantize.inputs) < 3 or quantize.inputs[2] is None:
        return
    zero = quantize.inputs[2].const_value
    value = quantize.inputs[0]
    producer = value.producer() if value is not None else None
    while producer is not None and producer.op_type in ELEMENTWISE:
        value = producer.inputs[0]
        producer = value.producer() if value is not None else None
    signed = zero is not None and zero.dtype == ir.DataType.INT8
    if signed and producer is not None and producer.op_type == "Concat" and place.operator.op_type == "Conv":
        yield Violation(place.where, f"is signed and reads {producer.name}", "use uint8 with zero point 128")


def _weights_as_int8(place: Operand) -> Iterator[Violation]:
    codes = place.codes.const_value
    if codes is not None and codes.dtype in FOUR_BITS:
        yield Violation(place.where, "feeds int4 straight into DequantizeLinear", "cast it to int8 before")


def _linear_is_matmul(node: ir.Node) -> Iterator[Violation]:
    if node.op_type == "Gemm":
        yield Violation(node.name or "?", "is a Gemm, which is multiplied in float there", "use MatMul and Add")


def _conv_writes_8_bits(node: ir.Node) -> Iterator[Violation]:
    if node.op_type != "Conv":
        return
    readers = [usage.node for usage in node.outputs[0].uses()]
    kinds = {reader.op_type for reader in readers}
    if kinds != {"QuantizeLinear"}:
        read = ", ".join(sorted(kinds)) or "the graph's output"
        yield Violation(node.name or "?", f"writes floats for {read}", "put one QuantizeLinear directly behind it")
        return
    for quantize in readers:
        where, scale = f"{node.name}, QuantizeLinear {quantize.name}", _constant(quantize, 1)
        if scale is None or scale.ndim or scale.dtype != np.float32:
            found = "computed at run time" if scale is None else f"{scale.dtype} of shape {scale.shape}"
            yield Violation(where, f"its scale is {found}", "use one float32 scalar")
            continue
        if unusable := list(_usable(scale, where)):
            yield from unusable
            continue
        for reader in (usage.node for usage in quantize.outputs[0].uses()):
            if reader.op_type == "DequantizeLinear":
                yield from _pair(quantize, reader, where)


def _float_bias(node: ir.Node) -> Iterator[Violation]:
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    producer = bias.producer() if bias is not None else None
    if producer is not None and producer.op_type == "DequantizeLinear":
        yield Violation(node.name or "?", "has a quantized bias", "keep biases float")


def _one_type(node: ir.Node) -> Iterator[Violation]:
    """What an operator reads; strongly typed compilers take it as it stands or not at all."""
    places = [place for index in (0, 1) if (place := operand(node, index)) is not None]
    types = [_written_type(place.dequantize) for place in places]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    types += [bias.dtype] if bias is not None and bias.const_value is not None else []
    known = [dtype for dtype in types if dtype is not None]
    if len(set(known)) > 1:
        found = " and ".join(dict.fromkeys(dtype.name.lower() for dtype in known))
        yield Violation(node.name or "?", f"reads {found}", "give all it reads one type, as cast_rest does")


def _written_type(dequantize: ir.Node) -> ir.DataType | None:
    said = dequantize.attributes.get_int("output_dtype", 0)
    scale = dequantize.inputs[1]
    return ir.DataType(said) if said else scale.dtype if scale is not None else None


def _constant(node: ir.Node, index: int) -> np.ndarray | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    return None if value is None or value.const_value is None else value.const_value.numpy()


# Of an operand, in this order: the first that is broken is told, since others often follow from it.
RULES: Mapping[TargetName, tuple[Callable[[Operand], Iterator[Violation]], ...]] = {
    "tensorrt": (_scales, _symmetric_int8, _int4_in_two_steps, _pairs),
    "cpu": (_scales, _no_sign_behind_concat, _pairs),
    "onnxruntime": (_scales, _weights_as_int8, _pairs),
}

# Of an operator's node.
NODE_RULES: Mapping[TargetName, tuple[Callable[[ir.Node], Iterator[Violation]], ...]] = {
    "tensorrt": (_float_bias, _one_type),
    "cpu": (),
    "onnxruntime": (_linear_is_matmul, _conv_writes_8_bits),
}
