"""Give 4-bit weights the form in which TensorRT runs them on int8 kernels.

    codes int4 --DequantizeLinear(s)--> QuantizeLinear(s / 16) --> DequantizeLinear(s / 16)--> operator

A code v becomes 16 v in [-128, 112], times s / 16: the same weight, bit for bit, since 16 is a power of two. Weights
stay 4 bits in the engine. Fed to an int8 convolution directly, int4 is refused by TensorRT's compiler; with one and the
same scale on both sides its optimizer cancels the pair.

Where weights alone are quantized there is no int8 kernel to feed, and int4 stays as it is.

Requires: store_weights has run; scales are constants, one per output channel.
Ensures: every int4 weight reaches its operator as int8 through a DequantizeLinear.
"""

import numpy as np
import onnx_ir as ir

from ...calibrate.recipe import Recipe
from ...runtime.errors import AccuQuantError
from ..graph import operator_nodes
from .insertion import constant, insert_before
from .store_weights import stored_weight

STEP = np.float32(16)


def requantize_int4(model: ir.Model, recipe: Recipe) -> int:
    """Rewrite in place; returns how many weights were requantized.

    Raises:
        AccuQuantError: a layer of 4-bit weights is not in the graph, its weight is not stored there, or its scale is
            computed or one per block.
    """
    nodes = operator_nodes(model)
    if recipe.facts.scheme.weights_alone:
        return 0
    packed = [name for name in recipe.codes if recipe.container(name) == "int4"]
    for name in packed:
        outer = stored_weight(nodes, name)
        scale = outer.inputs[1]
        if scale is None or scale.const_value is None or "block_size" in outer.attributes:
            found = "one scale per block" if "block_size" in outer.attributes else "a scale that is computed"
            raise AccuQuantError(
                f"layer {name}: its 4-bit weight has {found}, a constant per output channel is expected, which int8 "
                "kernels take; blocks are for weights alone (--bits 4/16)"
            )
        values = scale.const_value.numpy() / STEP
        fine = constant(model, f"{name}.weight.fine_scale", values)
        zero = constant(model, f"{name}.weight.fine_zero", np.zeros(values.shape, np.int8))
        axis, place = outer.attributes["axis"].as_int(), nodes[name]
        inputs = [outer.outputs[0], fine, zero]
        codes = insert_before(model, place, "QuantizeLinear", inputs, f"{name}.weight.requantize", axis=axis)
        value = insert_before(
            model, place, "DequantizeLinear", [codes, fine, zero], f"{name}.weight.fine_dequantize", axis=axis
        )
        place.replace_input_with(1, value)
    return len(packed)
