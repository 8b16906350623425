"""Replace float weights by the recipe's codes and a DequantizeLinear.

    w (C, ...) float   ->   codes (C, ...) int4 | int8 | float8  --DequantizeLinear(scale (C,), axis)-->  w
    w (C, K) float     ->   codes (C, K) --DequantizeLinear(scale (C, K / block), block_size)-->  w

Requires: every weighted operator of the recipe is a node of that name with a constant weight.
Ensures: its weight input is a DequantizeLinear over stored codes, one scale per output channel or per block of columns;
the bias is float and untouched. Weights of up to 4 bits are stored as 4 bits where the recipe's container says so. The
graph holds no copy of the recipe's codes: they take their stored form when it is written.
"""

from collections.abc import Mapping
from functools import partial

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch

from ...calibrate.recipe import Recipe
from ...runtime.errors import AccuQuantError
from ..graph import operator_node, operator_nodes
from .insertion import constant, deferred, drop_unused, insert_before

STORED = {"int4": ir.DataType.INT4, "int8": ir.DataType.INT8, "float8": ir.DataType.FLOAT8E4M3FN}


def store_weights(model: ir.Model, recipe: Recipe) -> int:
    """Rewrite in place; returns how many weights were stored.

    Raises:
        AccuQuantError: a layer of the recipe is not in the graph, or its shape differs.
    """
    nodes = operator_nodes(model)
    for name, codes in recipe.codes.items():
        node = operator_node(nodes, name)
        weight = node.inputs[1]
        if weight is None or weight.const_value is None:
            raise AccuQuantError(
                f"layer {name}: its weight is computed in the graph, a constant is expected; keep the layer in float "
                f"(--in-float {name})"
            )
        transposed = node.op_type == "MatMul"  # x @ w: the exporter stores (in, out)
        held, scale = _array(codes), recipe.scales[name].numpy()
        if transposed:
            held, scale = held.T, scale.T
        if tuple(weight.const_value.shape) != held.shape:
            raise AccuQuantError(
                f"layer {name}: the recipe's weight is {held.shape}, the graph's {tuple(weight.const_value.shape)}; "
                "both must be of one checkpoint: export the one that was calibrated, anew and without --resume"
            )
        dtype = STORED[recipe.container(name) or "int8"]
        packed = deferred(model, f"{name}.weight.codes", dtype, held.shape, partial(_stored, held, dtype))
        stored = [packed, constant(model, f"{name}.weight.scale", scale)]
        axis = int(transposed) if scale.ndim == 1 else int(not transposed)
        blocks = {} if scale.ndim == 1 else {"block_size": held.shape[axis] // scale.shape[axis]}
        value = insert_before(model, node, "DequantizeLinear", stored, f"{name}.weight.dequantize", axis=axis, **blocks)
        node.replace_input_with(1, value)
        drop_unused(model, weight)
    return len(recipe.codes)


def stored_weight(nodes: Mapping[str, ir.Node], name: str) -> ir.Node:
    """The DequantizeLinear behind a layer's stored weight, of `operator_nodes`.

    Raises:
        AccuQuantError: the layer is not in the graph, or its weight is not stored yet.
    """
    operator_node(nodes, name)
    if (dequantize := nodes.get(f"{name}.weight.dequantize")) is None:
        raise AccuQuantError(
            f"layer {name}: its weight is float in the graph, 4-bit codes behind a DequantizeLinear are expected; run "
            "store_weights first"
        )
    return dequantize


def _array(codes: torch.Tensor) -> np.ndarray:
    if codes.dtype == torch.float8_e4m3fn:  # numpy knows these only by ml_dtypes' name
        return codes.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
    return codes.numpy()


def _stored(codes: np.ndarray, dtype: ir.DataType) -> np.ndarray:
    return np.ascontiguousarray(codes.astype(dtype.numpy()))
