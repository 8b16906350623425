"""Write the correction of the network's output behind it, its coefficients looked up by every sample's timestep.

    o' = o + alpha_t o + beta_t x + gamma_t,      (alpha, beta, gamma)_t = table[argmin |t - timesteps|]

Requires: the output has the shape of the latent; samples lie along the first axis of both.
Ensures: the graph's output keeps its name. A recipe without a correction leaves the graph as it is.
"""

import onnx_ir as ir

from ...calibrate.recipe import Recipe
from ...runtime.errors import AccuQuantError
from ..graph import INPUT, TIMESTEP, graph_input
from .insertion import insert_behind, look_up, read_instead


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
    table = correction.coefficients.numpy()
    table = table.reshape(*table.shape, *[1] * (len(x.shape) - 2))
    points = correction.timesteps.numpy()
    alpha, beta, gamma = look_up(model, t, points, table, [1, 1, channels], "correction")

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
