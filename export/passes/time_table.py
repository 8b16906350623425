"""Look up what depends on the timestep alone, instead of computing it at every step for every sample.

    values(t), a whole embedding network   =>   row = argmin |t - timesteps|,   values = table[row]

A sampler calls the network at the timesteps of its plan and at no others, so everything between the timestep and the
first meeting with the latent is a function on a few dozen points. The table holds what the graph itself computes there,
by the standard's definition of every node, bit for bit; weights that only served it are dropped.

Requires: all other rewrites have run; the plan's timesteps are exact in float32.
Ensures: no node but the lookup depends on the timestep alone. The graph is right at the plan's timesteps only.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ...runtime.errors import AccuQuantError
from ..graph import TIMESTEP, graph_input
from ..part import Part
from .insertion import constant, insert_behind, look_up


def time_table(model: ir.Model, timesteps: Sequence[float]) -> int:
    """Rewrite in place; returns how many values are looked up.

    It is left as it is, and 0 returned, where the table would hold more numbers than the weights that it replaces.

    Raises:
        AccuQuantError: two of the timesteps are one in float32, or the graph has no timestep.
    """
    points = np.unique(np.asarray(timesteps, np.float32))
    if len(points) != len(set(timesteps)):
        raise AccuQuantError("two timesteps of the plan are the same in float32; sample in fewer steps")
    t = graph_input(model, TIMESTEP)
    met = _met(model, t)
    if not met:
        return 0
    part = Part(model, [t], met)
    values = part.run({TIMESTEP: points})
    rows = {value: array for value, array in zip(met, values, strict=True) if _is_per_sample(array, len(points))}
    width = sum(array[0].size for array in rows.values())
    if not rows or len(points) * width > part.weights:
        return 0
    _look_up(model, t, points, rows)
    RemoveUnusedNodesPass()(model)
    return len(rows)


def _met(model: ir.Model, t: ir.Value) -> list[ir.Value]:
    """Values that depend on the timestep and on nothing else that is given, where what depends on more reads them."""
    depends = {value: {value} for value in model.graph.inputs}
    met: dict[ir.Value, None] = {}
    for node in model.graph:
        reads = [value for value in node.inputs if value in depends]
        found = set[ir.Value]().union(*(depends[value] for value in reads))
        if found - {t}:
            met |= dict.fromkeys(value for value in reads if depends[value] == {t} and value is not t)
        if found:
            depends |= dict.fromkeys(node.outputs, found)
    return list(met)


def _is_per_sample(array: np.ndarray, count: int) -> bool:
    return array.dtype == np.float32 and array.ndim > 1 and len(array) == count


def _look_up(model: ir.Model, t: ir.Value, points: np.ndarray, rows: dict[ir.Value, np.ndarray]) -> None:
    """One Gather for all values, cut into them; a value's further axes are put back."""
    table = np.concatenate([array.reshape(len(points), -1) for array in rows.values()], axis=1)
    parts = look_up(model, t, points, table, [array[0].size for array in rows.values()], "time")
    for part, (value, array) in zip(parts, rows.items(), strict=True):
        part.name, new = f"{value.name}.looked_up", part
        if array.ndim > 2:
            shape = constant(model, f"{value.name}.shape", np.array([-1, *array.shape[1:]]))
            split = part.producer()
            assert split is not None
            new = insert_behind(model, split, "Reshape", [part, shape], f"{value.name}.reshaped")
            new.type, new.shape = value.type, value.shape
        for node, index in list(value.uses()):
            node.replace_input_with(index, new)
