"""Checkpoint to bundle: the whole way, as one function per stage and one that runs them.

    load -> trace the sampler -> teacher trajectories -> calibrate -> freeze -> lower -> verify -> compare -> report

Everything is written into a folder beside the bundle and renamed at the end, so a bundle is complete or absent. Only
the calibration journal outlives an interruption; `resume` goes on from it.
"""

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..calibrate.begin import Beginning
from ..calibrate.cache import TrajectoryCache
from ..calibrate.estimate import Estimate, estimate
from ..calibrate.families import load_model
from ..calibrate.journal import Journal
from ..calibrate.layers import QuantizedOperator
from ..calibrate.model import DiffusionModel, quantize
from ..calibrate.optimize import Outcome, calibrate
from ..calibrate.recipe import Recipe, freeze
from ..calibrate.scheme import QuantScheme
from ..calibrate.sensitivity import keep_sensitive
from ..calibrate.spec import CalibrationSpec
from ..calibrate.trace import trace
from ..calibrate.trajectory import Trajectory, simulate
from ..runtime.bundle import Bundle, Manifest, NetworkName, OperatorFacts, describe, save_manifest
from ..runtime.console import machine_facts
from ..runtime.engines import open_engine
from ..runtime.errors import AccuQuantError
from ..runtime.files import atomic_folder, sha256
from ..runtime.inspection import LOOKED_UP
from ..runtime.plan import SamplingPlan
from .check_target import check_target
from .companions import save_companions
from .facts import operator_facts, versions
from .graph import save_graph, trace_float
from .layer_parity import ENGINE_LEAST, check_layers, layer_parity
from .lower import lower
from .measure import Comparison, compare_twins
from .passes.cast_rest import cast_rest
from .passes.time_table import time_table
from .report import DriftPoint, LayerRow, ReportFacts, write_report
from .tuning import Tuning
from .verify import FLOAT16_REACHES, check_graph, check_parity

Show = Callable[[str, int, int, str], None]  # stage, done, total, note

# Far from the seeds people sample with, so that no picture anyone looks at was calibrated on.
TEACHER_SEEDS, JUDGE_SEEDS = 1 << 40, 1 << 41


@dataclass(frozen=True)
class Request:
    """What the user asked for; None means the checkpoint family's own default."""

    checkpoint: Path
    out: Path
    scheme: QuantScheme
    spec: CalibrationSpec
    config: Path | None = None
    sampler: str | None = None
    steps: int | None = None
    resume: bool = False
    device: str = "cpu"
    pictures: int = 64
    time_table: bool = True
    guidance: float | None = None
    cache: TrajectoryCache | None = None
    tuning: Tuning | None = None  # why the scheme keeps some operators in float

    @property
    def work(self) -> Path:
        """Where what outlives an interruption is kept."""
        return self.out.with_name(f".{self.out.name}.work")


@dataclass(frozen=True)
class Prepared:
    """A loaded model with its operators quantized (not yet calibrated), its plan, and what calibrating will cost.

    `network` is the model's as the sampler calls it, with guidance.
    """

    model: DiffusionModel
    network: nn.Module
    guidance: float
    operators: dict[str, QuantizedOperator]
    plan: SamplingPlan
    estimate: Estimate


@dataclass(frozen=True)
class Result:
    bundle: Bundle
    outcome: Outcome
    comparison: Comparison
    report: Path


def prepare(request: Request) -> Prepared:
    """Load the checkpoint, trace the sampler, quantize the operators and estimate the cost."""
    check_out(request.out)
    model, plan, guidance = load(request)
    network = model.guided(guidance)
    model.network.to(request.device)
    operators = quantize(model, request.scheme)
    cost = estimate(
        network, operators, plan, request.spec, model.sample_shape, model.condition([0]), reserve=request.scheme.reserve
    )
    return Prepared(model, network, guidance, operators, plan, cost)


def load(request: Request) -> tuple[DiffusionModel, SamplingPlan, float]:
    """The model in float, the plan it is sampled with, and its guidance."""
    model = load_model(request.checkpoint, request.config)
    plan = trace(request.sampler or model.default_sampler, model.noise_schedule, request.steps or model.default_steps)
    usual = 1.0 if model.conditioning is None else model.conditioning.guidance
    return model, plan, usual if request.guidance is None else request.guidance


