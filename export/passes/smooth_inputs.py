"""Divide input channels by what calibration moved into the weight.

    x -> operator   ->   x -> Mul(1 / m) -> operator

Before Q/DQ goes in, so that the divided values are what is quantized.

Requires: every layer of recipe.smoothings is a node of that name, with m over the input's channel axis.
Ensures: that node's first input is a Mul with a float constant.
"""

import onnx_ir as ir

from ...calibrate.recipe import Recipe
from ..graph import operator_node, operator_nodes
from .insertion import constant, insert_before


def smooth_inputs(model: ir.Model, recipe: Recipe) -> int:
    """Rewrite in place; returns how many inputs were divided.

    Raises:
        AccuQuantError: a layer of the recipe is not in the graph.
    """
    nodes = operator_nodes(model)
    for name, smoothing in recipe.smoothings.items():
        node = operator_node(nodes, name)
        factor = smoothing.reciprocal().numpy()
        if node.op_type == "Conv":
            factor = factor.reshape(1, -1, 1, 1)
        reciprocal = constant(model, f"{name}.smoothing", factor)
        divided = insert_before(model, node, "Mul", [node.inputs[0], reciprocal], f"{name}.smooth")
        node.replace_input_with(0, divided)
    return len(recipe.smoothings)
