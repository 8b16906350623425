"""Replace float weights by the recipe's integers and a DequantizeLinear.

    w (C, ...) float   ->   codes (C, ...) int4 | int8  --DequantizeLinear(scale (C,), axis)-->  w

Requires: every weighted operator of the recipe is a node of that name with a constant weight.
Ensures: its weight input is a DequantizeLinear over stored integers, one scale per output channel; the bias is float
and untouched. Weights of up to 4 bits are stored as 4 bits where the recipe's container says so.
"""

import ml_dtypes
import numpy as np
import onnx_ir as ir

from ...calibrate.recipe import Recipe
from ...runtime.errors import AccuQuantError
from ..graph import operator_nodes


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
        axis = 1 if transposed else 0
        dequantize = ir.Node(
            "",
            "DequantizeLinear",
            [
                _constant(model, f"{name}.weight.codes", stored),
                _constant(model, f"{name}.weight.scale", recipe.scales[name].numpy()),
            ],
            [ir.AttrInt64("axis", axis)],
            name=f"{name}.weight.dequantize",
        )
        model.graph.insert_before(node, dequantize)
        node.replace_input_with(1, dequantize.outputs[0])
        dequantize.outputs[0].name = f"{name}.weight.dequantized"
        if not weight.uses() and weight.name is not None and weight.name in model.graph.initializers:
            del model.graph.initializers[weight.name]
    return len(recipe.codes)


def _constant(model: ir.Model, name: str, value: np.ndarray) -> ir.Value:
    made = ir.val(name, const_value=ir.tensor(np.ascontiguousarray(value), name=name))
    model.graph.register_initializer(made)
    return made