def build(request: Request, prepared: Prepared, show: Show) -> Result:
    """Calibrate and write the bundle at `request.out`, replacing an older one."""
    times: dict[str, float] = {}
    model, plan, operators = prepared.model, prepared.plan, prepared.operators
    work = request.work
    if not request.resume:
        shutil.rmtree(work, ignore_errors=True)
    if request.tuning is not None:
        request.tuning.save(work / "tuning.json")

    begun = time.perf_counter()
    specification = {
        "checkpoint": sha256(request.checkpoint),
        "scheme": request.scheme.model_dump(),
        "calibration": request.spec.model_dump(),
        "plan": plan.model_dump(mode="json"),
        "guidance": prepared.guidance,
        "torch": torch.__version__,
    }
    teacher, judge = _trajectories(request, prepared, work, specification, show)
    outcome = _calibrate(request, prepared, teacher, judge, Journal(work, specification), show)
    times["calibration"] = time.perf_counter() - begun
    recipe = freeze(operators, request.scheme, _provenance(request, outcome))

    begun = time.perf_counter()
    show("export", 0, 3, "")
    with atomic_folder(request.out) as folder:
        float_graph = trace_float(model.network, operators, model.sample_shape, model.condition([0]))
        show("export", 1, 3, "")
        quantized, twin = lower(float_graph, recipe, request.scheme.target)
        alone = request.scheme.weights_alone
        check_target(quantized, recipe.facts.operators, request.scheme.target, weights_alone=alone)
        save_graph(quantized, folder / "denoiser.onnx")
        check_graph(folder / "denoiser.onnx")
        recipe.save(folder)
        plan.save(folder / "plan.json")
        show("export", 2, 3, "")
        alike = _compare_layers(folder / "denoiser.onnx", request, operators, plan, judge)
        # After every layer was compared: some are looked up from now on, and 16 bits differ by their last digits.
        looked_up = 0
        if request.time_table:
            looked_up = sum(time_table(graph, [step.timestep for step in plan.steps]) for graph in (quantized, twin))
        if request.scheme.rest != "float32":
            cast_rest(quantized, request.scheme.rest)
        for graph, name in ((quantized, "denoiser.onnx"), (twin, "twin.onnx")):
            save_graph(graph, folder / name)
            check_graph(folder / name)
        graphs: dict[NetworkName, str] = {"denoiser": "denoiser.onnx", "twin": "twin.onnx"}
        graphs |= save_companions(model, folder)
        parity = check_parity(
            folder / "denoiser.onnx", folder / "twin.onnx", model.network, operators, plan, judge,
            math.inf if request.scheme.rest == "float32" else FLOAT16_REACHES,
        )  # fmt: skip
        show("export", 3, 3, "")
        times["export"] = time.perf_counter() - begun
        facts = operator_facts(recipe, quantized)
        _write_manifest(folder, request, prepared, graphs, facts, looked_up > 0, parity, recipe.facts.provenance)
        bundle = Bundle(folder)
        comparison = compare_twins(
            bundle, request.pictures, 0, lambda done, total: show("comparing twins", done, total, "")
        )
        times["fp sampling"], times["int sampling"] = comparison.seconds["twin"], comparison.seconds["denoiser"]
        _write_report(folder, request, prepared, recipe, outcome, comparison, alike, times)
    shutil.rmtree(work, ignore_errors=True)
    return Result(Bundle(request.out), outcome, comparison, request.out / "report" / "index.html")


def check_out(out: Path) -> None:
    """Raises AccuQuantError if `out` is somebody's folder and no bundle."""
    if out.is_dir() and any(out.iterdir()) and not (out / "manifest.json").exists():
        raise AccuQuantError(f"{out} is a folder that holds something else than a bundle; choose another --out")


def _trajectories(
    request: Request, prepared: Prepared, work: Path, specification: dict[str, Any], show: Show
) -> tuple[Trajectory, Trajectory]:
    """Teacher and judge runs; kept in the work folder so that a resumed run starts from the same bytes."""
    found: list[Trajectory] = []
    spec = request.spec
    for name, first, count in (
        ("teacher", TEACHER_SEEDS, spec.trajectories),
        ("held-out", JUDGE_SEEDS, spec.held_out),
    ):
        path = work / f"{name}.safetensors"
        if request.resume and path.exists() and (work / "snapshot.safetensors").exists():
            found.append(Trajectory.load(path))
            continue
        first += spec.seed << 20
        depends_on = {
            "checkpoint": specification["checkpoint"],
            "plan": specification["plan"],
            "guidance": prepared.guidance,
            "seeds": [first, count],
            "torch": torch.__version__,
            "device": request.device,
        }

        def compute(name: str = name, first: int = first, count: int = count) -> Trajectory:
            seeds = range(first, first + count)
            return simulate(
                prepared.network,
                prepared.plan,
                seeds,
                prepared.model.sample_shape,
                prepared.model.condition(seeds),
                progress=lambda done, total: show(f"{name} trajectories", done, total, ""),
            )

        runs = request.cache.get(depends_on, compute) if request.cache else compute()
        runs.save(path)
        found.append(runs)
    return found[0], found[1]


def _calibrate(
    request: Request, prepared: Prepared, teacher: Trajectory, judge: Trajectory, journal: Journal, show: Show
) -> Outcome:
    network, operators, plan = prepared.network, prepared.operators, prepared.plan
    if not operators:
        return Outcome(Beginning("nothing to quantize", {}), {0: 0.0})
    keep_sensitive(
        network, operators, plan, teacher, request.scheme.reserve,
        lambda done, total: show("sensitivity", done, total, ""),
    )  # fmt: skip
    return calibrate(
        network,
        operators,
        plan,
        teacher,
        judge,
        request.spec,
        journal,
        resume=request.resume,
        report=lambda stage, done, total, loss: show(stage, done, total, "" if loss is None else f"loss {loss:.2e}"),
    )


