"""From the float graph and a recipe to the graphs of a bundle: the quantized denoiser and its full-precision twin."""

import onnx_ir as ir

from ..calibrate.recipe import Recipe
from ..calibrate.scheme import TargetName
from .passes.correct_bias import correct_bias
from .passes.group_norm_affine import group_norm_affine
from .passes.insert_qdq import insert_qdq
from .passes.requantize_int4 import requantize_int4
from .passes.smooth_inputs import smooth_inputs
from .passes.split_shortcuts import split_shortcuts
from .passes.step_table import step_table
from .passes.store_weights import store_weights

# Rewrites that make the float part faster on a target and change nothing else; the twin gets them too, so that a
# speed-up is measured against the best fp graph we know.
FLOAT_REWRITES = {"cpu": (group_norm_affine,), "tensorrt": ()}


def lower(float_graph: ir.Model, recipe: Recipe, target: TargetName) -> tuple[ir.Model, ir.Model]:
    """(quantized, twin); `float_graph` is left as it is."""
    twin, quantized = _copy(float_graph), _copy(float_graph)
    for model in (twin, quantized):
        for rewrite in FLOAT_REWRITES[target]:
            rewrite(model)
    recipe = split_shortcuts(quantized, recipe)
    correct_bias(quantized, recipe)
    smooth_inputs(quantized, recipe)
    recipe = step_table(quantized, recipe)
    store_weights(quantized, recipe)
    requantize_int4(quantized, recipe)
    insert_qdq(quantized, recipe)
    return quantized, twin


def _copy(model: ir.Model) -> ir.Model:
    return ir.from_proto(ir.to_proto(model))
