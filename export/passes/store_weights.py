"""Replace float weights by the recipe's integers and a DequantizeLinear.

    w (C, ...) float   ->   codes (C, ...) int4 | int8  --DequantizeLinear(scale (C,), axis)-->  w

Requires: every weighted operator of the recipe is a node of that name with a constant weight.
Ensures: its weight input is a DequantizeLinear over stored integers, one scale per output channel; the bias is float
and untouched. Weights of up to 4 bits are stored as 4 bits where the recipe's container says so.
"""

import ml_dtypes
import onnx_ir as ir

from ...calibrate.recipe import Recipe
from ...runtime.errors import AccuQuantError
from ..graph import operator_nodes
from .insertion import constant, drop_unused, insert_before


def store_weights(model: ir.Model, recipe: Recipe) -> int:
    """Rewrite in place; returns how many weights were stored.

    Raises:
        AccuQuantError: a layer of the recipe is not in the graph, or its shape differs.
    """
    nodes = operator_nodes(model)
    for name, codes in recipe.codes.items():
        node = nodes.get(name)
        if node is None:
            raise AccuQuantError(f"layer {name} of the recipe is not in the graph; recipe and checkpoint do not fit")
        weight = node.inputs[1]
        if weight is None or weight.const_value is None:
            raise AccuQuantError(f"layer {name}: its weight is not a constant of the graph")
        integers = codes.numpy()
        transposed = node.op_type == "MatMul"  # x @ w: the exporter stores (in, out)
        if transposed:
            integers = integers.T
        if tuple(weight.const_value.shape) != integers.shape:
            raise AccuQuantError(
                f"layer {name}: the recipe's weight is {integers.shape}, the graph's {tuple(weight.const_value.shape)}"
            )
        stored = integers.astype(ml_dtypes.int4) if recipe.container(name) == "int4" else integers
        packed = constant(model, f"{name}.weight.codes", stored)
        scale = constant(model, f"{name}.weight.scale", recipe.scales[name].numpy())
        value = insert_before(
            model, node, "DequantizeLinear", [packed, scale], f"{name}.weight.dequantize", axis=1 if transposed else 0
        )
        node.replace_input_with(1, value)
        drop_unused(model, weight)
    return len(recipe.codes)
