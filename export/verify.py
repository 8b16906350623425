"""Is the graph the model? Checks that stand between a lowered graph and a bundle.

Two correct executions of one deep Q/DQ graph drift apart: a value that falls on a rounding boundary flips by one code,
and flips spread until they are as large as the quantization noise itself. So graphs are not compared element by
element but by how far each stands from full precision,

    SQNR = 10 log10( sum ||o_fp||^2 / sum ||o - o_fp||^2 ),

which must agree between the torch simulation and ONNX Runtime's unoptimised execution, on the teacher's own latents.
Where a value lies exactly on a boundary, such as cos 0 in a time embedding, both ways are right, and either can change
all of a small network's output. If the two disagree, the simulation runs again with its ties rounded otherwise, and the
graph must agree with something from the lowest to the highest that came out.
"""

import math
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import nn

from ..calibrate.layers import QuantizedOperator, quantization
from ..calibrate.trajectory import Trajectory
from ..runtime.engines.base import EngineOptions
from ..runtime.engines.onnxruntime import OnnxRuntimeEngine
from ..runtime.errors import AccuQuantError
from ..runtime.plan import SamplingPlan
from .ties import tie_breaks, ties_broken

STEPS_CHECKED, TRAJECTORIES_CHECKED = 8, 4
SQNR_TOLERANCE = 0.5  # dB; rounding flips moved it by at most 0.3 dB on the U-Nets tried
# dB; with nothing quantized float16 alone reached 61 and 79 on the U-Nets tried, and bfloat16 38 and 42
REACHES = {"float32": math.inf, "float16": 55.0, "bfloat16": 30.0}
TWIN_TOLERANCE = 1e-3  # of the output's root mean square: float32 in another order

Outputs = NDArray[np.float64]  # (rows, latents, ...)


def check_graph(path: Path) -> None:
    """The ONNX checker with shape inference.

    Raises:
        AccuQuantError: with the checker's own words.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise AccuQuantError(f"{path.name} is not valid ONNX: {error}") from error


@torch.no_grad()
def check_parity(
    denoiser: Path,
    twin: Path,
    network: nn.Module,
    operators: dict[str, QuantizedOperator],
    plan: SamplingPlan,
    judge: Trajectory,
    reaches: float = math.inf,
) -> dict[str, float]:
    """SQNRs in dB and the twin's relative error, over latents spread along held-out teacher trajectories.

    `reaches` is what the graph's own type reaches in dB where the simulation has another, of REACHES.

    Raises:
        AccuQuantError: an output that is not finite, or a graph that is not the model it came from.
    """
    rows = np.linspace(0, len(plan) - 1, min(STEPS_CHECKED, len(plan))).round().astype(int).tolist()
    n = min(TRAJECTORIES_CHECKED, len(judge.seeds))
    device = next(network.parameters()).device
    options = EngineOptions(batch=n)
    condition = judge.condition_of(slice(n), device)
    fed = {name: value.cpu().numpy() for name, value in condition.items()}
    calls = [(judge.states[i, :n] * plan.steps[i].input_scale, torch.full((n,), plan.steps[i].timestep)) for i in rows]

    def of_network(active: bool) -> Outputs:
        with quantization(operators, active):
            return _stacked([network(x.to(device), t.to(device), **condition).cpu().numpy() for x, t in calls])

    def of_graph(path: Path, exact: bool) -> Outputs:
        with ExitStack() as held:
            engine = OnnxRuntimeEngine(path, options, exact=exact)
            held.callback(engine.close)
            return _stacked([np.array(engine.run({"x": x.numpy(), "t": t.numpy(), **fed})) for x, t in calls])

    fp, simulation = of_network(False), of_network(True)
    graph, of_twin = of_graph(denoiser, True), of_graph(twin, False)
    for name, values in {"fp": fp, "simulation": simulation, "graph": graph, "twin": of_twin}.items():
        if not np.isfinite(values).all():
            raise AccuQuantError(f"the {name} network gives values that are not finite on the teacher's own latents")
    facts = {
        "sqnr_simulation_db": sqnr(fp, simulation),
        "sqnr_graph_db": sqnr(fp, graph),
        "sqnr_between_db": sqnr(simulation, graph),
        "twin_relative_error": float(np.abs(of_twin - fp).max() / np.sqrt(np.square(fp).mean())),
    }
    if facts["twin_relative_error"] > TWIN_TOLERANCE:
        raise AccuQuantError(
            f"the exported fp graph differs from the model by {facts['twin_relative_error']:.1e} of its scale"
        )
    made, simulated = facts["sqnr_graph_db"], facts["sqnr_simulation_db"]

    def agree(lowest: float, highest: float) -> bool:
        most = highest + SQNR_TOLERANCE if reaches == math.inf else math.inf
        return min(lowest - SQNR_TOLERANCE, reaches) <= made <= most

    if not agree(simulated, simulated):
        lowest, highest = sqnr_range(fp, simulation, lambda: of_network(True), operators)
        if not agree(lowest, highest):
            raise AccuQuantError(
                f"the quantized graph reaches {made:.1f} dB where its simulation reaches {simulated:.1f} dB, and "
                f"{lowest:.1f} to {highest:.1f} dB by how ties are rounded: the graph is not what was calibrated"
            )
    return facts


def sqnr_range(
    fp: Outputs, simulation: Outputs, simulate: Callable[[], Outputs], operators: dict[str, QuantizedOperator]
) -> tuple[float, float]:
    """Lowest and highest SQNR in dB that a simulation may have, whose ties may be rounded to either side.

    Outputs are (rows, latents, ...); every latent counts with the most and with the least noise that one of ties.py's
    ways to break ties gives it.
    """
    found = [simulation]
    for way in tie_breaks():
        with ties_broken(operators, way):
            found.append(simulate())
    noise = np.stack([np.square(one - fp).sum(tuple(range(2, fp.ndim))) for one in found])
    signal = np.square(fp).sum()
    return _decibels(signal, noise.max(0).sum()), _decibels(signal, noise.min(0).sum())


def sqnr(reference: Outputs, other: Outputs) -> float:
    """Signal to quantization noise ratio in dB over all elements; 200 for equal arrays."""
    return _decibels(np.square(reference).sum(), np.square(other - reference).sum())


def _decibels(signal: float, noise: float) -> float:
    return float(min(200.0, 10 * np.log10(signal / max(noise, 1e-300))))


def _stacked(outputs: list[np.ndarray]) -> Outputs:
    return np.stack(outputs).astype(np.float64)
