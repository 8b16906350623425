"""Which layers this machine runs faster in float, measured on the engine that the bundle is for.

A layer in integers pays for quantizing its input and, where its neighbours are in float, for other layouts. So

    groups     operators of one kind, with weights and results of one shape, run alike and are measured together
    noise      pairs of engines of one and the same graph: by how much engines are apart that differ in nothing
    alone      the engine with a group in float against the engine without, interleaved, both compiled for this one race
    together   groups that gain more than the noise, the largest first; each stays if it still gains beside those
    whole      the tuned engine against the untuned, compiled anew; is it not faster by more than noise, all is dropped

Speed does not depend on what calibration learns, so it is measured before, with plausible ranges; what is in float then
is a part of the scheme, which calibration, graph and bundle follow.
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import onnx_ir as ir

from ..calibrate.initialise import set_plausible
from ..calibrate.model import DiffusionModel, quantize
from ..calibrate.recipe import Recipe, freeze
from ..calibrate.scheme import QuantScheme
from ..runtime import noise
from ..runtime.console import machine_facts
from ..runtime.denoiser import engine_batch
from ..runtime.engines import GPU_ENGINES, choose, open_engine
from ..runtime.engines.base import Engine, EngineOptions
from ..runtime.errors import AccuQuantError
from ..runtime.interleave import Gain, gain, interleaved
from ..runtime.plan import SamplingPlan
from .graph import operator_nodes, save_graph, trace_float
from .lower import LAST_REWRITES, lower
from .passes.cast_rest import cast_rest
from .passes.time_table import time_table
from .tuning import GroupDecision, Saving, Tuning

ROUNDS, FINAL_ROUNDS = 40, 100  # of a group, and of the whole
SAME = 3  # pairs of engines of one graph
Floats = frozenset[str]  # operators in float
Show = Callable[[str, int, int, str], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Race:
    """What the second of two engines saves of the first, and the median seconds of a step of both."""

    gain: Gain
    seconds: tuple[float, float]


class Workshop:
    """Makes engines of a model with any of its operators in float."""

    def __init__(
        self,
        model: DiffusionModel,
        plan: SamplingPlan,
        scheme: QuantScheme,
        *,
        batch: int,
        guidance: float = 1.0,
        table: bool = True,
    ) -> None:
        self.target, self.rest = scheme.target, scheme.rest
        self.batch, self.options = batch, EngineOptions(engine_batch(batch, guidance))
        self._timesteps = [step.timestep for step in plan.steps]
        self._table = table
        operators = quantize(model, scheme)
        set_plausible(operators)
        self._recipe = freeze(operators, scheme, {})
        self._graph = trace_float(model.network, operators, model.sample_shape, model.condition([0]))
        self._given = {
            "x": noise.batch(range(batch), -1, model.sample_shape),
            "t": np.array(self._timesteps[:1], np.float32),
            **{name: rows.numpy() for name, rows in model.condition(range(batch)).items()},
        }

    def groups(self) -> dict[str, Floats]:
        """The operators that are computed at every step, by form."""
        left, traced = operator_nodes(self._lowered(frozenset())), operator_nodes(self._graph)
        found: dict[str, set[str]] = {}
        for name, facts in self._recipe.facts.operators.items():
            if name in left:
                codes, result = self._recipe.codes.get(name), traced[name].outputs[0].shape
                weight = "" if codes is None else f" {'x'.join(map(str, codes.shape))}"
                form = f"{facts.kind}{weight} to {'x'.join(map(str, list(result or ())[1:]))}"
                found.setdefault(form, set()).add(name)
        return {form: frozenset(names) for form, names in found.items()}

    def engine(self, in_float: Floats, folder: Path) -> Engine:
        save_graph(self._lowered(in_float), folder / "denoiser.onnx")
        return open_engine(folder / "denoiser.onnx", self.options, target=self.target)

    def feed(self, engine: Engine) -> dict[str, np.ndarray]:
        return {port.name: np.resize(self._given[port.name], port.shape).astype(port.dtype) for port in engine.inputs}

    def _lowered(self, in_float: Floats) -> ir.Model:
        recipe = _without(self._recipe, in_float)
        graph, _ = lower(self._graph, recipe, self.target)
        for rewrite in LAST_REWRITES[self.target]:
            rewrite(graph, recipe)
        if self._table:
            time_table(graph, self._timesteps)
        if self.rest != "float32":
            cast_rest(graph, self.rest)
        return graph


def race(shop: Workshop, before: Floats, after: Floats, rounds: int) -> Race:
    """Two engines, compiled now and run in turn; so no race inherits where in memory another one's engines lay."""
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        engines = [shop.engine(before, Path(first)), shop.engine(after, Path(second))]
        try:
            fed = [shop.feed(engine) for engine in engines]
            taken = interleaved(
                {"before": lambda: engines[0].run(fed[0]), "after": lambda: engines[1].run(fed[1])}, rounds
            )
        finally:
            for engine in engines:
                engine.close()
    seconds = (float(np.median(taken["before"])), float(np.median(taken["after"])))
    return Race(gain(taken["before"], taken["after"]), seconds)


