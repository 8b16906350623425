"""Take a convolution of a concatenation apart, so that each part can have its own scale.

    Conv(Concat(a, b), w) + c   ->   Conv(a, w_a) + c  +  Conv(b, w_b)

Requires: the convolution reads a Concat of two tensors on axis 1, the first as wide as calibration saw it.
Ensures: two Conv nodes, the first with the old name and the bias, the second named `<name>.second`, and an Add behind;
the returned recipe has an operator for each, with one input each.
"""

import onnx_ir as ir

from ...calibrate.recipe import Recipe
from ...runtime.errors import AccuQuantError
from ..graph import operator_nodes
from .insertion import constant, drop_unused, insert_behind, read_instead


def split_shortcuts(model: ir.Model, recipe: Recipe) -> Recipe:
    """Rewrite in place; returns the recipe of the new graph.

    Raises:
        AccuQuantError: a layer of the recipe with two parts does not read a concatenation in the graph.
    """
    facts = dict(recipe.facts.operators)
    codes, scales = dict(recipe.codes), dict(recipe.scales)
    nodes = operator_nodes(model)
    for name, operator in recipe.facts.operators.items():
        if operator.kind != "conv" or len(operator.inputs) != 2:
            continue
        second = f"{name}.second"
        width = _take_apart(model, nodes.get(name), name, second)
        facts[name] = operator.model_copy(update={"inputs": operator.inputs[:1]})
        facts[second] = operator.model_copy(update={"inputs": operator.inputs[1:]})
        codes[name], codes[second] = recipe.codes[name][:, :width], recipe.codes[name][:, width:]
        scales[second] = scales[name]
    known = recipe.facts.model_copy(update={"operators": facts})
    return Recipe(known, codes, scales, recipe.shifts, recipe.smoothings)


def _take_apart(model: ir.Model, node: ir.Node | None, name: str, second: str) -> int:
    """Returns how many channels the first part has."""
    whole = node.inputs[0].producer() if node is not None and node.inputs[0] is not None else None
    weight = node.inputs[1].const_value if node is not None and node.inputs[1] is not None else None
    if node is None or weight is None or whole is None or whole.op_type != "Concat" or len(whole.inputs) != 2:
        raise AccuQuantError(f"layer {name} was quantized in two parts, but reads no concatenation of two in the graph")
    a, b = whole.inputs
    assert a is not None
    assert b is not None
    assert a.shape is not None
    width = int(a.shape[1])  # type: ignore[arg-type]
    values = weight.numpy()
    old, product = node.inputs[1], node.outputs[0]
    node.replace_input_with(0, a)
    node.replace_input_with(1, constant(model, f"{name}.weight.first", values[:, :width]))
    drop_unused(model, old)
    rest = constant(model, f"{name}.weight.second", values[:, width:])
    other = ir.Node("", "Conv", [b, rest], list(node.attributes.values()), name=second)
    other.outputs[0].name = f"{second}.output"
    other.outputs[0].shape, other.outputs[0].type = product.shape, product.type
    model.graph.insert_after(node, other)
    readers = list(product.uses())
    total = insert_behind(model, other, "Add", [product, other.outputs[0]], f"{name}.sum")
    read_instead(model, product, total, readers)
    return width
