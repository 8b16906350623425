"""What only a GPU can show, stage by stage; verify_on_gpu.py runs each in a process of its own.

    python tools/gpu_stages.py STAGE REQUEST.json ANSWER.json

A crash in a driver, or a fault that leaves CUDA unusable for the rest of a process, costs one stage and no other. A
stage answers with facts and with claims: sentences that were true or false there.
"""

import ctypes.util
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from accuquant.calibrate.scheme import QuantScheme, parse_precision
from accuquant.calibrate.spec import PRESETS, CalibrationSpec
from accuquant.export import build as building
from accuquant.export.compare import LEAST_IN_16_BITS, layers_alone, run_chains
from accuquant.export.facts import versions
from accuquant.export.verify import REACHES, SQNR_TOLERANCE
from accuquant.runtime import noise
from accuquant.runtime.benchmark import steps_of
from accuquant.runtime.bundle import Bundle
from accuquant.runtime.engines import GPU_ENGINES, has_library, open_engine
from accuquant.runtime.engines.base import EngineOptions
from accuquant.runtime.engines.cuda import gpu
from accuquant.runtime.errors import AccuQuantError
from accuquant.runtime.inspection import judge, operator_precisions
from accuquant.runtime.interleave import gain, interleaved, spread
from accuquant.runtime.pipeline import Pipeline

TARGET = "tensorrt"
LIBRARIES = (
    "tensorrt", "tensorrt-cu12", "tensorrt-cu13", "tensorrt-rtx", "tensorrt-rtx-cu13", "cuda-bindings",
    "onnxruntime-gpu",
)  # fmt: skip
ASKED_OF_DRIVER = "name,driver_version,compute_cap,memory.total,clocks.max.sm,clocks.sm,pstate,temperature.gpu"
# Enough for ranges and rounding that are not nonsense; what is verified is the engine, not the calibration.
SHORT = PRESETS["smoke"] | {"initialisation": "min-max", "compensate": "never"}
STEADY_RUNS = 6  # the third is the first that a captured graph makes
END_TOLERANCE = 1.5  # times the standard's distance at the end of the chain; rounding flips moved it by a tenth


@dataclass
class Findings:
    """What a stage saw: sentences that hold or do not, and what stands behind them."""

    claims: dict[str, bool] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


