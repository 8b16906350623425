"""A linear layer as several, each with some of its output channels.

    y = W x + b, columns c..c+w of y   =>   y' = W[c..c+w] x + b[c..c+w]

Each output channel has its own weights, scales and bias, so the numbers are the same; all parts read one input, as it
was quantized for the whole. The first part has the layer's name, the others are `<name>/1`, `<name>/2` ...; compilers'
reports count what stands before a slash as the operator.

Requires: a weight that is a constant or stored behind Q/DQ, and one layer's result for each part in equal widths.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import onnx_ir as ir

from ...runtime.errors import AccuQuantError
from ..operands import operand, output_axis
from .insertion import deferred


@dataclass(frozen=True)
class Whole:
    """A layer of `columns` outputs: its product, and what adds a constant to them or scales them behind it."""

    chain: tuple[ir.Node, ...]
    columns: int

    @property
    def result(self) -> ir.Value:
        return self.chain[-1].outputs[0]


def whole(node: ir.Node) -> Whole | None:
    """The layer of a product, as far as constants and step scales follow; None if its width is not known."""
    shape = node.outputs[0].shape
    columns = shape[-1] if shape is not None else None
    if not isinstance(columns, int):
        return None
    chain, after = [node], only_reader(node.outputs[0])
    while after is not None and after.op_type in ("Add", "Mul") and _by_columns(after, chain[-1], columns):
        chain.append(after)
        after = only_reader(after.outputs[0])
    return Whole(tuple(chain), columns)


def only_reader(value: ir.Value) -> ir.Node | None:
    readers = [usage.node for usage in value.uses()]
    return readers[0] if len(readers) == 1 and not value.is_graph_output() else None


def numbers(node: ir.Node, index: int) -> np.ndarray | None:
    """A constant input."""
    value = node.inputs[index] if index < len(node.inputs) else None
    return None if value is None or value.const_value is None else value.const_value.numpy()


def can_be_cut(layer: Whole, count: int) -> bool:
    """Are there as many parts of equal width, which are not 4-bit tensors of odd size, that compilers refuse?

    Raises:
        AccuQuantError: the weight is computed.
    """
    node = layer.chain[0]
    weight, found = node.inputs[1], operand(node, 1)
    if found is not None and found.is_weight and weight is found.dequantize.outputs[0]:
        codes = (found.requantized or found.dequantize).inputs[0]
        odd = codes is not None and codes.dtype == ir.DataType.INT4 and codes.const_value.size % (2 * count) != 0  # type: ignore[union-attr]
        return layer.columns % count == 0 and not odd
    if weight is not None and weight.const_value is not None:
        return layer.columns % count == 0
    raise AccuQuantError(
        f"layer {node.name}: its weight is to be cut by output channels, and is neither a constant nor comes from a "
        "DequantizeLinear over stored codes; run store_weights first"
    )


def parts(model: ir.Model, layer: Whole, count: int, place: ir.Node) -> Iterator[ir.Value]:
    """The results of the layer's parts, whose nodes are put in front of `place`; the whole is left to be removed."""
    for n in range(count):
        yield _Part(model, layer, n, layer.columns // count, place).made()


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


class _Part:
    """Copies of a layer's nodes, on its n-th columns."""

    def __init__(self, model: ir.Model, layer: Whole, n: int, width: int, place: ir.Node) -> None:
        self._model, self._layer, self._n, self._width, self._place = model, layer, n, width, place
        self._name, self._cut = str(layer.chain[0].name), dict[ir.Value, ir.Value]()

    def made(self) -> ir.Value:
        product, axis = self._layer.chain[0], output_axis(self._layer.chain[0])
        read, weight, *bias = product.inputs
        inputs = [read, self._weight(weight, axis), *[self._columns(given, -1) for given in bias]]
        value = self._copy(product, inputs)
        for before, node in pairwise(self._layer.chain):
            inputs = [value if given is before.outputs[0] else self._columns(given, -1) for given in node.inputs]
            value = self._copy(node, inputs)
        old = self._layer.result
        value.type = old.type
        if old.shape is not None:
            value.shape = ir.Shape([*old.shape[:-1], self._width])
        return value

    def _weight(self, value: ir.Value | None, axis: int) -> ir.Value | None:
        """Codes, scales and zero points cut, and the Q/DQ over them again; or a constant cut."""
        producer = value.producer() if value is not None else None
        if producer is None:
            return self._columns(value, axis)
        return self._copy(producer, [self._weight(given, axis) for given in producer.inputs])

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
        name = self._renamed(node.name or str(node.outputs[0].name))
        made = ir.Node("", node.op_type, inputs, tuple(node.attributes.values()), name=name)
        made.outputs[0].name = f"{name}.output"
        self._model.graph.insert_before(self._place, made)
        return made.outputs[0]

    def _renamed(self, name: str) -> str:
        """Of the first part as it was; of the others so that it is theirs as it was the whole's."""
        if self._n == 0:
            return name
        theirs = name == self._name or name.startswith(f"{self._name}.")
        return f"{self._name}/{self._n}{name.removeprefix(self._name)}" if theirs else f"{name}/{self._n}"
