"""Graphs side by side on this machine's engines: what they multiply in integers, how fast, and where sampling ends."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from accuquant.runtime import noise
from accuquant.runtime.engines import open_engine
from accuquant.runtime.engines.base import Engine, EngineOptions
from accuquant.runtime.engines.compile_plan import CompileRequest, compile_plan, installed
from accuquant.runtime.engines.rtx_log import PRODUCTS
from accuquant.runtime.errors import AccuQuantError
from accuquant.runtime.inspection import LOW_BIT, multiplies
from accuquant.runtime.interleave import interleaved
from accuquant.runtime.plan import SamplingPlan
from scores import of_twins

BATCH = 8  # of sampling


@dataclass(frozen=True)
class Run:
    """Latents along the chain (steps, n, C, H, W) of seeds 0..n-1."""

    states: np.ndarray

    @property
    def end(self) -> np.ndarray:
        return self.states[-1]


def sample(graph: Path, engine: str, plan: SamplingPlan, seeds: Sequence[int], shape: tuple[int, ...]) -> Run:
    """Every seed through the whole plan."""
    opened = open_engine(graph, EngineOptions(batch=BATCH), engine)
    states = np.empty((len(plan), len(seeds), *shape), np.float32)
    try:
        for first in range(0, len(seeds), BATCH):
            some = list(seeds[first : first + BATCH])
            full = some + some[-1:] * (BATCH - len(some))

            def network(x: np.ndarray, t: float) -> np.ndarray:
                return opened.run({"x": x, "t": np.full(BATCH, t, np.float32)}).copy()

            def keep(i: int, x: np.ndarray, first: int = first, count: int = len(some)) -> None:
                states[i, first : first + count] = x[:count]

            plan.sample(network, lambda j, full=full: noise.batch(full, j, shape), keep)  # type: ignore[misc]
    finally:
        opened.close()
    return Run(states)


def fidelity(fp: Run, other: Run) -> dict[str, Any]:
    """Of final pictures to the twin's, and of latents along the way: relative distance, median over seeds."""
    flat_fp, flat = (run.states.reshape(*run.states.shape[:2], -1) for run in (fp, other))
    drift = np.linalg.norm(flat - flat_fp, axis=2) / np.linalg.norm(flat_fp, axis=2)
    return {**of_twins(fp.end, other.end), "drift": np.median(drift, axis=1).tolist()}


def coverage(graph: Path, engine: str) -> dict[str, int]:
    """Of the kernels that multiply, by the engine's report, how many do so in few bits, how many it keeps from it."""
    opened = open_engine(graph, EngineOptions(batch=1), engine)
    try:
        products = [kernel for kernel in opened.kernels() if multiplies(kernel)]
        kept = opened.kept_in_float
    finally:
        opened.close()
    held = sum(any(node.partition("/")[0] in kept for node in kernel.nodes) for kernel in products)
    return {"low_bit": sum(k.precision in LOW_BIT for k in products), "kept_in_float": held, "all": len(products)}


def compiled(graph: Path, gpu: str, folder: Path) -> dict[str, Any]:
    """The same by TensorRT-RTX's word, ahead of time, with the plan's size; or why there is no plan."""
    if not installed():
        return {"refused": "TensorRT-RTX is not installed"}
    try:
        made = compile_plan(CompileRequest(graph, gpu), folder / "plan")
    except AccuQuantError as error:
        return {"refused": str(error)}
    products = [k for k in made.kernels if k.kind in PRODUCTS]
    return {
        "gpu": gpu,
        "low_bit": sum(k.precision in LOW_BIT for k in products),
        "all": len(products),
        "plan_bytes": (folder / "plan").stat().st_size,
        "weights_bytes": made.weights_bytes,
    }


def step_seconds(
    graphs: Mapping[str, tuple[Path, str]],
    timesteps: Sequence[float],
    shape: tuple[int, ...],
    batch: int,
    repeats: int,
    threads: int,
    tell: Callable[[int, int], None],
) -> dict[str, dict[str, float]]:
    """Median CPU seconds of a step of every (graph, engine), all of them interleaved in one run."""
    opened: dict[str, Engine] = {
        name: open_engine(graph, EngineOptions(batch=batch, threads=threads), engine)
        for name, (graph, engine) in graphs.items()
    }
    x, calls = noise.batch(range(batch), -1, shape), {}
    for name, engine in opened.items():
        fed = cycle({"x": x, "t": np.full(batch, t, np.float32)} for t in timesteps)
        calls[name] = partial(_step, engine, fed)
    taken = interleaved(calls, repeats, tell, warm_up=3, clock=time.process_time)
    for engine in opened.values():
        engine.close()
    return {name: {"cpu": float(np.median(seconds))} for name, seconds in taken.items()}


def _step(engine: Engine, inputs: Iterator[Mapping[str, np.ndarray]]) -> None:
    engine.run(next(inputs))
