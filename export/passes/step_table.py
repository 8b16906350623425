"""Activation scales that depend on the sampling step, in one graph.

A layer with K scales s_0..s_{K-1} along the chain is given the one of its sample's timestep t:

    row = #{k : t < bound_k},   s = table[row]
    x -> Div(s) -> [Q(1, z) -> DQ(1, z) -> operator without bias] -> Mul(s) -> Add(bias)

Inside the brackets everything is constant, so compilers see an ordinary quantized operator; the scale passes through
the product because the product is linear. Every sample of a batch looks up its own row. A product of two activations is
multiplied by both scales.

Requires: samples lie along the first axis of every input of those operators; biases are constants, already corrected.
Ensures: the returned recipe has scale 1 and no rows for those inputs, and is otherwise the same.
"""

import numpy as np
import onnx_ir as ir

from ...calibrate.recipe import OperatorRecipe, Recipe
from ...runtime.errors import AccuQuantError
from ..graph import TIMESTEP, graph_input, operator_node, operator_nodes
from .insertion import constant, drop_unused, insert_before, insert_behind, read_instead


def step_table(model: ir.Model, recipe: Recipe) -> Recipe:
    """Rewrite in place; returns the recipe of the new graph.

    Raises:
        AccuQuantError: a layer of the recipe is not in the graph, mixes samples along the first axis of an input, or
            has a bias that is computed; or the graph has no timestep.
    """
    facts = dict(recipe.facts.operators)
    tabled = [name for name, operator in facts.items() if any(i.rows for i in operator.inputs)]
    if not tabled:
        return recipe
    nodes = operator_nodes(model)
    row = _row(model, np.asarray(recipe.facts.step_bounds, np.float32))
    for name in tabled:
        facts[name] = _rewrite(model, operator_node(nodes, name), name, facts[name], row)
    known = recipe.facts.model_copy(update={"operators": facts, "step_bounds": ()})
    return Recipe(known, recipe.codes, recipe.scales, recipe.shifts, recipe.smoothings, recipe.correction)


def _row(model: ir.Model, bounds: np.ndarray) -> ir.Value:
    """int64 (batch,): the table's row of every sample, from the graph's timesteps (batch,)."""
    t = graph_input(model, TIMESTEP)
    first, axis = model.graph[0], constant(model, "step_row.axis", np.array([1]))
    column = insert_before(model, first, "Unsqueeze", [t, axis], "step_row.column")
    below = insert_before(model, first, "Less", [column, constant(model, "step_row.bounds", bounds)], "step_row.below")
    counted = insert_before(model, first, "Cast", [below], "step_row.counted", to=int(ir.DataType.INT64))
    return insert_before(model, first, "ReduceSum", [counted, axis], "step_row.row", keepdims=0)


def _rewrite(model: ir.Model, node: ir.Node, name: str, operator: OperatorRecipe, row: ir.Value) -> OperatorRecipe:
    """One operator: divide its inputs, multiply its output, and put the bias behind."""
    inputs, scales = list(operator.inputs), []
    for index, facts in enumerate(operator.inputs):
        x = node.inputs[index]
        if not facts.rows or x is None:
            continue
        if x.shape is None or isinstance(x.shape[0], int):
            raise AccuQuantError(
                f"layer {name}: input {index} has shape {x.shape}, whose first axis is not the batch, so that samples "
                "cannot look up their step's scale; calibrate with one set (table = 1)"
            )
        place = f"{name}.input{index}"
        table = constant(model, f"{place}.table", np.asarray(facts.rows, np.float32))
        scale = insert_before(model, node, "Gather", [table, row], f"{place}.scale_of_step")
        spread = _spread(model, node, scale, len(x.shape), place)
        node.replace_input_with(index, insert_before(model, node, "Div", [x, spread], f"{place}.divide"))
        inputs[index] = facts.model_copy(update={"scale": 1.0, "rows": ()})
        scales.append(scale)
    product = node.outputs[0]
    assert product.shape is not None
    rank, readers, behind = len(product.shape), list(product.uses()), product
    for n, scale in enumerate(scales):
        spread = _spread(model, node, scale, rank, f"{name}.output{n}")
        behind = _then(model, behind, "Mul", spread, f"{name}.rescaled{n}")
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None:
        if bias.const_value is None:
            raise AccuQuantError(
                f"layer {name}: its bias is computed in the graph, a constant is expected behind a table of scales; "
                "calibrate with one set (table = 1)"
            )
        values = bias.const_value.numpy().reshape(1, -1, *[1] * (rank - 2))
        node.resize_inputs(2)
        drop_unused(model, bias)
        behind = _then(model, behind, "Add", constant(model, f"{name}.bias.behind", values), f"{name}.biased")
    read_instead(model, product, behind, readers)
    return operator.model_copy(update={"inputs": tuple(inputs)})


def _spread(model: ir.Model, place: ir.Node, scale: ir.Value, rank: int, name: str) -> ir.Value:
    """(batch,) as (batch, 1, ...) of `rank` axes."""
    axes = constant(model, f"{name}.axes", np.arange(1, rank))
    return insert_before(model, place, "Unsqueeze", [scale, axes], f"{name}.spread")


def _then(model: ir.Model, value: ir.Value, op: str, other: ir.Value, name: str) -> ir.Value:
    producer = value.producer()
    assert producer is not None
    return insert_behind(model, producer, op, [value, other], name)
