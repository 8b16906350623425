"""Where do an engine and the standard part ways? A bundle's graph run by both, along the chain and layer by layer.

Three runs of the same seeds: the float twin, the quantized graph as the ONNX standard defines it (ONNX Runtime, nothing
optimised), and the quantized graph on the engine.

    alone         at every step both quantized runs get the twin's latent; SQNR of each to the twin's output
    accumulated   each on its own chain; relative distance of its latent to the twin's
    layers        every operator alone: on the input that the engine itself saw there, the engine's output against what
                  the standard computes from that input; but for results that a value on a rounding boundary reaches,
                  where both codes are right

Two correct executions part by rounding flips that spread through the network, so outputs between the two are no
measure, and neither is a layer's on another's input. Equal SQNRs are, and layers on one input; the first layer in the
order of the graph that departs on its own input is the one to look at.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ..runtime import noise
from ..runtime.bundle import Bundle
from ..runtime.conditions import open_conditions
from ..runtime.denoiser import Denoiser, engine_batch
from ..runtime.engines import open_engine
from ..runtime.engines.base import Engine, EngineOptions
from ..runtime.engines.onnxruntime import OnnxRuntimeEngine
from .graph import operator_nodes, operator_parts, save_graph
from .part import Part
from .places import Form, Place, operator_places, show_places
from .verify import sqnr

# dB; of graphs in 16 bits, whose every value is rounded to those and not always in one place, 51 were seen.
LEAST, LEAST_IN_16_BITS = 60.0, 45.0
# Of the largest value: closer than that to a rounding boundary, either code is right; of inputs, and of sums.
NEAR, NEAR_OF_SUMS = 2.0**-21, 2.0**-18
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Course:
    """By step: SQNR in dB on the twin's latents, and the median relative distance to the twin on its own chain."""

    alone: list[float]
    accumulated: list[float]


@dataclass(frozen=True)
class Departure:
    """What was found: both courses, each layer's SQNR in dB at the step where it is worst, and the names."""

    standard: Course
    engine: Course
    layers: dict[str, tuple[float, int]]
    engine_name: str

    def first(self, least: float) -> str | None:
        """The first layer, in the order of the graph, that computes something else than the standard."""
        return next((name for name, (db, _) in self.layers.items() if not db >= least), None)


def expected_of(bundle: Bundle) -> float:
    """dB that a layer must reach on its own input."""
    values = [value for node in ir.load(bundle.graph("denoiser")).graph for value in node.outputs]
    wide = not any(value.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16) for value in values)
    return LEAST if wide else LEAST_IN_16_BITS


def compare(bundle: Bundle, engine: str, seeds: Sequence[int], steps: int, progress: Progress) -> Departure:
    """Compare an engine with the standard on `seeds`, layers at `steps` steps spread over the chain.

    Raises:
        AccuQuantError: no such engine here, or an operator that the manifest names is not in the graph.
    """
    length = len(bundle.plan)
    total = 3 * length + steps
    chains = run_chains(bundle, engine, seeds, lambda done, _: progress(done, total))
    layers = layers_alone(
        bundle, engine, seeds, chains.states, steps, lambda done, _: progress(3 * length + done, total)
    )
    return Departure(chains.standard, chains.engine, layers, chains.engine_name)


@dataclass(frozen=True)
class Chains:
    """Both courses, and what the twin is called with at every step with its final latent behind: (B, C, H, W) each."""

    standard: Course
    engine: Course
    states: list[np.ndarray]
    engine_name: str


def run_chains(
    bundle: Bundle, engine: str, seeds: Sequence[int], progress: Progress, twin_engine: str = "auto"
) -> Chains:
    """Sample `seeds` with the twin, with the standard and with an engine; raises as `compare` does."""
    options, target = EngineOptions(engine_batch(len(seeds), _guidance(bundle))), bundle.manifest.target
    length = len(bundle.plan)
    twin = open_engine(bundle.graph("twin"), options, twin_engine, target)
    states, outputs = _chain(bundle, _denoiser(bundle, twin, seeds), seeds, lambda done: progress(done, 3 * length))
    twin.close()
    courses = []
    standard = OnnxRuntimeEngine(bundle.graph("denoiser"), options, exact=True)
    running = open_engine(bundle.graph("denoiser"), options, engine, target)
    for k, run in enumerate((standard, running), 1):
        called = _denoiser(bundle, run, seeds)
        own, _ = _chain(bundle, called, seeds, lambda done, k=k: progress(k * length + done, 3 * length))  # type: ignore[misc]
        courses.append(_course(bundle, called, states, outputs, own))
        run.close()
    return Chains(courses[0], courses[1], states, running.name)


def _guidance(bundle: Bundle) -> float:
    known = bundle.manifest.conditioning
    return 1.0 if known is None else known.guidance


def _denoiser(bundle: Bundle, engine: Engine, seeds: Sequence[int]) -> Denoiser:
    guidance, conditions = _guidance(bundle), open_conditions(bundle)
    denoiser = Denoiser(engine, len(seeds), guidance)
    if conditions is not None:
        free = None if guidance == 1.0 else conditions.free()
        denoiser.under(conditions.rows(conditions.wishes(seeds)), free)
        conditions.close()
    return denoiser


