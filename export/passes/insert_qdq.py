"""Put QuantizeLinear / DequantizeLinear on the activation inputs of the recipe's operators, and nowhere else.

    x -> QuantizeLinear(s, z) -> DequantizeLinear(s, z) -> operator

Inputs of Conv, Gemm and MatMul only: TensorRT and OpenVINO fuse exactly this form into integer kernels, and quantizing
sums or concatenations costs quality and wins nothing. Operators that read one tensor with equal parameters share one
pair.

Requires: nodes named as in the recipe, which has no tables of scales any more (step_table).
Ensures: every activation input of those nodes is a DequantizeLinear whose scale is a rank-0 float32 constant.
"""

import ml_dtypes
import numpy as np
import onnx_ir as ir

from ...calibrate.recipe import ActivationRecipe, Recipe
from ...runtime.errors import AccuQuantError
from ..graph import operator_node, operator_nodes
from .insertion import constant, insert_before


def insert_qdq(model: ir.Model, recipe: Recipe) -> int:
    """Rewrite in place; returns how many Q/DQ pairs were made.

    Raises:
        AccuQuantError: a layer of the recipe is not in the graph, has fewer inputs there, or a table of scales.
    """
    nodes = operator_nodes(model)
    for name in recipe.facts.operators:
        operator_node(nodes, name)
    made: dict[tuple[int, ActivationRecipe], ir.Value] = {}
    # In the graph's order: a pair that several share stands before the first of them.
    for name, node in [(str(node.name), node) for node in model.graph if node.name in recipe.facts.operators]:
        operator = recipe.facts.operators[name]
        for index, facts in enumerate(operator.inputs):
            x = node.inputs[index] if index < len(node.inputs) else None
            if x is None:
                raise AccuQuantError(
                    f"layer {name}: the recipe has {len(operator.inputs)} inputs, its {node.op_type} has no input "
                    f"{index}; convolutions in two parts are taken apart before: run split_shortcuts first"
                )
            if facts.rows:
                raise AccuQuantError(
                    f"layer {name}, input {index}: has {len(facts.rows)} scales, QuantizeLinear takes one; run "
                    "step_table first and insert by the recipe that it returns"
                )
            key = (id(x), facts)
            if key not in made:
                made[key] = _pair(model, node, x, f"{name}.input{index}", facts)
            node.replace_input_with(index, made[key])
    return len(made)


def _pair(model: ir.Model, before: ir.Node, x: ir.Value, name: str, facts: ActivationRecipe) -> ir.Value:
    integer = np.int8 if facts.signed else np.uint8
    container = ml_dtypes.float8_e4m3fn if facts.number == "float8" else integer
    scale = constant(model, f"{name}.scale", np.float32(facts.scale))
    zero = constant(model, f"{name}.zero_point", container(facts.zero_point))
    codes = insert_before(model, before, "QuantizeLinear", [x, scale, zero], f"{name}.quantize")
    return insert_before(model, before, "DequantizeLinear", [codes, scale, zero], f"{name}.dequantize")