def _compare_layers(
    path: Path,
    request: Request,
    operators: dict[str, QuantizedOperator],
    plan: SamplingPlan,
    judge: Trajectory,
) -> dict[str, dict[str, float]]:
    """Every layer alone against its simulation: as the standard defines it and, where this machine can, as it runs."""
    alike = {"reference": layer_parity(path, operators, plan, judge), "engine": {}}
    check_layers(alike["reference"], "the graph")
    if request.scheme.target != "tensorrt":
        here = partial(open_engine, target=request.scheme.target)
        alike["engine"] = layer_parity(path, operators, plan, judge, here)
        check_layers(alike["engine"], "this machine's engine", ENGINE_LEAST)
    return alike


def _provenance(request: Request, outcome: Outcome) -> dict[str, Any]:
    return {
        "checkpoint": request.checkpoint.name,
        "checkpoint_sha256": sha256(request.checkpoint),
        "calibration": request.spec.model_dump(),
        "beginning": asdict(outcome.beginning),
        "held_out_error": {str(k): v for k, v in outcome.held_out.items()},
        "kept_iteration": outcome.kept,
        "versions": versions(),
        "machine": machine_facts(),
        **({} if request.tuning is None else {"tuning": request.tuning.model_dump(mode="json")}),
    }


def _write_manifest(
    folder: Path,
    request: Request,
    prepared: Prepared,
    graphs: dict[NetworkName, str],
    operators: dict[str, OperatorFacts],
    looked_up: bool,
    parity: dict[str, float],
    provenance: dict[str, Any],
) -> None:
    known = prepared.model.conditioning
    guided = "" if prepared.guidance == 1.0 else f", guidance {prepared.guidance:g}"
    save_manifest(
        folder,
        Manifest(
            family=prepared.model.family,
            found=prepared.model.found,
            sample_shape=prepared.model.sample_shape,
            conditioning=known and known.model_copy(update={"guidance": prepared.guidance}),
            scheme=request.scheme.name,
            target=request.scheme.target,
            policy=request.scheme.policy,
            sampler=f"{request.sampler or prepared.model.default_sampler} ({prepared.plan.sampler}){guided}",
            timesteps="plan" if looked_up else "any",
            networks=describe(folder, graphs),
            operators=operators,
            provenance=provenance,
            quality=parity,
        ),
    )


def _write_report(
    folder: Path,
    request: Request,
    prepared: Prepared,
    recipe: Recipe,
    outcome: Outcome,
    comparison: Comparison,
    alike: dict[str, dict[str, float]],
    times: dict[str, float],
) -> None:
    bundle = Bundle(folder)
    manifest = bundle.manifest
    layers = [
        LayerRow(
            name=name,
            kind=facts.kind,
            role=facts.role,
            weight_bits=facts.weight_bits,
            weight_container=facts.weight_container,
            inputs=(" x ".join(facts.inputs) or "as they are") + (f" -> {facts.output}" if facts.output else ""),
            parameters=facts.parameters,
            stored_bytes=facts.stored_bytes,
            runs_as=LOOKED_UP if facts.in_table else comparison.runs_as.get(name, "not inspected"),
            reference_db=alike["reference"].get(name),
            engine_db=alike["engine"].get(name),
        )
        for name, facts in manifest.operators.items()
    ]
    quantiles = zip(*(_quantile(comparison.drift, q) for q in (0.5, 0.1, 0.9)), strict=True)
    drift = [
        DriftPoint(step=i + 1, timestep=step.timestep, median=median, p10=p10, p90=p90)
        for i, (step, (median, p10, p90)) in enumerate(zip(prepared.plan.steps, quantiles, strict=True))
    ]
    weights = sum(row.parameters for row in layers)
    facts = ReportFacts(
        title=f"{request.checkpoint.stem} at {request.scheme.name}",
        found=prepared.model.found,
        scheme=request.scheme.name,
        target=request.scheme.target,
        policy=request.scheme.described,
        sampler=manifest.sampler,
        steps=len(prepared.plan),
        seeds_first=0,
        n=len(comparison.psnr),
        psnr=comparison.psnr.tolist(),
        ssim=comparison.ssim.tolist(),
        drift=drift,
        beginning=str(outcome.beginning),
        held_out=outcome.held_out,
        kept=outcome.kept,
        groups=outcome.groups,
        calibration=request.spec.model_dump(),
        layers=layers,
        sizes={
            "checkpoint": request.checkpoint.stat().st_size,
            "fp32 graph": bundle.weight_bytes("twin"),
            "quantized graph": bundle.weight_bytes("denoiser"),
            "weights fp32": 4 * weights,
            "weights quantized": sum(row.stored_bytes for row in layers),
        },
        times=times,
        machine=machine_facts(),
        versions=versions(),
        engine=comparison.engine,
        tuning=request.tuning,
    )
    write_report(folder / "report", facts, comparison.fp, comparison.quantized)


def _quantile(drift: Any, q: float) -> list[float]:
    return torch.quantile(torch.as_tensor(drift, dtype=torch.float64), q, dim=1).tolist()
