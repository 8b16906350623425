"""One calibration method run and judged: same checkpoint, grids, layer policy, trajectories, budget and seeds for all.

The budget counts network calls of one sample: a plain call is 1, one with its gradient 3. An iteration of groups of M
steps at batch B then costs (4M - K) B with the exact gradient, where K graphs are kept from the first pass, and 4 M B
with an injected one; block-wise reconstruction 3 B for an iteration of every block; a corrected output costs a call for
every row of the plan and trajectory that it is fitted to. Seconds are measured beside it.

Every outcome is lowered and sampled on this machine's engine, and its pictures are compared with those of the
full-precision twin.
"""

import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import torch
from accuquant.calibrate.blockwise import reconstruct
from accuquant.calibrate.correction import OutputCorrection
from accuquant.calibrate.families import load_model
from accuquant.calibrate.journal import Journal
from accuquant.calibrate.layers import quantization
from accuquant.calibrate.model import DiffusionModel, quantize
from accuquant.calibrate.multistep import graph_bytes
from accuquant.calibrate.optimize import calibrate
from accuquant.calibrate.recipe import freeze
from accuquant.calibrate.scheme import QuantScheme
from accuquant.calibrate.sensitivity import keep, sensitivity
from accuquant.calibrate.spec import CalibrationSpec
from accuquant.calibrate.trace import trace
from accuquant.calibrate.trajectory import call, simulate
from accuquant.export.build import JUDGE_SEEDS, TEACHER_SEEDS
from accuquant.export.graph import save_graph, trace_float
from accuquant.export.lower import lower
from accuquant.runtime import noise
from accuquant.runtime.engines import open_engine
from accuquant.runtime.engines.base import EngineOptions
from accuquant.runtime.errors import AccuQuantError
from accuquant.runtime.pictures import to_uint8
from accuquant.runtime.plan import SamplingPlan
from efficientnet_lite import features
from kid import kid
from scores import of_twins

BATCH = 16
Method = Literal["learned", "block-wise"]


@dataclass(frozen=True)
class Entry:
    """A method by name: how it is calibrated, with what settings, and on what share of the common budget."""

    name: str
    spec: CalibrationSpec
    method: Method = "learned"
    share: float = 1.0


def cost(entry: Entry, graph: int | None = None, rows: int = 0) -> float:
    """Network calls of one sample, gradients counted as two more, for a plan of so many `rows`.

    `graph` is the bytes that one sample keeps for its gradient; without it one graph is taken to fit.
    """
    return _fixed(entry, rows) + _learning(entry, graph)


def _fixed(entry: Entry, rows: int) -> int:
    """What is not by iterations."""
    spec = entry.spec
    return rows * min(spec.correct, spec.trajectories) if entry.method == "learned" else 0


