"""Give 4-bit weights the form in which TensorRT runs them on int8 kernels.

    codes int4 --DequantizeLinear(s)--> QuantizeLinear(s / 16) --> DequantizeLinear(s / 16)--> operator

A code v becomes 16 v in [-128, 112], times s / 16: the same weight, bit for bit, since 16 is a power of two. Weights
stay 4 bits in the engine. Fed to an int8 convolution directly, int4 is refused by TensorRT's compiler; with one and the
same scale on both sides its optimizer cancels the pair.

Requires: store_weights has run. Ensures: every int4 weight reaches its operator as int8 through a DequantizeLinear.
"""

import numpy as np
import onnx_ir as ir

from ...calibrate.recipe import Recipe
from ..graph import operator_nodes

STEP = np.float32(16)


def requantize_int4(model: ir.Model, recipe: Recipe) -> int:
    """Rewrite in place where the recipe's target is TensorRT; returns how many weights were requantized."""
    if recipe.facts.scheme.target != "tensorrt":
        return 0
    nodes = operator_nodes(model)
    packed = [name for name in recipe.codes if recipe.container(name) == "int4"]
    for name in packed:
        outer = nodes[f"{name}.weight.dequantize"]
        scale = outer.inputs[1]
        assert scale is not None
        assert scale.const_value is not None
        fine = ir.val(
            f"{name}.weight.fine_scale",
            const_value=ir.tensor(scale.const_value.numpy() / STEP, name=f"{name}.weight.fine_scale"),
        )
        model.graph.register_initializer(fine)
        zero = ir.val(
            f"{name}.weight.fine_zero",
            const_value=ir.tensor(np.zeros(scale.const_value.shape.numpy(), np.int8), name=f"{name}.weight.fine_zero"),
        )
        model.graph.register_initializer(zero)
        axis = [ir.AttrInt64("axis", outer.attributes["axis"].as_int())]
        quantize = ir.Node("", "QuantizeLinear", [outer.outputs[0], fine, zero], axis, name=f"{name}.weight.requantize")
        quantize.outputs[0].name = f"{name}.weight.int8"
        inner = ir.Node(
            "", "DequantizeLinear", [quantize.outputs[0], fine, zero], axis, name=f"{name}.weight.fine_dequantize"
        )
        inner.outputs[0].name = f"{name}.weight.fine"
        nodes[name].replace_input_with(1, inner.outputs[0])
        model.graph.insert_before(nodes[name], [quantize, inner])
    return len(packed)
