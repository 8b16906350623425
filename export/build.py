"""Checkpoint to bundle: the whole way, as one function per stage and one that runs them.

    load -> trace the sampler -> teacher trajectories -> calibrate -> freeze -> lower -> verify -> compare -> report

Everything is written into a folder beside the bundle and renamed at the end, so a bundle is complete or absent. Only
the calibration journal outlives an interruption; `resume` goes on from it.
"""

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..calibrate.begin import Beginning
from ..calibrate.checkpoint import beside, digest
from ..calibrate.estimate import estimate
from ..calibrate.families import load_model
from ..calibrate.journal import Journal
from ..calibrate.layers import QuantizedOperator
from ..calibrate.lora import with_loras
from ..calibrate.model import DiffusionModel, quantize
from ..calibrate.optimize import Outcome, calibrate
from ..calibrate.recipe import freeze
from ..calibrate.sensitivity import keep_sensitive
from ..calibrate.trace import trace
from ..calibrate.trajectory import Trajectory, simulate
from ..runtime.bundle import Bundle, Manifest, NetworkName, OperatorFacts, describe, describe_rest, save_manifest
from ..runtime.console import machine_facts
from ..runtime.engines import open_engine
from ..runtime.files import atomic_folder
from ..runtime.plan import SamplingPlan
from .check_target import check_target
from .companions import save_companions
from .facts import left_in_float, operator_facts, versions
from .graph import save_graph, trace_float
from .layer_parity import check_layers, layer_parity
from .lower import LAST_REWRITES, LAST_REWRITES_OF_TWINS, lower
from .measure import Comparison, compare_twins
from .passes.cast_rest import cast_rest
from .passes.emulate_bfloat16 import emulate_bfloat16
from .passes.time_table import time_table
from .report import write_report
from .report_facts import report_facts
from .request import Prepared, Request, check_out
from .verify import REACHES, check_graph, check_parity

Show = Callable[[str, int, int, str], None]  # stage, done, total, note

# Far from the seeds people sample with, so that no picture anyone looks at was calibrated on.
TEACHER_SEEDS, JUDGE_SEEDS = 1 << 40, 1 << 41
# What trajectories are computed from, by its name in the specification.
DATA = ("checkpoint", "beside", "loras", "conditions", "plan")
# Seeds at once, which decides the last bits: as few as a CPU computes well with, so that many workers have some.
TEACHER_BATCH = {"cpu": 8, "cuda": 32}


@dataclass(frozen=True)
class Result:
    bundle: Bundle
    outcome: Outcome
    comparison: Comparison
    report: Path