def machine() -> Findings:
    """The GPU, its driver, and every library that has a hand in it; which engines could run here."""
    found, name = Findings(), gpu()
    try:
        told = subprocess.run(
            ["nvidia-smi", f"--query-gpu={ASKED_OF_DRIVER}", "--format=csv,noheader"],
            capture_output=True, text=True, check=True,
        ).stdout.splitlines()  # fmt: skip
        keys = ASKED_OF_DRIVER.split(",")
        found.facts["driver"] = [dict(zip(keys, map(str.strip, row.split(",")), strict=True)) for row in told]
    except (OSError, subprocess.CalledProcessError, ValueError) as error:
        found.facts["driver"] = f"nvidia-smi tells nothing: {error}"
    known = {}
    for library in LIBRARIES:
        try:
            known[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    found.facts |= {"gpu": name, "libraries": known, "versions": versions()}
    found.facts["engines"] = [engine for engine in GPU_ENGINES if name and has_library(engine)]
    if name is None:
        driver = "a" if ctypes.util.find_library("cuda") else "no"
        bindings = known.get("cuda-bindings", "not installed")
        found.facts["why_not"] = f"no GPU that CUDA can use ({driver} driver of NVIDIA's, cuda-bindings {bindings})"
    return found


def export(checkpoint: str, bits: str, steps: int, out: str) -> Findings:
    """A bundle for TensorRT, calibrated for as short as makes sense."""
    scheme = QuantScheme.model_validate({"target": TARGET, "rest": "float16"} | parse_precision(bits))
    asked = SHORT | ({"trajectories": 1, "iterations": 0} if scheme.nothing_quantized else {})
    request = building.Request(
        Path(checkpoint), Path(out), scheme, CalibrationSpec.model_validate(asked), steps=steps, pictures=4
    )
    made = building.build(request, building.prepare(request), lambda *_: None)
    return Findings(facts={"scheme": scheme.name, "psnr_db": float(made.comparison.psnr.mean()), "n": 4})


def build(bundle: str, engine: str, batch: int) -> Findings:
    """Compile, load, run the same input again and again: always the same bytes, from a captured graph or not."""
    opened, begun = Bundle(Path(bundle)), time.perf_counter()
    running = open_engine(opened.graph("denoiser"), EngineOptions(batch=batch), engine, TARGET)
    built = time.perf_counter() - begun
    rng = np.random.default_rng(0)
    fed = {port.name: np.zeros(port.shape, port.dtype) for port in running.inputs}
    fed["x"][:] = rng.standard_normal(fed["x"].shape)
    fed["t"].fill(opened.plan.steps[0].timestep)
    made = [np.array(running.run(fed)) for _ in range(STEADY_RUNS)]
    facts = {"engine": running.name, "batch": batch, "seconds": built}
    running.close()
    begun = time.perf_counter()
    open_engine(opened.graph("denoiser"), EngineOptions(batch=batch), engine, TARGET).close()
    facts["seconds_from_cache"] = time.perf_counter() - begun
    claims = {
        "all values are finite": bool(np.isfinite(made[0]).all()),
        "the same input gives the same bytes, run after run": all(np.array_equal(made[0], other) for other in made),
    }
    return Findings(claims, facts)


def precision(bundle: str, engine: str) -> Findings:
    """Kernel by kernel, in the library's words."""
    opened = Bundle(Path(bundle))
    running = open_engine(opened.graph("denoiser"), EngineOptions(batch=1), engine, TARGET)
    kernels = Counter(f"{kernel.kind} {kernel.precision}" for kernel in running.kernels())
    verdicts = judge(opened.manifest.operators, operator_precisions(running, opened.manifest.operators))
    running.close()
    facts = {
        "kernels": dict(kernels.most_common()),
        "operators": dict(Counter(verdict.got for verdict in verdicts).most_common()),
        "others": [asdict(verdict) for verdict in verdicts if verdict.why],
    }
    claims = {"the library tells its kernels": bool(kernels)}
    if verdicts:
        claims["every operator runs in the precision that was asked"] = not facts["others"]
    return Findings(claims, facts)


def numerics(bundle: str, engine: str, n: int) -> Findings:
    """Against fp32 and the standard, both on ONNX Runtime's CPU: alone at every step, and accumulated to the end."""
    opened = Bundle(Path(bundle))
    chains = run_chains(opened, engine, range(n), lambda *_: None, twin_engine="onnxruntime")
    standard, ours = (float(np.mean(course.alone)) for course in (chains.standard, chains.engine))
    ends = [course.accumulated[-1] for course in (chains.standard, chains.engine)]
    claims = {
        f"SQNR to fp32 is the standard's, to {SQNR_TOLERANCE:g} dB": ours
        >= min(standard - SQNR_TOLERANCE, REACHES["float16"]),
        f"the end of the chain is no more than {END_TOLERANCE:g} times as far from fp32 as the standard's": ends[1]
        <= max(END_TOLERANCE * ends[0], 10 ** (-REACHES["float16"] / 20)),
    }
    facts = {
        "n": n,
        "timesteps": [step.timestep for step in opened.plan.steps],
        "sqnr_db": {"standard": chains.standard.alone, "engine": chains.engine.alone},
        "distance": {"standard": chains.standard.accumulated, "engine": chains.engine.accumulated},
        "mean_sqnr_db": {"standard": standard, "engine": ours},
        "end_sqnr_db": {"standard": _decibels(ends[0]), "engine": _decibels(ends[1])},
    }
    return Findings(claims, facts)


def _decibels(distance: float) -> float:
    return float(-20 * np.log10(max(distance, 1e-10)))


def layers(bundle: str, engine: str, n: int) -> Findings:
    """Every operator alone, on the input that the engine itself saw there, at three steps of the chain."""
    opened = Bundle(Path(bundle))
    states: list[np.ndarray] = []
    with Pipeline(opened, network="twin", engine="onnxruntime", batch=n) as twin:
        states.append(twin.plan.init_sigma * noise.batch(range(n), -1, twin.shape) * twin.plan.steps[0].input_scale)
        twin.generate(range(n), lambda first, done, x: states.append(np.array(x)))
    for i, step in enumerate(opened.plan.steps[1:], 1):
        states[i] = states[i] * np.float32(step.input_scale)
    found = layers_alone(opened, engine, range(n), states, 3, lambda *_: None)
    departing = {name: {"db": db, "step": step} for name, (db, step) in found.items() if not db >= LEAST_IN_16_BITS}
    worst = min((db for db, _ in found.values()), default=None)
    claim = f"every layer computes what the standard does from its input, to {LEAST_IN_16_BITS:g} dB"
    facts = {"n": n, "layers": len(found), "worst_db": worst, "departing": departing}
    return Findings({claim: not departing} if found else {}, facts)


def benchmark(bundles: Sequence[str], engine: str, batch: int, repeats: int, samples: int) -> Findings:
    """Steps and whole runs of all bundles in turn, the first one in float16: what the others must beat."""
    opened = [Bundle(Path(bundle)) for bundle in bundles]
    pipelines: dict[str, Pipeline] = {}
    try:
        for one in opened:
            pipelines[one.manifest.scheme] = Pipeline(one, engine=engine, batch=batch)
        steps = interleaved(steps_of(pipelines), repeats)
        whole = {name: partial(pipeline.generate, range(batch)) for name, pipeline in pipelines.items()}
        runs = interleaved(whole, samples, warm_up=1, run_up=0)
        library = next(iter(pipelines.values())).engine.name
    finally:
        for pipeline in pipelines.values():
            pipeline.close()
    base = next(iter(pipelines))
    sides = {
        name: {
            "step_seconds": spread(steps[name]),
            "sample_seconds": spread(runs[name]),
            "step_speedup": float(np.median(steps[base]) / np.median(steps[name])),
            "sample_speedup": float(np.median(runs[base]) / np.median(runs[name])),
            "step_saved": asdict(gain(steps[base], steps[name])),
        }
        for name in pipelines
    }
    claims = {
        f"a step of {name} is faster than one of {base} at batch {batch}": side["step_saved"]["low"] > 0
        for name, side in sides.items()
        if name != base
    }
    return Findings(claims, {"engine": library, "batch": batch, "sides": sides})


STAGES: Mapping[str, Callable[..., Findings]] = {
    stage.__name__: stage for stage in (machine, export, build, precision, numerics, layers, benchmark)
}


def main(stage: str, request: str, answer: str) -> None:
    try:
        told: dict[str, Any] = asdict(STAGES[stage](**json.loads(Path(request).read_text())))
    except AccuQuantError as error:
        told = {"failed": str(error)}
    except Exception as error:  # whatever it is, it is this stage's own
        told = {"failed": f"{type(error).__name__}: {error}"}
    Path(answer).write_text(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
