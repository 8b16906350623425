"""Is the graph the model? Checks that stand between a lowered graph and a bundle.

Two correct executions of one deep Q/DQ graph drift apart: a value that falls on a rounding boundary flips by one code,
and flips spread until they are as large as the quantization noise itself. So graphs are not compared element by
element but by how far each stands from full precision,

    SQNR = 10 log10( sum ||o_fp||^2 / sum ||o - o_fp||^2 ),

which must agree between the torch simulation and ONNX Runtime's unoptimised execution, on the teacher's own latents.
"""

import math
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn

from ..calibrate.layers import QuantizedOperator, quantization
from ..calibrate.trajectory import Trajectory
from ..runtime.engines.base import EngineOptions
from ..runtime.engines.onnxruntime import OnnxRuntimeEngine
from ..runtime.errors import AccuQuantError
from ..runtime.plan import SamplingPlan

STEPS_CHECKED, TRAJECTORIES_CHECKED = 8, 4
SQNR_TOLERANCE = 0.5  # dB; rounding flips moved it by at most 0.3 dB on the U-Nets tried
CHANCE = 2.0  # dB that the scatter of few latents may explain, at most
# dB; with nothing quantized float16 alone reached 61 and 79 on the U-Nets tried, and bfloat16 38 and 42
REACHES = {"float32": math.inf, "float16": 55.0, "bfloat16": 30.0}
TWIN_TOLERANCE = 1e-3  # of the output's root mean square: float32 in another order


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
    outputs: dict[str, list[np.ndarray]] = {"fp": [], "simulation": [], "graph": [], "twin": []}
    options = EngineOptions(batch=n)
    engines = {"graph": OnnxRuntimeEngine(denoiser, options, exact=True), "twin": OnnxRuntimeEngine(twin, options)}
    condition = judge.condition_of(slice(n), device)
    fed = {name: value.cpu().numpy() for name, value in condition.items()}
    for i in rows:
        step = plan.steps[i]
        x = judge.states[i, :n] * step.input_scale
        t = torch.full((n,), step.timestep)
        for name, active in (("fp", False), ("simulation", True)):
            with quantization(operators, active):
                outputs[name].append(network(x.to(device), t.to(device), **condition).cpu().numpy())
        for name, engine in engines.items():
            outputs[name].append(np.array(engine.run({"x": x.numpy(), "t": t.numpy(), **fed})))
    for engine in engines.values():
        engine.close()
    stacked = {name: np.stack(many).astype(np.float64) for name, many in outputs.items()}
    for name, values in stacked.items():
        if not np.isfinite(values).all():
            raise AccuQuantError(f"the {name} network gives values that are not finite on the teacher's own latents")
    fp = stacked["fp"]
    facts = {
        "sqnr_simulation_db": sqnr(fp, stacked["simulation"]),
        "sqnr_graph_db": sqnr(fp, stacked["graph"]),
        "sqnr_between_db": sqnr(stacked["simulation"], stacked["graph"]),
        "twin_relative_error": float(np.abs(stacked["twin"] - fp).max() / np.sqrt(np.square(fp).mean())),
    }
    if facts["twin_relative_error"] > TWIN_TOLERANCE:
        raise AccuQuantError(
            f"the exported fp graph differs from the model by {facts['twin_relative_error']:.1e} of its scale"
        )
    simulated, made = facts["sqnr_simulation_db"], facts["sqnr_graph_db"]
    noise = [np.square(stacked[name] - fp).sum(tuple(range(2, fp.ndim))) for name in ("simulation", "graph")]
    allowed = tolerance(*noise)
    lowest = min(simulated - allowed, reaches)
    highest = simulated + (allowed if reaches == math.inf else math.inf)
    if not lowest <= made <= highest:
        raise AccuQuantError(
            f"the quantized graph reaches {made:.1f} dB where its simulation reaches {simulated:.1f} dB: "
            "the graph is not what was calibrated"
        )
    return facts


def tolerance(simulated: np.ndarray, made: np.ndarray) -> float:
    """In dB: by how much two SQNRs may differ whose noise energies are these, one for every latent looked at.

    SQNR_TOLERANCE, or what chance explains: three standard errors of the differences, as far as CHANCE. A value on a
    rounding boundary, such as cos 0 in a time embedding, goes either way and takes a whole step of a small network
    along; where all latents differ alike there is nothing to be explained by it.
    """
    differences = (made - simulated).ravel()
    spread = 3 * differences.std(ddof=1) * len(differences) ** 0.5 if len(differences) > 1 else 0.0
    explained = 10 * np.log10(1 + spread / max(simulated.sum(), 1e-300))
    return float(min(max(SQNR_TOLERANCE, explained), CHANCE))


def sqnr(reference: np.ndarray, other: np.ndarray) -> float:
    """Signal to quantization noise ratio in dB over all elements; 200 for equal arrays."""
    noise = np.square(other - reference).sum()
    return float(min(200.0, 10 * np.log10(np.square(reference).sum() / max(noise, 1e-300))))
