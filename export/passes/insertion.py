"""Putting constants and nodes into a graph; what every rewrite does."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.convenience import convert_attributes

LIKE_THEIR_INPUT = frozenset({"Add", "Clip", "Div", "Exp", "Mul"})  # in shape and type
OF_ITS_TYPE = frozenset({"Gather", "Reshape", "Transpose", "Unsqueeze"})


def constant(model: ir.Model, name: str, value: np.ndarray | np.generic) -> ir.Value:
    """An initializer of the graph."""
    made = ir.val(name, const_value=ir.tensor(np.ascontiguousarray(value).reshape(np.shape(value)), name=name))
    model.graph.register_initializer(made)
    return made


def deferred(
    model: ir.Model, name: str, dtype: ir.DataType, shape: Sequence[int], make: Callable[[], np.ndarray]
) -> ir.Value:
    """An initializer whose values are made each time they are read, so that they need no memory before."""
    tensor = ir.LazyTensor(lambda: ir.tensor(make(), name=name), dtype=dtype, shape=ir.Shape(shape), name=name)
    made = ir.val(name, const_value=tensor)
    model.graph.register_initializer(made)
    return made


def drop_unused(model: ir.Model, value: ir.Value | None) -> None:
    """Remove an initializer that nothing reads any more."""
    if value is not None and value.name is not None and not value.uses() and value.name in model.graph.initializers:
        del model.graph.initializers[value.name]


def insert_before(
    model: ir.Model,
    place: ir.Node,
    op: str,
    inputs: Sequence[ir.Value | None],
    name: str,
    **attributes: int | Sequence[int],
) -> ir.Value:
    """The output of a new node in front of `place`."""
    node = _node(op, inputs, name, attributes)
    model.graph.insert_before(place, node)
    return node.outputs[0]


def insert_behind(
    model: ir.Model,
    place: ir.Node,
    op: str,
    inputs: Sequence[ir.Value | None],
    name: str,
    **attributes: int | Sequence[int],
) -> ir.Value:
    """The output of a new node behind `place`."""
    node = _node(op, inputs, name, attributes)
    model.graph.insert_after(place, node)
    return node.outputs[0]


def look_up(
    model: ir.Model, t: ir.Value, timesteps: np.ndarray, table: np.ndarray, sizes: Sequence[int], name: str
) -> Sequence[ir.Value]:
    """In front of all nodes, each sample's row of `table` at the timestep nearest to its own, cut along the next axis.

    `t` (b,), `timesteps` (T,) and `table` (T, sum of sizes, ...), float32; parts are (b, size, ...).
    """
    first = model.graph[0]
    axis, points = constant(model, f"{name}.axis", np.array([1])), constant(model, f"{name}.points", timesteps)
    column = insert_before(model, first, "Unsqueeze", [t, axis], f"{name}.column")
    apart = insert_before(model, first, "Sub", [column, points], f"{name}.apart")
    distance = insert_before(model, first, "Abs", [apart], f"{name}.distance")
    row = insert_before(model, first, "ArgMin", [distance], f"{name}.row", axis=1, keepdims=0)
    whole = insert_before(
        model, first, "Gather", [constant(model, f"{name}.table", table), row], f"{name}.values", axis=0
    )
    ends = [whole, constant(model, f"{name}.sizes", np.array(sizes))]
    split = ir.Node("", "Split", ends, [ir.AttrInt64("axis", 1)], num_outputs=len(sizes), name=f"{name}.split")
    model.graph.insert_before(first, split)
    for i, (part, size) in enumerate(zip(split.outputs, sizes, strict=True)):
        part.name, part.type = f"{name}.part{i}", ir.TensorType(ir.DataType.FLOAT)
        part.shape = ir.Shape([None, size, *table.shape[2:]])
    return split.outputs


def read_instead(model: ir.Model, old: ir.Value, new: ir.Value, readers: Sequence[tuple[ir.Node, int]]) -> None:
    """Let `readers` of `old`, and the graph's output if it is one, have `new`; an output keeps its name."""
    for node, index in readers:
        node.replace_input_with(index, new)
    for place, output in enumerate(model.graph.outputs):
        if output is old:
            old.name, new.name = f"{old.name}.before", old.name
            model.graph.outputs[place] = new


def _node(
    op: str, inputs: Sequence[ir.Value | None], name: str, attributes: Mapping[str, int | Sequence[int]]
) -> ir.Node:
    node = ir.Node("", op, inputs, convert_attributes(attributes), name=name)
    node.outputs[0].name = f"{name}.output"
    made, first = node.outputs[0], inputs[0]
    if first is not None and op in LIKE_THEIR_INPUT | OF_ITS_TYPE:
        made.type = first.type
    if first is not None and op in LIKE_THEIR_INPUT:
        made.shape = first.shape
    return node
