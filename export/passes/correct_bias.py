"""Add what calibration learned on top of a layer's bias.

    y = w * x + b   ->   y = w * x + (b + d)

Conv and Gemm carry their bias, a constant that is replaced (or made). A MatMul has none; an Add of d follows it, which
compilers fold into the Add of b behind.

Requires: every layer of recipe.shifts is a node of that name. Ensures: the float bias seen by the operator is b + d.
"""

import numpy as np
import onnx_ir as ir

from ...calibrate.recipe import Recipe
from ...runtime.errors import AccuQuantError
from ..graph import operator_node, operator_nodes
from .insertion import constant, drop_unused, insert_behind, read_instead


def correct_bias(model: ir.Model, recipe: Recipe) -> int:
    """Rewrite in place; returns how many layers were corrected.

    Raises:
        AccuQuantError: a layer of the recipe is not in the graph, or its bias is no constant.
    """
    nodes = operator_nodes(model)
    for name, shift in recipe.shifts.items():
        node = operator_node(nodes, name)
        learned = shift.numpy()
        if node.op_type == "MatMul":
            _add_behind(model, node, constant(model, f"{name}.bias.learned", learned))
            continue
        old = node.inputs[2] if len(node.inputs) > 2 else None
        if old is not None:
            if old.const_value is None:
                raise AccuQuantError(
                    f"layer {name}: its bias is computed in the graph, a constant is expected; calibrate without "
                    "learned biases (--set bias_rate=0)"
                )
            learned = old.const_value.numpy() + learned
        else:
            node.resize_inputs(3)
        node.replace_input_with(2, constant(model, f"{name}.bias.corrected", learned.astype(np.float32)))
        drop_unused(model, old)
    return len(recipe.shifts)


def _add_behind(model: ir.Model, node: ir.Node, value: ir.Value) -> None:
    readers = list(node.outputs[0].uses())
    added = insert_behind(model, node, "Add", [node.outputs[0], value], f"{node.name}.bias.add")
    read_instead(model, node.outputs[0], added, readers)
