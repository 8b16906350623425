"""What a report says, and how it follows from a finished build."""

from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, model_validator

from ..calibrate.checkpoint import name_of, stored_bytes
from ..calibrate.guard import GroupGain
from ..calibrate.optimize import Outcome
from ..runtime.bundle import Bundle
from ..runtime.console import machine_facts
from ..runtime.inspection import LOOKED_UP
from .facts import versions
from .measure import Comparison
from .request import Prepared, Request
from .tuning import Tuning


class DriftPoint(BaseModel):
    """Relative error ||x~_t - x_t|| / ||x_t|| after a sampling step (counted from 1), as quantiles over pictures."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    step: int
    timestep: float
    median: float
    p10: float
    p90: float


class LayerRow(BaseModel):
    """One quantized operator: its weights, its inputs and what the engine made of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    kind: Literal["conv", "linear", "matmul"]
    role: str
    weight_bits: int | None
    weight_container: str
    inputs: str
    parameters: int
    stored_bytes: int
    runs_as: str
    why: str = ""  # the engine keeps it in float
    reference_db: float | None = None  # SQNR against the simulation on the same input, of the standard's execution
    engine_db: float | None = None  # and of the engine's


class ReportFacts(BaseModel):
    """Everything the report says. Sizes in bytes, times in seconds; `held_out` by calibration iteration."""

    # A diverged run has infinities to report; plain JSON knows none, and null would not load again.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    schema_version: Literal[1] = 1
    title: str
    found: str
    scheme: str
    target: str
    policy: str
    sampler: str
    steps: int
    seeds_first: int
    n: int
    psnr: list[float]
    ssim: list[float]
    drift: list[DriftPoint]
    held_out: dict[int, float]
    kept: int
    beginning: str = ""
    begun: str = ""
    groups: list[GroupGain] = []
    calibration: dict[str, Any]
    layers: list[LayerRow]
    sizes: dict[str, int]
    times: dict[str, float]
    machine: dict[str, str]
    versions: dict[str, str]
    engine: str
    tuning: Tuning | None = None

    @model_validator(mode="after")
    def _n_is_true(self) -> "ReportFacts":
        if not self.n == len(self.psnr) == len(self.ssim):
            raise ValueError(f"n is {self.n}, but there are {len(self.psnr)} PSNR and {len(self.ssim)} SSIM values")
        return self


def report_facts(
    bundle: Bundle,
    request: Request,
    prepared: Prepared,
    outcome: Outcome,
    comparison: Comparison,
    alike: dict[str, dict[str, float]],
    times: dict[str, float],
) -> ReportFacts:
    """Everything the report of a bundle says, but for its pictures."""
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
            why=comparison.kept_in_float.get(name, ""),
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
    return ReportFacts(
        title=f"{name_of(request.checkpoint)} at {request.scheme.name}",
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
        begun=outcome.begun,
        held_out=outcome.held_out,
        kept=outcome.kept,
        groups=outcome.groups,
        calibration=request.spec.model_dump(),
        layers=layers,
        sizes={
            "checkpoint": stored_bytes(request.checkpoint),
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


def _quantile(drift: Any, q: float) -> list[float]:
    return torch.quantile(torch.as_tensor(drift, dtype=torch.float64), q, dim=1).tolist()
