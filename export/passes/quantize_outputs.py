"""Let an operator write 8 bits, on the grid that was calibrated for it.

    operator(b) -> readers   =>   operator(b') -> QuantizeLinear(s, z) -> DequantizeLinear(s, z) -> readers
    b' = s_a s_w round(b / (s_a s_w))

ONNX Runtime has no integer convolution that writes floats: only with both of its ends quantized does one become a
QLinearConv. That adds its bias before it scales, as an integer; on this grid nothing is rounded again.

Requires: the bias, a constant, and everything else that is the operator's own is inside its node; the recipe has one
scale for the operator's input and one per channel for its weight.
Ensures: every operator of the recipe with an output has its readers, and the graph's output, behind such a pair.
"""

import numpy as np
import onnx_ir as ir

from ...calibrate.recipe import Recipe
from ...runtime.errors import AccuQuantError
from ..graph import operator_node, operator_nodes
from .insertion import constant, drop_unused, insert_behind, read_instead


def quantize_outputs(model: ir.Model, recipe: Recipe) -> int:
    """Rewrite in place; returns how many operators write 8 bits now.

    Raises:
        AccuQuantError: such an operator is not in the graph, its bias is no constant, or the recipe lacks a scale that
            its sum is made of.
    """
    nodes = operator_nodes(model)
    written = {name: facts.output for name, facts in recipe.facts.operators.items() if facts.output is not None}
    for name, facts in written.items():
        node = operator_node(nodes, name)
        _bias_on_grid(model, node, _step(recipe, name))
        result = node.outputs[0]
        readers = list(result.uses())
        container = np.int8 if facts.signed else np.uint8
        scale = constant(model, f"{name}.output.scale", np.float32(facts.scale))
        zero = constant(model, f"{name}.output.zero_point", container(facts.zero_point))
        codes = insert_behind(model, node, "QuantizeLinear", [result, scale, zero], f"{name}.output.quantize")
        quantize = codes.producer()
        assert quantize is not None
        value = insert_behind(model, quantize, "DequantizeLinear", [codes, scale, zero], f"{name}.output.dequantize")
        value.shape, value.type = result.shape, result.type
        read_instead(model, result, value, readers)
    return len(written)


def _step(recipe: Recipe, name: str) -> np.ndarray:
    """s_a s_w, (C,)."""
    inputs, weight = recipe.facts.operators[name].inputs, recipe.scales.get(name)
    if len(inputs) != 1 or inputs[0].rows or weight is None:
        scales = f"{sum(len(i.rows) or 1 for i in inputs)} of its input and {'none' if weight is None else 'one'}"
        raise AccuQuantError(
            f"layer {name} is to write 8 bits, and the recipe has {scales} of its weight; one scale each is expected: "
            "calibrate for this target, without --split and with one set (table = 1)"
        )
    return np.float32(inputs[0].scale) * weight.numpy()


def _bias_on_grid(model: ir.Model, node: ir.Node, step: np.ndarray) -> None:
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None:
        return
    if bias.const_value is None:
        raise AccuQuantError(
            f"layer {node.name}: its bias is computed in the graph, a constant is expected, to go on the sum's grid; "
            f"keep the layer in float (--in-float {node.name})"
        )
    rounded = np.round(bias.const_value.numpy() / step) * step
    node.replace_input_with(2, constant(model, f"{node.name}.bias.on_grid", rounded.astype(np.float32)))
    drop_unused(model, bias)