def _learning(entry: Entry, graph: int | None) -> float:
    spec = entry.spec
    if entry.method == "block-wise":
        return 3 * spec.batch * spec.iterations
    m = spec.group
    fit = 1 if graph is None else max(1, spec.graph_mib * 2**20 // (graph * spec.batch))
    calls = 4 * m - min(m, fit) if spec.gradient == "exact" or m == 1 else 4 * m
    local = m if spec.start == "student" and spec.aim == "local" else 0
    return spec.batch * (3 * spec.warmup + (calls + local) * spec.iterations)


def within(entry: Entry, budget: float, graph: int | None = None, rows: int = 0) -> Entry:
    """The entry with as many iterations as its share of the budget pays for, its warm-up keeping its share of them."""
    whole = _learning(entry, graph)
    if whole == 0:
        return entry
    share = max(0.0, entry.share * budget - _fixed(entry, rows)) / whole
    changed = {"iterations": round(entry.spec.iterations * share), "warmup": round(entry.spec.warmup * share)}
    return replace(entry, spec=entry.spec.model_copy(update=changed))


class Arena:
    """What all entries share, whatever their grids: checkpoint, plan, trajectories, and the twin's pictures.

    `sampler` and `steps` are the family's own where they are left out. Errors along the chain are those of the first
    `drift_n` of the n judged seeds, in simulation.
    """

    def __init__(self, checkpoint: Path, sampler: str, steps: int, n: int, drift_n: int, spec: CalibrationSpec) -> None:
        self.checkpoint, self.n, self.drift_n = checkpoint, n, drift_n
        model = load_model(checkpoint)
        self.plan = trace(sampler or model.default_sampler, model.noise_schedule, steps or model.default_steps)
        self.shape = model.sample_shape
        self.teacher = simulate(model.network, self.plan, _seeds(TEACHER_SEEDS, spec.trajectories), self.shape)
        self.judge = simulate(model.network, self.plan, _seeds(JUDGE_SEEDS, spec.held_out), self.shape)
        self.shown = simulate(model.network, self.plan, range(self.drift_n), self.shape)
        self.fp: np.ndarray | None = None
        self.float_graph: ir.Model | None = None  # the same for all: it is of the float network
        self.sensitivities: dict[str, dict[str, float]] = {}  # by scheme: the same for all its entries

    def graph(self, scheme: QuantScheme) -> int:
        """Bytes that one sample's graph of one network call holds."""
        model = load_model(self.checkpoint)
        with quantization(quantize(model, scheme), active=True):
            return graph_bytes(model.network, self.plan, self.teacher.states[0, :1])

    def run(
        self, entry: Entry, scheme: QuantScheme, graph: int, show: Callable[[str, int, int, str], None]
    ) -> dict[str, Any]:
        """Calibrate, sample and compare; one row of the table. `graph` is for counting what it costs."""
        model = load_model(self.checkpoint)
        operators = quantize(model, scheme)
        begun, worked = time.perf_counter(), time.process_time()
        kept = self._keep_sensitive(model, operators, scheme)
        row: dict[str, Any] = {"method": entry.name, "kind": entry.method, "cost": cost(entry, graph, len(self.plan))}
        row |= {"spec": entry.spec.model_dump(), "in_8_bits": kept}
        correction = None
        if entry.method == "block-wise":
            reconstruct(
                model.network, operators, self.plan, self.teacher, entry.spec, model.block_of,
                lambda name, done, total: show(f"{entry.name}", done, total, name),
            )  # fmt: skip
        else:
            with tempfile.TemporaryDirectory() as folder:
                outcome = calibrate(
                    model.network,
                    operators,
                    self.plan,
                    self.teacher,
                    self.judge,
                    entry.spec,
                    Journal(Path(folder), {}),
                    report=lambda s, d, t, loss: show(f"{entry.name}: {s}", d, t, f"{loss:.2e}" if loss else ""),
                )
            row |= {"beginning": asdict(outcome.beginning), "held_out": outcome.held_out, "kept": outcome.kept}
            row["groups"], row["uncorrected"] = [asdict(g) for g in outcome.groups], outcome.uncorrected
            correction = outcome.correction
        row["seconds"], row["cpu_seconds"] = time.perf_counter() - begun, time.process_time() - worked
        latents, engine = self._sample(model, operators, scheme, correction)
        row["sampled_on"] = engine
        assert self.fp is not None
        return row | compare(self.fp, latents) | self._errors_by_step(model, operators)

    def _keep_sensitive(self, model: DiffusionModel, operators: Any, scheme: QuantScheme) -> list[str]:
        if not scheme.reserve:
            return []
        if scheme.name not in self.sensitivities:
            self.sensitivities[scheme.name] = sensitivity(model.network, operators, self.plan, self.teacher)
        return keep(operators, self.sensitivities[scheme.name], scheme.reserve)

    def _sample(
        self,
        model: DiffusionModel,
        operators: Any,
        scheme: QuantScheme,
        correction: OutputCorrection | None,
    ) -> tuple[np.ndarray, str]:
        with tempfile.TemporaryDirectory() as folder:
            if self.float_graph is None:
                self.float_graph = trace_float(model.network, operators, self.shape)
            quantized, twin = lower(self.float_graph, freeze(operators, scheme, {}, correction), scheme.target)
            path = Path(folder) / "denoiser.onnx"
            save_graph(quantized, path)
            latents, engine = sample(path, self.plan, self.n, self.shape, scheme.target)
            if self.fp is None:
                path = Path(folder) / "twin.onnx"
                save_graph(twin, path)
                self.fp, _ = sample(path, self.plan, self.n, self.shape, scheme.target)
            return latents, engine

    def _errors_by_step(self, model: DiffusionModel, operators: Any) -> dict[str, list[float]]:
        """Squared error of x_i along the student's own chain, and of each step taken alone from the teacher's x_i.

        Row i's own error is carried by what it adds to x_{i+1}. Mean and median over the first seeds: a few
        pictures that turn into another garment carry the mean.
        """
        with torch.no_grad(), quantization(operators, active=True):
            run = simulate(model.network, self.plan, range(self.drift_n), self.shape)
            single = torch.stack([self._single(model, i) for i in range(len(self.plan))])
        drift = (run.states[1:] - self.shown.states[1:]).square().flatten(2).mean(2)
        return {
            "accumulated_mse": drift.mean(1).tolist(),
            "accumulated_mse_median": drift.median(1).values.tolist(),
            "single_mse": single.mean(1).tolist(),
            "single_mse_median": single.median(1).values.tolist(),
        }

    def _single(self, model: DiffusionModel, i: int) -> torch.Tensor:
        error = call(model.network, self.plan, i, self.shown.states[i]) - self.shown.outputs[i]
        return error.square().flatten(1).mean(1) * self.plan.steps[i].b.get(i, 0.0) ** 2


def compare(fp: np.ndarray, quantized: np.ndarray) -> dict[str, Any]:
    """PSNR, SSIM, MSE of final latents (n, C, H, W) against the twin's; KID between halves of different seeds.

    `kid_of_fp` is what the twin itself scores there: the number that no method need beat.
    """
    a, b = to_uint8(fp), to_uint8(quantized)
    # Twins of one seed are no independent samples; halves of different seeds are.
    half = len(fp) // 2
    score = floor = None
    with suppress(AccuQuantError):  # the feature network is no dependency of ours, and small n have no subsets
        of_fp, of_other, of_int = (
            features(x[..., 0] if x.shape[-1] == 1 else x) for x in (a[:half], a[-half:], b[:half])
        )
        score, floor = kid(of_int, of_other), kid(of_fp, of_other)
    return of_twins(fp, quantized) | {
        "kid_to_fp": score and score.mean,
        "kid_to_fp_error": score and score.standard_error,
        "kid_of_fp": floor and floor.mean,
    }


def sample(path: Path, plan: SamplingPlan, n: int, shape: tuple[int, ...], target: str) -> tuple[np.ndarray, str]:
    """Final latents (n, *shape) of seeds 0..n-1 on this machine's best engine, and its name."""
    engine = open_engine(path, EngineOptions(batch=BATCH), target=target)
    done = []
    for first in range(0, n, BATCH):
        seeds = range(first, first + BATCH)
        done.append(
            plan.sample(
                lambda x, t: engine.run({"x": x, "t": np.full(BATCH, t, np.float32)}).copy(),
                lambda j, seeds=seeds: noise.batch(seeds, j, shape),  # type: ignore[misc]
            )
        )
    name = engine.name
    engine.close()
    return np.concatenate(done)[:n], name


def _seeds(first: int, count: int) -> range:
    return range(first, first + count)
