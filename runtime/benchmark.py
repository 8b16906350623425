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
from .pipeline import Pipeline
from .timing import step_times

WARM_UP = 10
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
        steps = _steps(bundle, pipelines, repeats, lambda done: progress(done, total))
        runs: dict[str, list[float]] = {name: [] for name in pipelines}
        outside: dict[str, list[float]] = {name: [] for name in pipelines}
        for i in range(samples):
            for name in _in_turn(list(pipelines), i):
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
            "step_seconds": _spread(steps[s.name]),
            "sample_seconds": _spread(runs[s.name]),
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


def _steps(
    bundle: Bundle, pipelines: Mapping[str, Pipeline], repeats: int, progress: Callable[[int], None]
) -> dict[str, list[float]]:
    """Seconds of every step, taken in turn by the sides."""
    taken: dict[str, list[float]] = {name: [] for name in pipelines}
    batch = next(iter(pipelines.values())).batch
    x = noise.batch(range(batch), -1, bundle.manifest.sample_shape)
    fed = {name: pipeline.denoiser.feed(x, bundle.plan.steps[0].timestep) for name, pipeline in pipelines.items()}
    for i in range(WARM_UP + repeats):
        for name in _in_turn(list(pipelines), i):
            begun = time.perf_counter()
            pipelines[name].engine.run(fed[name])
            if i >= WARM_UP:
                taken[name].append(time.perf_counter() - begun)
        progress(i + 1)
    return taken


def _in_turn(names: list[str], i: int) -> list[str]:
    """Who goes first changes every time, so that no one always finds the same other's caches."""
    turned = i % len(names)
    return names[turned:] + names[:turned]


def _spread(seconds: list[float]) -> dict[str, float]:
    p10, median, p90 = np.percentile(seconds, [10, 50, 90])
    return {"median": float(median), "p10": float(p10), "p90": float(p90), "n": len(seconds)}