def _chain(
    bundle: Bundle, denoiser: Denoiser, seeds: Sequence[int], progress: Callable[[int], None]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Network inputs at every step with the final latent behind them, and network outputs."""
    inputs: list[np.ndarray] = []
    outputs: list[np.ndarray] = []

    def network(x: np.ndarray, timestep: float) -> np.ndarray:
        inputs.append(np.array(x))
        outputs.append(denoiser(x, timestep))
        progress(len(outputs))
        return outputs[-1]

    shape = bundle.manifest.sample_shape
    end = bundle.plan.sample(network, lambda j: noise.batch(seeds, j, shape))
    return [*inputs, end], outputs


def _course(
    bundle: Bundle, denoiser: Denoiser, states: list[np.ndarray], outputs: list[np.ndarray], own: list[np.ndarray]
) -> Course:
    alone = [
        sqnr(fp.astype(np.float64), denoiser(x, step.timestep).astype(np.float64))
        for step, x, fp in zip(bundle.plan.steps, states[:-1], outputs, strict=True)
    ]
    accumulated = [_distance(x, fp) for x, fp in zip(own[1:], states[1:], strict=True)]
    return Course(alone, accumulated)


def _distance(x: np.ndarray, fp: np.ndarray) -> float:
    rows, whole = (x - fp).reshape(len(x), -1), fp.reshape(len(fp), -1)
    return float(np.median(np.linalg.norm(rows, axis=1) / np.linalg.norm(whole, axis=1)))


def layers_alone(
    bundle: Bundle,
    engine: str,
    seeds: Sequence[int],
    states: list[np.ndarray],
    steps: int,
    progress: Progress,
) -> dict[str, tuple[float, int]]:
    """Every computed operator's worst SQNR in dB on the engine's own input, and at which step (from 1) it was.

    Of one that was taken apart by its output channels, every part's.
    """
    operators = bundle.manifest.operators
    model = ir.load(bundle.graph("denoiser"))
    nodes = operator_nodes(model)
    whole = {part: f for name, f in operators.items() if not f.in_table for part in operator_parts(nodes, name)}
    places = operator_places(model, {part: Form(f.kind, len(f.inputs)) for part, f in whole.items()})
    worst = dict.fromkeys(places, (float("inf"), 0))
    tied = dict(worst)  # of steps at which ties reach all of a result, which tell nothing where others tell more
    alone = {name: _Alone(model, place, bool(whole[name].inputs)) for name, place in places.items()}
    show_places(model, places)
    with tempfile.TemporaryDirectory() as folder:
        save_graph(model, Path(folder) / "shown.onnx")
        options = EngineOptions(engine_batch(len(seeds), _guidance(bundle)))
        shown = open_engine(Path(folder) / "shown.onnx", options, engine, bundle.manifest.target)
        denoiser = _denoiser(bundle, shown, seeds)
        rows = np.linspace(0, len(bundle.plan) - 1, min(steps, len(bundle.plan))).round().astype(int).tolist()
        for done, i in enumerate(rows, 1):
            fed = denoiser.feed(states[i], bundle.plan.steps[i].timestep)
            seen = {id(v): fed[str(v.name)] for v in model.graph.inputs}
            seen |= {id(v): array for v, array in zip(model.graph.outputs, shown.run_all(fed), strict=True)}
            for name, place in places.items():
                expected, either = alone[name].run(seen)
                held, left_out = (tied, np.zeros_like(either)) if either.all() else (worst, either)
                kept = np.where(left_out, expected, seen[id(place.output)])
                held[name] = min(held[name], (sqnr(expected.astype(np.float64), kept.astype(np.float64)), i + 1))
            progress(done, steps)
        shown.close()
    return {name: worst[name] if worst[name][1] else tied[name] for name in places}


class _Alone:
    """An operator as the standard computes it, and which of its results a value on a rounding boundary reaches.

    Codes do not change by moving an input by less than a rounding boundary is away. So results that change are those.
    """

    def __init__(self, model: ir.Model, place: Place, quantized: bool) -> None:
        self._inputs, self._quantized = place.inputs, quantized
        # Where the result is rounded as well, that is moved in its turn.
        written = place.output.producer()
        behind = written.inputs[0].producer() if written and written.op_type == "DequantizeLinear" else None  # type: ignore[union-attr]
        self._result = behind.inputs[0] if behind is not None else None
        self._whole = Part(model, place.inputs, [place.output, *([] if self._result is None else [self._result])])
        self._rounding = None if self._result is None else Part(model, [self._result], [place.output])

    def run(self, seen: Mapping[int, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Results from what was seen of the graph's values, by id; and, of the same shape, which ties reach."""
        given = {str(value.name): seen[id(value)] for value in (*self._inputs, *self._whole.needs)}
        expected, *result = self._whole.run(given)
        either = np.zeros(expected.shape, bool)
        if self._quantized:
            moved = [str(value.name) for value in self._inputs]
            either |= _moves(self._whole, given, moved, NEAR)
        if self._rounding is not None and self._result is not None:
            name = str(self._result.name)
            either |= _moves(self._rounding, {name: result[0]}, [name], NEAR_OF_SUMS)
        return expected, either


def _moves(part: Part, given: Mapping[str, np.ndarray], names: Sequence[str], by: float) -> np.ndarray:
    """Which of the first results change when the named inputs do, by that part of the largest."""
    ends = [
        part.run({**given, **{name: given[name] + side * by * np.abs(given[name]).max() for name in names}})[0]
        for side in (-1, 1)
    ]
    return np.asarray(ends[0] != ends[1])
