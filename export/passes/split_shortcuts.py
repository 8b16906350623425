"""Take a convolution of a concatenation apart, so that each part can have its own scale.

    Conv(Concat(a, b), w) + c   ->   Conv(a, w_a) + c  +  Conv(b, w_b)

One convolution behind a concatenation of a / s_a and b / s_b would do as well, with the scales taken into w; measured
(tools/bench_split.py), it is less exact, since columns of different scales share a weight's grid, and slower on CPUs.

Requires: the convolution reads a Concat of two tensors on axis 1, the first as wide as calibration saw it.
Ensures: two Conv nodes, the first with the old name and the bias, the second named `<name>.second`, and an Add behind;
the returned recipe has an operator for each, with one input each.
"""

import onnx_ir as ir

from ...calibrate.recipe import Recipe
from ...runtime.errors import AccuQuantError
from ..graph import operator_node, operator_nodes
from .insertion import constant, drop_unused, insert_behind, read_instead


def split_shortcuts(model: ir.Model, recipe: Recipe) -> Recipe:
    """Rewrite in place; returns the recipe of the new graph.

    Raises:
        AccuQuantError: a layer of the recipe with two parts is not in the graph, has no codes in the recipe, or does
            not read a concatenation of two tensors on the channel axis there.
    """
    facts = dict(recipe.facts.operators)
    codes, scales = dict(recipe.codes), dict(recipe.scales)
    nodes = operator_nodes(model)
    for name, operator in recipe.facts.operators.items():
        if operator.kind != "conv" or len(operator.inputs) != 2:
            continue
        second = f"{name}.second"
        if name not in codes:
            raise AccuQuantError(
                f"layer {name}: the recipe has two inputs and no codes for its weight, which are to be taken apart; "
                "calibrate again"
            )
        width = _take_apart(model, operator_node(nodes, name), name, second)
        facts[name] = operator.model_copy(update={"inputs": operator.inputs[:1]})
        facts[second] = operator.model_copy(update={"inputs": operator.inputs[1:]})
        codes[name], codes[second] = recipe.codes[name][:, :width], recipe.codes[name][:, width:]
        scales[second] = scales[name]
    known = recipe.facts.model_copy(update={"operators": facts})
    return Recipe(known, codes, scales, recipe.shifts, recipe.smoothings, recipe.correction)


def _take_apart(model: ir.Model, node: ir.Node, name: str, second: str) -> int:
    """Returns how many channels the first part has."""
    whole = node.inputs[0].producer() if node.inputs[0] is not None else None
    weight = node.inputs[1].const_value if node.inputs[1] is not None else None
    a, b = whole.inputs if whole is not None and _joins_channels(whole) else (None, None)
    width = a.shape[1] if a is not None and a.shape is not None else None
    if weight is None or not isinstance(width, int):
        reads = "a constant or graph input" if whole is None else f"{whole.op_type} {whole.name}"
        raise AccuQuantError(
            f"layer {name} was quantized in two parts and reads {reads} in the graph; a Concat of two tensors of known "
            "widths on axis 1, and a constant weight, are expected: export without --split"
        )
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


def _joins_channels(node: ir.Node) -> bool:
    """Is it a concatenation of two tensors (N, C, H, W) on C?"""
    return node.op_type == "Concat" and len(node.inputs) == 2 and node.attributes.get_int("axis", 0) in (1, -3)