def tune(shop: Workshop, show: Show = lambda *_: None) -> Tuning:
    """Measure and decide.

    Raises:
        AccuQuantError: this machine has no engine that the bundle is for, or is faster with every layer in float.
    """
    engine = _engine_name(shop)
    groups = shop.groups()
    total = SAME + len(groups)

    def measured(stage: str, done: int, before: Floats, after: Floats, rounds: int, note: str) -> Race:
        found = race(shop, before, after, rounds)
        show(stage, done, total, note)
        return found

    nothing: Floats = frozenset()
    same = [measured("tuning", k + 1, nothing, nothing, ROUNDS, "noise").gain for k in range(SAME)]
    apart = max(max(abs(g.low), abs(g.high)) for g in same)
    alone = {
        form: measured("tuning", SAME + k + 1, nothing, layers, ROUNDS, form).gain
        for k, (form, layers) in enumerate(groups.items())
    }
    chosen = _together(shop, groups, alone, apart)
    everything = frozenset[str]().union(*groups.values())
    in_float = nothing.union(*(groups[form] for form in chosen))
    whole = race(shop, nothing, in_float, FINAL_ROUNDS) if chosen else None
    if whole is not None and whole.gain.low <= apart:
        chosen = []
    if chosen and in_float == everything:
        raise AccuQuantError(f"{engine} on this machine is faster with every layer in float; export without --tune")
    return Tuning(
        target=shop.target,
        engine=engine,
        machine=machine_facts(),
        batch=shop.batch,
        noise=apart,
        groups=tuple(
            GroupDecision(form=form, layers=tuple(sorted(layers)), saves=_saving(alone[form]), in_float=form in chosen)
            for form, layers in groups.items()
        ),
        whole=None if whole is None else _saving(whole.gain),
        step_seconds=None if whole is None else whole.seconds,
    )


def _together(shop: Workshop, groups: Mapping[str, Floats], alone: Mapping[str, Gain], apart: float) -> list[str]:
    """Forms that gain alone, and still gain beside those that were taken before them."""
    chosen: list[str] = []
    in_float: Floats = frozenset()
    for form in sorted((f for f in groups if alone[f].low > apart), key=lambda f: -alone[f].median):
        if not chosen or race(shop, in_float, in_float | groups[form], ROUNDS).gain.low > apart:
            chosen.append(form)
            in_float |= groups[form]
    return chosen


def _engine_name(shop: Workshop) -> str:
    """Of the engine that bundles for this target are made for."""
    name = choose("auto", shop.target)
    if shop.target == "tensorrt" and name not in GPU_ENGINES:
        raise AccuQuantError("--tune measures on the engine that the bundle is for, and no NVIDIA GPU is here to do so")
    with tempfile.TemporaryDirectory() as folder:
        engine = shop.engine(frozenset(), Path(folder))
        found = engine.name
        engine.close()
    return found


def _without(recipe: Recipe, names: Floats) -> Recipe:
    """The recipe of all other operators."""

    def rest(held: Mapping[str, T]) -> dict[str, T]:
        return {name: value for name, value in held.items() if name not in names}

    facts = recipe.facts.model_copy(update={"operators": rest(recipe.facts.operators)})
    codes, scales, shifts = rest(recipe.codes), rest(recipe.scales), rest(recipe.shifts)
    return Recipe(facts, codes, scales, shifts, rest(recipe.smoothings), recipe.correction)


def _saving(found: Gain) -> Saving:
    return Saving(**asdict(found))
