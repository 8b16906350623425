"""Keep activations of fewer than 8 bits on their grid, since the containers of codes have no fewer than 8.

    x -> QuantizeLinear(s, z)   ->   x -> Clip((q_min - z) s, (q_max - z) s) -> QuantizeLinear(s, z)

A Clip in front is a part of the kernel that quantizes, so it costs nothing.

Requires: insert_qdq has run.
Ensures: every such QuantizeLinear reads a Clip to its grid's ends; those of 8 bits, which saturate, are as they were.
"""

import numpy as np
import onnx_ir as ir

from ...calibrate.recipe import ActivationRecipe, Recipe
from ...runtime.errors import AccuQuantError
from ..graph import operator_node, operator_nodes
from .insertion import constant, insert_before


def clip_activations(model: ir.Model, recipe: Recipe) -> int:
    """Rewrite in place; returns how many Clip were made.

    Raises:
        AccuQuantError: a layer of the recipe is not in the graph, or an input of it has no QuantizeLinear.
    """
    nodes = operator_nodes(model)
    clipped: dict[ir.Node, None] = {}  # operators that read one tensor on one grid share its pair
    for name, operator in recipe.facts.operators.items():
        for index, facts in enumerate(operator.inputs):
            if facts.bits >= 8:
                continue
            quantize = _quantizer(operator_node(nodes, name), index)
            if quantize not in clipped:
                _clip(model, quantize, facts)
                clipped[quantize] = None
    return len(clipped)


def _quantizer(node: ir.Node, index: int) -> ir.Node:
    """Of the pair in front of an operator's input."""
    value = node.inputs[index]
    dequantize = value.producer() if value is not None else None
    codes = dequantize.inputs[0] if dequantize is not None and dequantize.op_type == "DequantizeLinear" else None
    quantize = codes.producer() if codes is not None else None
    if quantize is None or quantize.op_type != "QuantizeLinear":
        came = "a constant or graph input" if dequantize is None else f"{dequantize.op_type} {dequantize.name}"
        raise AccuQuantError(
            f"layer {node.name}, input {index}: comes from {came}; a QuantizeLinear and a DequantizeLinear are "
            "expected before it: run insert_qdq first"
        )
    return quantize


def _clip(model: ir.Model, quantize: ir.Node, facts: ActivationRecipe) -> None:
    low = -(1 << (facts.bits - 1)) if facts.signed else 0
    high = low + (1 << facts.bits) - 1
    name = str(quantize.name).removesuffix(".quantize")
    bounds = [
        constant(model, f"{name}.{end}", np.float32((code - facts.zero_point) * facts.scale))
        for end, code in (("low", low), ("high", high))
    ]
    clipped = insert_before(model, quantize, "Clip", [quantize.inputs[0], *bounds], f"{name}.clip")
    quantize.replace_input_with(0, clipped)
