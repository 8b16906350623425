"""A convolution to few channels as one of single positions, and a choice of their neighbours.

With kernel positions p of k x k, weights w (O, C, k, k) and few O, such as the last one of every denoiser:

    y_o[i] = sum_p sum_c w_oc[p] x_c[i + p] + b_o      k k products of C x O
           = sum_p m_op[i + p] + b_o,                  m_op = sum_c w_oc[p] x_c: one product of C x (k k O)

The second sum is a convolution too, whose weights are 0 and 1. Kernels multiply whole vectors of channels, 16 of them
with AVX-512, so that one of O = 1 is multiplied as often as one of 16, k k times; put beside each other, the k k O
columns fill the vectors.

Requires: quantizers have been inserted, so that only layers in float have constants for weights.
Ensures: equal up to the order of float32 sums. The first part has the layer's name, the second `<name>/positions`.
"""

import numpy as np
import onnx_ir as ir

from .insertion import constant, drop_unused

LANES = 16  # channels that kernels multiply at once
GAIN = 1.25  # that multiplications must fall by: the values in between are written and read


def narrow_convolutions(model: ir.Model) -> int:
    """Rewrite in place; returns how many were rewritten."""
    found = [node for node in model.graph if node.op_type == "Conv" and _pays(node)]
    for node in found:
        _rewrite(model, node)
    return len(found)


def _pays(node: ir.Node) -> bool:
    weight = node.inputs[1].const_value if node.inputs[1] is not None else None
    if weight is None or len(weight.shape) != 4 or not _is_plain(node):
        return False
    outputs, channels, height, width = weight.shape.numpy()
    positions = height * width
    together = _lanes(positions * outputs) * channels + positions * positions * outputs * _lanes(outputs)
    return positions > 1 and positions * channels * _lanes(outputs) > GAIN * together


def _lanes(channels: int) -> int:
    return -(-channels // LANES) * LANES


def _is_plain(node: ir.Node) -> bool:
    """Are strides and dilation 1, is there one group, and is the padding spelled out?"""
    steps = [*node.attributes.get_ints("strides", ()), *node.attributes.get_ints("dilations", ())]
    padded = node.attributes.get_string("auto_pad", "NOTSET")
    return set(steps) <= {1} and node.attributes.get_int("group", 1) == 1 and padded == "NOTSET"


def _rewrite(model: ir.Model, node: ir.Node) -> None:
    weight = node.inputs[1]
    assert weight is not None
    assert weight.const_value is not None
    w = weight.const_value.numpy()
    outputs, channels, height, width = w.shape
    positions = height * width
    columns = np.moveaxis(w, 1, 3).reshape(outputs * positions, channels, 1, 1)
    chosen = np.zeros((outputs, outputs, positions, height, width), w.dtype)
    for p in range(positions):
        chosen[np.arange(outputs), np.arange(outputs), p, p // width, p % width] = 1
    at_positions = ir.Node(
        "", "Conv", [node.inputs[0], constant(model, f"{node.name}.weight.columns", columns)], name=node.name
    )
    between, x = at_positions.outputs[0], node.inputs[0]
    between.name = f"{node.name}.columns"
    if x is not None and x.shape is not None:
        between.type, between.shape = x.type, ir.Shape([x.shape[0], outputs * positions, *x.shape[2:]])
    model.graph.insert_before(node, at_positions)
    node.name = f"{node.name}/positions"
    node.replace_input_with(0, between)
    spread = chosen.reshape(outputs, outputs * positions, height, width)
    node.replace_input_with(1, constant(model, f"{node.name}.weight", spread))
    drop_unused(model, weight)
