"""Where every quantized operator begins and ends in a lowered graph: its float inputs, and what it gives to others."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import onnx_ir as ir

from .graph import operator_node, operator_nodes

WRITTEN = ".output.dequantize"
QUANTIZATION = ("DequantizeLinear", "QuantizeLinear", "Clip")


class Form(NamedTuple):
    """What must be known of an operator to find its ends; `parts` is 2 where a concatenated input is taken in two."""

    kind: str
    parts: int = 1
    biased: bool = True


@dataclass(frozen=True)
class Place:
    """An operator's node, its float inputs and its output."""

    node: ir.Node
    inputs: tuple[ir.Value, ...]
    output: ir.Value


def operator_places(model: ir.Model, forms: Mapping[str, Form]) -> dict[str, Place]:
    """The place of each operator in a lowered graph, in the order of the graph.

    Raises:
        AccuQuantError: an operator is not in the graph.
    """
    nodes = operator_nodes(model)
    for name in sorted(forms):
        operator_node(nodes, name)
    position = {id(node): n for n, node in enumerate(model.graph)}
    places: dict[str, Place] = {}
    for name in sorted(forms, key=lambda name: position[id(nodes[name])]):
        form, node = forms[name], nodes[name]
        if form.kind == "matmul":
            inputs = tuple(_float_input(node, name, index) for index in (0, 1))
        elif form.parts == 2:
            inputs = (_float_input(node, name, 0), _float_input(nodes[f"{name}.second"], f"{name}.second", 0))
        else:
            inputs = (_float_input(node, name, 0),)
        places[name] = Place(node, inputs, _output(node, name, form))
    return places


def show_places(model: ir.Model, places: Mapping[str, Place]) -> None:
    """Make every end a graph output, so that an engine hands it out."""
    for place in places.values():
        for value in (*place.inputs, place.output):
            if not value.is_graph_input() and not any(value is shown for shown in model.graph.outputs):
                value.type = value.type or ir.TensorType(ir.DataType.FLOAT)
                model.graph.outputs.append(value)


def _float_input(node: ir.Node, name: str, index: int) -> ir.Value:
    """What stood before quantization, table and smoothing."""
    value = node.inputs[index]
    assert value is not None
    whole = name.partition("/")[0]  # whose input all parts read
    ours = {f"{whole}.smooth", f"{whole}.input{index}.divide"}
    while (producer := value.producer()) and (producer.op_type in QUANTIZATION or producer.name in ours):
        if producer.name and producer.name.endswith(WRITTEN):  # on the grid of another's output, which is not undone
            break
        above = producer.inputs[0]
        assert above is not None
        value = above
    return value


def _output(node: ir.Node, name: str, form: Form) -> ir.Value:
    """What stands behind the parts' sum, the table's factors and the bias."""
    value = node.outputs[0]
    bias_behind = node.op_type == "MatMul" and form.kind == "linear" and form.biased
    while following := list(_behind(value, name, bias_behind)):
        (after,) = following
        bias_behind = bias_behind and bool(after.name and after.name.startswith(f"{name}."))
        value = after.outputs[0]
    return value


def _behind(value: ir.Value, name: str, bias_behind: bool) -> Iterator[ir.Node]:
    for usage in value.uses():
        node = usage.node
        ours = node.name is not None and node.name.startswith(f"{name}.")
        biased = (
            bias_behind and node.op_type == "Add" and any(v is not None and v.is_initializer() for v in node.inputs)
        )
        if ours or biased:
            yield node
