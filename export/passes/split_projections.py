"""Take a linear layer whose result is cut into sets of heads apart into one linear layer for each set.

    Linear -> Reshape (B, N, k, h, d) -> Transpose -> k rows   =>   k times Linear -> Reshape (B, N, h, d) -> Transpose

Queries, keys and values in one are such a layer. Where its weights are of 8 bits and one bias is added, TensorRT's
compiler moves the cut before the product, slices the weight that Q/DQ gives, and then multiplies in float; layers that
are apart are integer kernels in every form (linear_parts.py). OpenVINO moves the whole result to cut it, and takes the
Transposes of single parts into its kernel for attention.

Requires: of a quantized graph, that store_weights and insert_qdq have run; time_table and cast_rest have not.
Ensures: a layer that is cut otherwise, or has other readers too, is as it was.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ...calibrate.recipe import Recipe
from ..graph import operator_node, operator_nodes
from .insertion import constant, insert_before, read_instead
from .linear_parts import Whole, can_be_cut, numbers, only_reader, parts, whole


@dataclass(frozen=True)
class _Projection:
    """A layer and how its result is cut.

    `axis` is the reshaped result's that the parts lie along; `taken` are what the readers of the graph take, in order.
    """

    layer: Whole
    reshape: ir.Node
    axis: int
    order: tuple[int, ...]
    taken: tuple[ir.Value, ...]


def split_projections(model: ir.Model, recipe: Recipe) -> int:
    """Rewrite in place; returns how many layers were taken apart.

    Raises:
        AccuQuantError: a layer of the recipe is not in the graph, or the weight of one that is to be taken apart is
            computed there.
    """
    nodes = operator_nodes(model)
    linear = [name for name, operator in recipe.facts.operators.items() if operator.kind == "linear"]
    found = [projection for name in linear if (projection := _projection(operator_node(nodes, name))) is not None]
    for projection in found:
        made = parts(model, projection.layer, len(projection.taken), projection.reshape)
        for n, (taken, value) in enumerate(zip(projection.taken, made, strict=True)):
            read_instead(model, taken, _in_heads(model, projection, value, n), list(taken.uses()))
    if found:
        RemoveUnusedNodesPass()(model)
    return len(found)


def _projection(node: ir.Node) -> _Projection | None:
    """None if its result is not cut so."""
    layer = whole(node)
    after = only_reader(layer.result) if layer is not None else None
    moved = only_reader(after.outputs[0]) if after is not None and after.op_type == "Reshape" else None
    if (
        layer is None
        or after is None
        or moved is None
        or moved.op_type != "Transpose"
        or "perm" not in moved.attributes
    ):
        return None
    shape, rows = after.outputs[0].shape, _rows(moved.outputs[0])
    if shape is None or rows is None:
        return None
    order, taken = tuple(moved.attributes["perm"].as_ints()), rows[1]
    axis = order[rows[0]]
    behind = [side for side in shape[axis:] if isinstance(side, int)]
    named = sum(not isinstance(side, int) for side in shape)
    if len(behind) < len(shape) - axis or math.prod(behind) != layer.columns or behind[0] != len(taken) or named > 1:
        return None
    return _Projection(layer, after, axis, order, taken) if can_be_cut(layer, len(taken)) else None


def _rows(value: ir.Value) -> tuple[int, tuple[ir.Value, ...]] | None:
    """The axis of which every reader takes one row, and all rows in order; None if they do not."""
    if value.is_graph_output():
        return None
    axes, rows = set[int](), list[tuple[int, ir.Value]]()
    for usage in value.uses():
        taken = list(_taken(usage.node))
        axes |= {axis for axis, _, _ in taken}
        rows += [(index, value) for _, index, value in taken]
        if not taken:
            return None
    if len(axes) != 1 or sorted(index for index, _ in rows) != list(range(len(rows))) or len(rows) < 2:
        return None
    return axes.pop(), tuple(value for _, value in sorted(rows, key=lambda row: row[0]))


def _taken(node: ir.Node) -> Iterator[tuple[int, int, ir.Value]]:
    """(axis, row, value) of each row that a node takes; a Squeeze behind tells that it is one row."""
    if node.op_type == "Gather":
        index = numbers(node, 1)
        if index is not None and index.ndim == 0:
            yield node.attributes.get_int("axis", 0), int(index), node.outputs[0]
        return
    if node.op_type == "Slice":
        starts, along = numbers(node, 1), numbers(node, 3)
        if starts is None or along is None or starts.size != 1:
            return
        axis, first = int(along[0]), int(starts[0])
    elif node.op_type == "Split":
        axis, first = node.attributes.get_int("axis", 0), 0
    else:
        return
    for n, value in enumerate(node.outputs):
        squeeze = only_reader(value)
        gone = numbers(squeeze, 1) if squeeze is not None and squeeze.op_type == "Squeeze" else None
        if squeeze is None or gone is None or gone.tolist() != [axis]:
            return
        yield axis, first + n, squeeze.outputs[0]


def _in_heads(model: ir.Model, projection: _Projection, value: ir.Value, n: int) -> ir.Value:
    """A part's result, reshaped and transposed as the whole is, without the axis of the parts."""
    result, axis = projection.reshape.outputs[0], projection.axis
    shape, name = result.shape, f"{result.name}/{n}"
    assert shape is not None
    sides = [side for place, side in enumerate(shape) if place != axis]
    sizes = constant(model, f"{name}.shape", np.array([side if isinstance(side, int) else -1 for side in sides]))
    shaped = insert_before(model, projection.reshape, "Reshape", [value, sizes], f"{name}.reshape")
    order = [place - (place > axis) for place in projection.order if place != axis]
    moved = insert_before(model, projection.reshape, "Transpose", [shaped], f"{name}.transpose", perm=order)
    shaped.shape, moved.shape = ir.Shape(sides), ir.Shape([sides[place] for place in order])
    return moved
