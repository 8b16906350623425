"""Take a linear layer whose result is cut into sets of heads apart into one linear layer for each set.

    Linear -> Reshape (B, N, k, h, d) -> Transpose -> k rows   =>   k times Linear -> Reshape (B, N, h, d) -> Transpose

Queries, keys and values in one are such a layer. Where its weights are of 8 bits and one bias is added, TensorRT's
compiler moves the cut before the product, slices the weight that Q/DQ gives, and then multiplies in float; layers that
are apart are integer kernels in every form. Each output channel has its own weights, scales and bias, so the numbers
are the same; all parts read one quantized input.

Requires: store_weights and insert_qdq have run, time_table and cast_rest have not.
Ensures: the first part has the layer's name, the others are `<name>/1`, `<name>/2` ...; compilers' reports count what
stands before a slash as the operator. A layer that is cut otherwise, or has other readers too, is as it was.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ...calibrate.recipe import Recipe
from ...runtime.errors import AccuQuantError
from ..graph import operator_node, operator_nodes
from ..operands import Operand, operand
from .insertion import constant, deferred, read_instead


@dataclass(frozen=True)
class _Projection:
    """A layer of `columns` outputs: its product and what adds and scales behind it, and how the result is cut.

    `axis` is the reshaped result's that the parts lie along; `parts` are what the readers of the graph take, in order.
    """

    chain: tuple[ir.Node, ...]
    weight: Operand
    columns: int
    reshape: ir.Node
    axis: int
    order: tuple[int, ...]
    parts: tuple[ir.Value, ...]


def split_projections(model: ir.Model, recipe: Recipe) -> int:
    """Rewrite in place; returns how many layers were taken apart.

    Raises:
        AccuQuantError: a layer of the recipe is not in the graph, or one that is to be taken apart has no stored
            weight behind Q/DQ there.
    """
    nodes = operator_nodes(model)
    linear = [name for name, operator in recipe.facts.operators.items() if operator.kind == "linear"]
    found = [projection for name in linear if (projection := _projection(operator_node(nodes, name))) is not None]
    for projection in found:
        for n, taken in enumerate(projection.parts):
            made = _Part(model, projection, n).made()
            read_instead(model, taken, made, list(taken.uses()))
    if found:
        RemoveUnusedNodesPass()(model)
    return len(found)


# -- what is to be taken apart ---------------------------------------------------------------------------------------


def _projection(node: ir.Node) -> _Projection | None:
    """None if its result is not cut so."""
    whole = node.outputs[0].shape
    columns = whole[-1] if whole is not None else None
    if not isinstance(columns, int):
        return None
    chain, after = [node], _reader(node.outputs[0])
    while after is not None and after.op_type in ("Add", "Mul") and _by_columns(after, chain[-1], columns):
        chain.append(after)
        after = _reader(after.outputs[0])
    moved = _reader(after.outputs[0]) if after is not None and after.op_type == "Reshape" else None
    if after is None or moved is None or moved.op_type != "Transpose" or "perm" not in moved.attributes:
        return None
    shape, rows = after.outputs[0].shape, _rows(moved.outputs[0])
    if shape is None or rows is None:
        return None
    order, parts = tuple(moved.attributes["perm"].as_ints()), rows[1]
    axis = order[rows[0]]
    behind = [side for side in shape[axis:] if isinstance(side, int)]
    named = sum(not isinstance(side, int) for side in shape)
    if len(behind) < len(shape) - axis or math.prod(behind) != columns or behind[0] != len(parts) or named > 1:
        return None
    weight = _weight(node)
    if _odd(weight, len(parts)):
        return None
    return _Projection(tuple(chain), weight, columns, after, axis, order, parts)


def _reader(value: ir.Value) -> ir.Node | None:
    """The only one."""
    readers = [usage.node for usage in value.uses()]
    return readers[0] if len(readers) == 1 and not value.is_graph_output() else None


def _by_columns(node: ir.Node, before: ir.Node, columns: int) -> bool:
    """Does a sum or a product give each column a constant of its own, or all the same?"""
    (other,) = [value for value in node.inputs if value is not before.outputs[0]] or [None]
    if other is None:
        return False
    if other.const_value is not None:
        shape = other.const_value.shape
        return len(shape) == 0 or shape[-1] in (1, columns)
    spread = other.producer()  # a step's scale, of step_table
    axes = spread.inputs[1].const_value if spread is not None and spread.op_type == "Unsqueeze" else None  # type: ignore[union-attr]
    rank = len(node.outputs[0].shape or ())
    return axes is not None and rank - 1 in axes.numpy()


def _rows(whole: ir.Value) -> tuple[int, tuple[ir.Value, ...]] | None:
    """The axis of which every reader takes one row, and all rows in order; None if they do not."""
    if whole.is_graph_output():
        return None
    axes, rows = set[int](), list[tuple[int, ir.Value]]()
    for usage in whole.uses():
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
        index = _numbers(node, 1)
        if index is not None and index.ndim == 0:
            yield node.attributes.get_int("axis", 0), int(index), node.outputs[0]
        return
    if node.op_type == "Slice":
        starts, along = _numbers(node, 1), _numbers(node, 3)
        if starts is None or along is None or starts.size != 1:
            return
        axis, first = int(along[0]), int(starts[0])
    elif node.op_type == "Split":
        axis, first = node.attributes.get_int("axis", 0), 0
    else:
        return
    for n, value in enumerate(node.outputs):
        squeeze = _reader(value)
        gone = _numbers(squeeze, 1) if squeeze is not None and squeeze.op_type == "Squeeze" else None
        if squeeze is None or gone is None or gone.tolist() != [axis]:
            return
        yield axis, first + n, squeeze.outputs[0]


def _numbers(node: ir.Node, index: int) -> np.ndarray | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    return None if value is None or value.const_value is None else value.const_value.numpy()


def _weight(node: ir.Node) -> Operand:
    found = operand(node, 1)
    if found is None or not found.is_weight or node.inputs[1] is not found.dequantize.outputs[0]:
        raise AccuQuantError(
            f"layer {node.name}: its weight is to be cut into sets of heads, and comes from no DequantizeLinear over "
            "stored codes; run store_weights first"
        )
    return found


def _odd(weight: Operand, count: int) -> bool:
    """Would parts be 4-bit tensors of odd size, which the compiler refuses?"""
    codes = (weight.requantized or weight.dequantize).inputs[0]
    return codes is not None and codes.dtype == ir.DataType.INT4 and codes.const_value.size % (2 * count) != 0  # type: ignore[union-attr]


# -- the parts -------------------------------------------------------------------------------------------------------


class _Part:
    """Copies of a projection's nodes, on its n-th columns."""

    def __init__(self, model: ir.Model, whole: _Projection, n: int) -> None:
        self._model, self._whole, self._n = model, whole, n
        self._name, self._cut = str(whole.chain[0].name), dict[ir.Value, ir.Value]()
        self._width = whole.columns // len(whole.parts)

    def made(self) -> ir.Value:
        """In front of the whole's Reshape; what the n-th reader is to read."""
        whole = self._whole
        product = whole.chain[0]
        read, weight, *bias = product.inputs
        value = self._copy(product, [read, self._weight(weight), *[self._columns(given, -1) for given in bias]])
        for before, node in pairwise(whole.chain):
            inputs = [value if given is before.outputs[0] else self._columns(given, -1) for given in node.inputs]
            value = self._copy(node, inputs)
        value.type = whole.chain[-1].outputs[0].type
        return self._in_heads(value)

    def _in_heads(self, value: ir.Value) -> ir.Value:
        """Reshaped and transposed as the whole is, without the axis of the parts."""
        whole, axis = self._whole.reshape.outputs[0], self._whole.axis
        shape, name = whole.shape, f"{whole.name}/{self._n}"
        assert shape is not None
        sides = [side for place, side in enumerate(shape) if place != axis]
        sizes = np.array([side if isinstance(side, int) else -1 for side in sides])
        sizes_of_part = constant(self._model, f"{name}.shape", sizes)
        shaped = self._add("Reshape", [value, sizes_of_part], f"{name}.reshape")
        order = [place - (place > axis) for place in self._whole.order if place != axis]
        moved = self._add("Transpose", [shaped], f"{name}.transpose", [ir.AttrInt64s("perm", order)])
        shaped.shape, moved.shape = ir.Shape(sides), ir.Shape([sides[place] for place in order])
        shaped.type = moved.type = value.type
        return moved

    def _weight(self, value: ir.Value | None) -> ir.Value | None:
        """Codes, scales and zero points cut, and the Q/DQ over them again."""
        producer = value.producer() if value is not None else None
        if producer is None:
            return self._columns(value, self._whole.weight.output_axis)
        return self._copy(producer, [self._weight(given) for given in producer.inputs])

    def _columns(self, value: ir.Value | None, axis: int) -> ir.Value | None:
        """A constant's part along an axis, or its only one; what belongs to all columns as it is."""
        tensor = value.const_value if value is not None else None
        if value is None or tensor is None or len(tensor.shape) == 0:
            return value
        axis = axis % len(tensor.shape) if len(tensor.shape) > 1 else 0
        if tensor.shape[axis] == 1:
            return value
        if value not in self._cut:
            width, start = self._width, self._n * self._width
            shape = [width if n == axis else side for n, side in enumerate(tensor.shape.numpy())]
            part = (*[slice(None)] * axis, slice(start, start + width))
            self._cut[value] = deferred(
                self._model, f"{value.name}/{self._n}", tensor.dtype, shape,
                lambda: np.ascontiguousarray(tensor.numpy()[part]),
            )  # fmt: skip
        return self._cut[value]

    def _copy(self, node: ir.Node, inputs: Sequence[ir.Value | None]) -> ir.Value:
        return self._add(
            node.op_type, inputs, self._renamed(node.name or str(node.outputs[0].name)), tuple(node.attributes.values())
        )

    def _add(
        self, op: str, inputs: Sequence[ir.Value | None], name: str, attributes: Sequence[ir.Attr] = ()
    ) -> ir.Value:
        node = ir.Node("", op, inputs, attributes, name=name)
        node.outputs[0].name = f"{name}.output"
        self._model.graph.insert_before(self._whole.reshape, node)
        return node.outputs[0]

    def _renamed(self, name: str) -> str:
        """Of the first part as it was; of the others so that it is theirs as it was the whole's."""
        if self._n == 0:
            return name
        theirs = name == self._name or name.startswith(f"{self._name}.")
        return f"{self._name}/{self._n}{name.removeprefix(self._name)}" if theirs else f"{name}/{self._n}"
