"""Put QuantizeLinear / DequantizeLinear on the activation inputs of the recipe's operators, and nowhere else.

    x -> [Clip] -> QuantizeLinear(s, z) -> DequantizeLinear(s, z) -> operator

Inputs of Conv, Gemm and MatMul only: TensorRT and OpenVINO fuse exactly this form into integer kernels, and quantizing
sums or concatenations costs quality and wins nothing. A grid of fewer than 8 bits lives in an 8-bit container, so a
Clip keeps the codes on it. Operators that read one tensor with equal parameters share one pair.

Requires: nodes named as in the recipe. Ensures: every activation input of those nodes is a DequantizeLinear whose
scale is a rank-0 float32 constant.
"""

import ml_dtypes
import numpy as np
import onnx_ir as ir

from ...calibrate.recipe import ActivationRecipe, Recipe
from ...runtime.errors import AccuQuantError
from ..graph import operator_nodes
from .insertion import constant, insert_before


def insert_qdq(model: ir.Model, recipe: Recipe) -> int:
    """Rewrite in place; returns how many Q/DQ pairs were made.

    Raises:
        AccuQuantError: a layer of the recipe is not in the graph.
    """
    nodes = operator_nodes(model)
    for name in recipe.facts.operators:
        if name not in nodes:
            raise AccuQuantError(f"layer {name} of the recipe is not in the graph; recipe and checkpoint do not fit")
    made: dict[tuple[int, ActivationRecipe], ir.Value] = {}
    # In the graph's order: a pair that several share stands before the first of them.
    for name, node in [(str(node.name), node) for node in model.graph if node.name in recipe.facts.operators]:
        operator = recipe.facts.operators[name]
        for index, facts in enumerate(operator.inputs):
            x = node.inputs[index]
            assert x is not None
            assert not facts.rows, "step_table has not run"
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
    if facts.bits < 8:
        low = -(1 << (facts.bits - 1)) if facts.signed else 0
        high = low + (1 << facts.bits) - 1
        bounds = [
            constant(model, f"{name}.{end}", np.float32((code - facts.zero_point) * facts.scale))
            for end, code in (("low", low), ("high", high))
        ]
        x = insert_before(model, before, "Clip", [x, *bounds], f"{name}.clip")
    codes = insert_before(model, before, "QuantizeLinear", [x, scale, zero], f"{name}.quantize")
    return insert_before(model, before, "DequantizeLinear", [codes, scale, zero], f"{name}.dequantize")
