"""From the float graph and a recipe to the graphs of a bundle: the quantized denoiser and its full-precision twin."""

from collections.abc import Callable, Mapping

import onnx_ir as ir

from ..calibrate.recipe import Recipe
from ..calibrate.scheme import TargetName
from .passes.clip_activations import clip_activations
from .passes.correct_bias import correct_bias
from .passes.correct_output import correct_output
from .passes.group_norm_affine import group_norm_affine
from .passes.insert_qdq import insert_qdq
from .passes.linear_as_matmul import linear_as_matmul
from .passes.narrow_convolutions import narrow_convolutions
from .passes.quantize_outputs import quantize_outputs
from .passes.requantize_int4 import requantize_int4
from .passes.silu_by_exp import silu_by_exp
from .passes.smooth_inputs import smooth_inputs
from .passes.split_gates import split_gates
from .passes.split_projections import split_projections
from .passes.split_shortcuts import split_shortcuts
from .passes.step_table import step_table
from .passes.store_weights import store_weights
from .passes.tokens_channels_last import tokens_channels_last
from .passes.widen_int4 import widen_int4

# Rewrites that give the float part the form a target likes and change nothing else; the twin gets them too, so that a
# speed-up is measured against the best fp graph we know.
FLOAT_REWRITES: Mapping[TargetName, tuple[Callable[[ir.Model], int], ...]] = {
    "cpu": (group_norm_affine, silu_by_exp, tokens_channels_last),
    "onnxruntime": (group_norm_affine, linear_as_matmul),
    "tensorrt": (),
}

# The same, of layers that are in float: known at the end alone, by weights that are constants.
FLOAT_LAYER_REWRITES: Mapping[TargetName, tuple[Callable[[ir.Model], int], ...]] = {
    "cpu": (narrow_convolutions,),
    "onnxruntime": (),
    "tensorrt": (),
}

# Rewrites that give stored weights and written results the form of a target's integer kernels.
KERNEL_REWRITES: Mapping[TargetName, tuple[Callable[[ir.Model, Recipe], int], ...]] = {
    "cpu": (),
    "onnxruntime": (widen_int4, quantize_outputs),
    "tensorrt": (requantize_int4,),
}

# Rewrites after which a layer is not found whole any more: they run once every layer was compared. On CPUs the twin
# gains by them as well.
LAST_REWRITES: Mapping[TargetName, tuple[Callable[[ir.Model, Recipe], int], ...]] = {
    "cpu": (split_projections, split_gates),
    "onnxruntime": (),
    "tensorrt": (split_projections,),
}
LAST_REWRITES_OF_TWINS = {**LAST_REWRITES, "tensorrt": ()}


def lower(float_graph: ir.Model, recipe: Recipe, target: TargetName) -> tuple[ir.Model, ir.Model]:
    """(quantized, twin); `float_graph` is left as it is, and all three share the weights that they have in common."""
    twin = _copy(float_graph)
    for reform in FLOAT_REWRITES[target]:
        reform(twin)
    quantized = _copy(twin)
    recipe = split_shortcuts(quantized, recipe)
    correct_bias(quantized, recipe)
    smooth_inputs(quantized, recipe)
    recipe = step_table(quantized, recipe)
    store_weights(quantized, recipe)
    for rewrite in KERNEL_REWRITES[target]:
        rewrite(quantized, recipe)
    insert_qdq(quantized, recipe)
    clip_activations(quantized, recipe)
    correct_output(quantized, recipe)
    for reform in FLOAT_LAYER_REWRITES[target]:
        reform(quantized)
        reform(twin)
    return quantized, twin


def _copy(model: ir.Model) -> ir.Model:
    """Nodes and values of its own around the same tensors: a rewrite replaces tensors and never writes into one."""
    return model.clone()
