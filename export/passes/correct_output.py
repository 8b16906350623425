"""Write the correction of the network's output behind it, its coefficients looked up by every sample's timestep.

    o' = o + alpha_t o + beta_t x + gamma_t,      (alpha, beta, gamma)_t = table[argmin |t - timesteps|]

Requires: the output has the shape of the latent; samples lie along the first axis of both.
Ensures: the graph's output keeps its name. A recipe without a correction leaves the graph as it is.
"""

import numpy as np
import onnx_ir as ir

from ...calibrate.recipe import Recipe
from ...runtime.errors import AccuQuantError
from ..graph import INPUT, TIMESTEP, graph_input
from .insertion import constant, insert_before, insert_behind, read_instead


def correct_output(model: ir.Model, recipe: Recipe) -> int:
    """Rewrite in place; returns how many timesteps the table has.

    Raises:
        AccuQuantError: the graph has no latent or timestep, or its output other channels than the recipe corrects.
    """
    correction = recipe.correction
    if correction is None:
        return 0
    x, t, (result,) = graph_input(model, INPUT), graph_input(model, TIMESTEP), model.graph.outputs
    channels = correction.coefficients.shape[1] - 2
    if x.shape is None or result.shape is None or not x.shape[1] == result.shape[1] == channels:
        raise AccuQuantError(
            f"output {result.name}: shape {result.shape} of a latent {x.shape}, and the recipe corrects {channels} "
            "channels; calibrate this checkpoint again, or without (--set correct=0)"
        )
    first = model.graph[0]
    axis = constant(model, "correction.axis", np.array([1]))
    points = constant(model, "correction.timesteps", correction.timesteps.numpy())
    column = insert_before(model, first, "Unsqueeze", [t, axis], "correction.column")
    apart = insert_before(model, first, "Sub", [column, points], "correction.apart")
    distance = insert_before(model, first, "Abs", [apart], "correction.distance")
    row = insert_before(model, first, "ArgMin", [distance], "correction.row", axis=1, keepdims=0)
    table = constant(model, "correction.table", correction.coefficients.numpy())
    found = insert_before(model, first, "Gather", [table, row], "correction.coefficients", axis=0)
    axes = constant(model, "correction.axes", np.arange(2, len(x.shape)))
    spread = insert_before(model, first, "Unsqueeze", [found, axes], "correction.spread")
    sizes = constant(model, "correction.sizes", np.array([1, 1, channels]))
    split = ir.Node("", "Split", [spread, sizes], [ir.AttrInt64("axis", 1)], num_outputs=3, name="correction.split")
    model.graph.insert_before(first, split)
    for name, part in zip(("alpha", "beta", "gamma"), split.outputs, strict=True):
        part.name, part.type = f"correction.{name}", ir.TensorType(ir.DataType.FLOAT)
    alpha, beta, gamma = split.outputs

    def behind(value: ir.Value, op: str, inputs: list[ir.Value], name: str) -> ir.Value:
        place = value.producer()
        assert place is not None
        return insert_behind(model, place, op, inputs, f"correction.{name}")

    strong = behind(result, "Mul", [result, alpha], "strong")
    leaning = behind(strong, "Mul", [x, beta], "leaning")
    corrected = behind(leaning, "Add", [result, strong], "strengthened")
    corrected = behind(corrected, "Add", [corrected, leaning], "upright")
    corrected = behind(corrected, "Add", [corrected, gamma], "levelled")
    read_instead(model, result, corrected, [])
    return len(correction.timesteps)
