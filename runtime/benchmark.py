"""The fp twin and the int engine, measured against each other in one run.

Where the machine computes in bfloat16, both are measured in it too: that is the speed-up that integers have to beat.
Steps of all sides are interleaved, so that whatever else the machine does falls on all alike; a ratio exists only
because its sides were measured in the same run. Peak memory is measured in processes of their own, and where a step's
time goes in a run of its own, since both would disturb the rest.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from . import noise
from .bundle import Bundle, NetworkName
from .engines import rests
from .engines.base import EngineOptions, Rest
from .footprint import footprint
from .interleave import WARM_UP, in_turn, interleaved, spread
from .pipeline import Pipeline
from .timing import step_times

PROFILED = 20  # steps, for where the time goes


class Side(NamedTuple):
    """One of the things compared: a network of the bundle and what it computes in besides integers."""

    name: str
    network: NetworkName
    rest: Rest


def sides_of(bundle: Bundle, engine: str) -> list[Side]:
    """fp32 first, that all others are compared with."""
    short = {"float32": "fp32", "bfloat16": "bf16"}
    known = rests(engine, bundle.manifest.target)
    twins = [Side(short[rest], "twin", rest) for rest in known]
    scheme = bundle.manifest.scheme
    return [*twins, *(Side(f"{scheme}, {short[rest]} rest", "denoiser", rest) for rest in known)]


def measure(
    bundle: Bundle,
    sides: Sequence[Side],
    engine: str,
    options: EngineOptions,
    repeats: int,
    samples: int,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """One batch size: seconds per step and per sampling run, ratios to the first side, memory, where time goes."""
    of_side = {s.name: replace(options, rest=s.rest) for s in sides}
    pipelines = {
        s.name: Pipeline(
            bundle, network=s.network, engine=engine, batch=options.batch, threads=options.threads, rest=s.rest
        )
        for s in sides
    }
    total = WARM_UP + repeats + samples + 2 * len(sides)
    try:
        clocks = {name: _Clock(pipeline) for name, pipeline in pipelines.items()}
        steps = interleaved(steps_of(pipelines), repeats, lambda done, _: progress(done, total))
        runs: dict[str, list[float]] = {name: [] for name in pipelines}
        outside: dict[str, list[float]] = {name: [] for name in pipelines}
        for i in range(samples):
            for name in in_turn(list(pipelines), i):
                seconds, inside = clocks[name].time(range(options.batch))
                runs[name].append(seconds)
                outside[name].append((seconds - inside) / inside)
            progress(WARM_UP + repeats + i + 1, total)
        library = pipelines[sides[0].name].engine.name
    finally:
        for pipeline in pipelines.values():
            pipeline.close()
    first = sides[0].name
    measured: dict[str, Any] = {}
    for n, s in enumerate(sides):
        memory = footprint(bundle, s.network, engine, of_side[s.name])
        progress(total - 2 * (len(sides) - n) + 1, total)
        times = step_times(bundle, s.network, engine, of_side[s.name], PROFILED)
        progress(total - 2 * (len(sides) - n) + 2, total)
        measured[s.name] = {
            "step_seconds": spread(steps[s.name]),
            "sample_seconds": spread(runs[s.name]),
            "step_speedup": float(np.median(steps[first]) / np.median(steps[s.name])),
            "sample_speedup": float(np.median(runs[first]) / np.median(runs[s.name])),
            "loop_overhead": float(np.median(outside[s.name])),
            "peak_bytes": memory,
            "profile": {"operators": times.operators, "others": times.others},
        }
    return {"batch": options.batch, "engine": library, "sides": measured}


def slower(sides: Mapping[str, Any], fp: str, low: str) -> dict[str, tuple[float, float]]:
    """Operators that take longer on side `low` than on `fp`: microseconds of both, what costs most first."""
    ours, theirs = sides[low]["profile"]["operators"], sides[fp]["profile"]["operators"]
    lost = {name: (theirs[name], ours[name]) for name in ours if ours[name] > theirs.get(name, 0.0) > 0.0}
    return dict(sorted(lost.items(), key=lambda item: item[1][0] - item[1][1]))


class _Clock:
    """Times a pipeline's runs, and within them the engine."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline, self._run, self._inside = pipeline, pipeline.engine.run, 0.0
        pipeline.engine.run = self._timed  # type: ignore[method-assign]

    def _timed(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        begun = time.perf_counter()
        result = self._run(inputs)
        self._inside += time.perf_counter() - begun
        return result

    def time(self, seeds: Sequence[int]) -> tuple[float, float]:
        """Seconds of a whole run, and those of them that the engine took."""
        self._inside, begun = 0.0, time.perf_counter()
        self._pipeline.generate(seeds)
        return time.perf_counter() - begun, self._inside


def steps_of(pipelines: Mapping[str, Pipeline]) -> dict[str, Callable[[], object]]:
    """One network call of each, with nothing of the loop around it."""

    def step(pipeline: Pipeline) -> Callable[[], object]:
        x = noise.batch(range(pipeline.batch), -1, pipeline.shape)
        fed = pipeline.denoiser.feed(x, pipeline.plan.steps[0].timestep)
        return lambda: pipeline.engine.run(fed)

    return {name: step(pipeline) for name, pipeline in pipelines.items()}
