"""Where a CPU's integer kernels would saturate, operators run in float.

Without VNNI, x86 kernels multiply 8-bit codes and add every two products in 16 bits, which end at 32767:

    255 * 127 + 255 * 127 = 64770        sums end there, and with them the layer
    255 *  64 + 255 *  64 = 32640        codes of 7 bits and fewer never get there

An operator of 8-bit weights, or of two activations, is then kept out of OpenVINO's fusion: it multiplies the same
dequantized codes in float, so that pictures are the same on every CPU and only the speed is not.
"""

from functools import cache
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13

OPERATORS = frozenset({"Convolution", "GroupConvolution", "MatMul"})
MOVES = frozenset({"Multiply", "Subtract", "Convert", "Reshape", "Transpose"})  # between codes and their operator
LARGEST = 64  # code that, twice with 255, stays within 16 bits
SATURATES = "products of two 8-bit codes saturate on this CPU (no VNNI), so they are made in float"


@cache
def saturates() -> bool:
    """Does this machine's integer convolution end at 16 bits? Found by running one: names of CPUs say little."""
    channels = 32
    x = opset13.parameter([1, channels, 4, 4], np.float32)
    codes = opset13.convert(opset13.constant(np.full((channels, channels, 1, 1), 127, np.int8)), "f32")
    weight = opset13.multiply(codes, opset13.constant(np.ones((channels, 1, 1, 1), np.float32)))
    ends = [np.float32(v) for v in (0, 255, 0, 255)]
    made = opset13.convolution(opset13.fake_quantize(x, *ends, 256), weight, [1, 1], [0, 0], [0, 0], [1, 1])
    compiled: Any = ov.Core().compile_model(ov.Model([made], [x]), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = compiled(np.full((1, channels, 4, 4), 255, np.float32))[0]
    return bool(found.min() < 0.99 * 255 * 127 * channels)


def keep_out(model: Any) -> list[str]:
    """Put operators whose products could saturate where OpenVINO does not fuse them; returns their names."""
    products = [node for node in model.get_ordered_ops() if node.get_type_name() in OPERATORS]
    dequantized = [(node, codes) for node in products if (codes := _second_codes(node)) is not None]
    if not dequantized or not saturates():  # before any weight is read
        return []
    found = [node for node, codes in dequantized if _largest(codes) > LARGEST]
    for node in found:
        leave_alone(node)
    # OpenVINO's reader calls a convolution that had a bias NAME/WithoutBiases.
    return [node.get_friendly_name().partition("/")[0] for node in found]


def leave_alone(node: Any) -> None:
    """Put a Maximum before its first input: it changes no value, and OpenVINO moves no quantization across it."""
    kind = node.get_input_element_type(0).to_dtype()
    between = opset13.maximum(node.input_value(0), opset13.constant(np.finfo(kind).min, kind))
    node.input(0).replace_source_output(between.output(0))


def _second_codes(node: Any) -> Any:
    """Where the second input's codes come from, if both inputs are dequantized."""
    first, second = (_codes(node.input_value(i).get_node()) for i in range(2))
    return None if first is None else second


def _largest(codes: Any) -> int:
    """The largest code there is, of a quantizer's the largest there may be."""
    if codes.get_type_name() != "Constant":
        return 255
    data = np.asarray(codes.data)
    return max(int(data.max()), -int(data.min()))


def _codes(node: Any) -> Any:
    """The 8-bit constant or the quantizer that an operator's input is dequantized from; None if there is none."""
    while node.get_type_name() in MOVES:
        node = node.input_value(0).get_node()
    kind = node.get_type_name()
    if kind == "Constant":
        return node if node.get_element_type() in (ov.Type.i8, ov.Type.u8) else None
    return node if kind == "FakeQuantize" else None
