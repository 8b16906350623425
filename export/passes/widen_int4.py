"""Widen 4-bit weights to int8 when the graph is loaded, for engines that have kernels for nothing smaller.

    codes int4 --Cast--> codes int8 --DequantizeLinear(s)--> operator

The file keeps 4 bits. ONNX Runtime folds the Cast of a constant before it looks for integer kernels, and finds int8
weights; left at 4 bits they would be dequantized at every step and multiplied in float.

Requires: store_weights has run, and this rewrite has not.
Ensures: every int4 weight reaches its DequantizeLinear as int8.
"""

import onnx_ir as ir

from ...calibrate.recipe import Recipe
from ..graph import operator_nodes
from .insertion import insert_before
from .store_weights import stored_weight


def widen_int4(model: ir.Model, recipe: Recipe) -> int:
    """Rewrite in place; returns how many weights were widened.

    Raises:
        AccuQuantError: a layer of 4-bit weights is not in the graph, or its weight is not stored as 4 bits there.
    """
    nodes = operator_nodes(model)
    packed = [name for name in recipe.codes if recipe.container(name) == "int4"]
    for name in packed:
        dequantize = stored_weight(nodes, name)
        wide = insert_before(
            model, dequantize, "Cast", [dequantize.inputs[0]], f"{name}.weight.widened", to=int(ir.DataType.INT8)
        )
        dequantize.replace_input_with(0, wide)
    return len(packed)