def prepare(request: Request) -> Prepared:
    """Load the checkpoint, trace the sampler, quantize the operators and estimate the cost."""
    check_out(request.out)
    _simulator(request)
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
    model = with_loras(load_model(request.checkpoint, request.config, request.conditions), request.loras)
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
    specification: dict[str, Any] = {
        "checkpoint": digest(request.checkpoint),
        "beside": [digest(path) for path in beside(request.checkpoint, request.config)],
        "loras": [[digest(lora.path), lora.weight] for lora in request.loras],
        "scheme": request.scheme.model_dump(),
        "calibration": request.spec.model_dump(),
        "plan": plan.model_dump(mode="json"),
        "guidance": prepared.guidance,
        "torch": torch.__version__,
    }
    if request.conditions is not None:
        specification["conditions"] = digest(request.conditions)
    teacher, judge = _trajectories(request, prepared, work, specification, show)
    outcome = _calibrate(request, prepared, teacher, judge, Journal(work, specification), show)
    times["calibration"] = time.perf_counter() - begun
    provenance = _provenance(request, outcome, specification["checkpoint"])
    recipe = freeze(operators, request.scheme, provenance, outcome.correction)

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
        # After every layer was compared: some are in parts or looked up from now on, and 16 bits differ by their last
        # digits.
        for rewrite in LAST_REWRITES[request.scheme.target]:
            rewrite(quantized, recipe)
        for rewrite in LAST_REWRITES_OF_TWINS[request.scheme.target]:
            rewrite(twin, recipe)
        looked_up = 0
        if request.time_table:
            looked_up = sum(time_table(graph, [step.timestep for step in plan.steps]) for graph in (quantized, twin))
        if request.scheme.rest != "float32":
            cast_rest(quantized, request.scheme.rest)
        check_target(
            quantized, recipe.facts.operators, request.scheme.target, weights_alone=alone, looked_up=looked_up > 0
        )
        # bfloat16 has no engine on CPUs: what is tried here stands in for the graph, which comes last.
        tried = emulate_bfloat16(quantized) if request.scheme.rest == "bfloat16" else quantized
        for graph, name in ((tried, "denoiser.onnx"), (twin, "twin.onnx")):
            save_graph(graph, folder / name)
            check_graph(folder / name)
        graphs: dict[NetworkName, str] = {"denoiser": "denoiser.onnx", "twin": "twin.onnx"}
        graphs |= save_companions(model, folder)
        parity = check_parity(
            folder / "denoiser.onnx", folder / "twin.onnx", model.network, operators, plan, judge,
            REACHES[request.scheme.rest],
        )  # fmt: skip
        show("export", 3, 3, "")
        times["export"] = time.perf_counter() - begun
        facts = operator_facts(recipe, quantized)
        in_float = left_in_float(model.network, request.scheme, model.role_of, quantized, request.tuning)

        def manifested() -> Bundle:
            _write_manifest(
                folder, request, prepared, graphs, facts, in_float, looked_up > 0, parity, recipe.facts.provenance
            )
            return Bundle(folder)

        bundle = manifested()
        comparison = compare_twins(
            bundle, request.pictures, 0, lambda done, total: show("comparing twins", done, total, "")
        )
        times["fp sampling"], times["int sampling"] = comparison.seconds["twin"], comparison.seconds["denoiser"]
        if tried is not quantized:
            save_graph(quantized, folder / "denoiser.onnx")
            check_graph(folder / "denoiser.onnx")
            bundle = manifested()
            comparison = replace(comparison, engine=f"{comparison.engine}, bfloat16 emulated in float32")
        facts_told = report_facts(bundle, request, prepared, outcome, comparison, alike, times)
        write_report(folder / "report", facts_told, comparison.fp, comparison.quantized)
        files = describe_rest(folder, bundle.manifest.networks)  # with the report
        save_manifest(folder, bundle.manifest.model_copy(update={"files": files}))
    shutil.rmtree(work, ignore_errors=True)
    return Result(Bundle(request.out), outcome, comparison, request.out / "report" / "index.html")


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
        depends_on: dict[str, Any] = {k: specification[k] for k in DATA if k in specification}
        depends_on |= {
            "guidance": prepared.guidance,
            "seeds": [first, count],
            "torch": torch.__version__,
            "device": request.device,
            "batch": TEACHER_BATCH[request.device],
        }

        def compute(name: str = name, first: int = first, count: int = count) -> Trajectory:
            seeds = range(first, first + count)
            return _simulator(request)(
                prepared.network,
                prepared.plan,
                seeds,
                prepared.model.sample_shape,
                prepared.model.condition(seeds),
                batch=TEACHER_BATCH[request.device],
                progress=lambda done, total: show(f"{name} trajectories", done, total, ""),
            )

        runs = request.cache.get(depends_on, compute) if request.cache else compute()
        runs.save(path)
        found.append(runs)
    return found[0], found[1]


def _simulator(request: Request) -> Callable[..., Trajectory]:
    """`simulate`, in this process or on workers; raises AccuQuantError if Ray is asked for and not installed."""
    if not request.ray:
        return simulate
    from ..calibrate.teacher_on_ray import simulate_on_ray

    return partial(simulate_on_ray, workers=request.ray)


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
        check_layers(alike["engine"], "this machine's engine")
    return alike


def _provenance(request: Request, outcome: Outcome, checkpoint_digest: str) -> dict[str, Any]:
    return {
        "checkpoint": request.checkpoint.resolve().name,
        "checkpoint_sha256": checkpoint_digest,
        "loras": [{"file": n.path.name, "sha256": digest(n.path), "weight": n.weight} for n in request.loras],
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
    in_float: dict[str, str],
    looked_up: bool,
    parity: dict[str, float],
    provenance: dict[str, Any],
) -> None:
    known = prepared.model.conditioning
    guided = "" if prepared.guidance == 1.0 else f", guidance {prepared.guidance:g}"
    networks = describe(folder, graphs)
    save_manifest(
        folder,
        Manifest(
            family=prepared.model.family,
            found=prepared.model.found,
            sample_shape=prepared.model.sample_shape,
            conditioning=known and known.model_copy(update={"guidance": prepared.guidance}),
            constants=dict(prepared.model.constants),
            scheme=request.scheme.name,
            target=request.scheme.target,
            policy=request.scheme.policy,
            sampler=f"{request.sampler or prepared.model.default_sampler} ({prepared.plan.sampler}){guided}",
            timesteps="plan" if looked_up else "any",
            networks=networks,
            files=describe_rest(folder, networks),
            operators=operators,
            in_float=in_float,
            provenance=provenance,
            quality=parity,
        ),
    )
