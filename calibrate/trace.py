"""Turn a diffusers scheduler into a sampling plan by running it once on linear forms.

Every step of a linear sampler maps (x, outputs, noise) linearly. So feed it basis vectors instead of pictures: along
the channel axis stand the coordinates (x_0, o_0..o_{N-1}, z_0..z_{N-1}); the scheduler's arithmetic, unknowing, carries
the coefficients. With X_i the form of x_i, the local rows of the plan are

    a_i = X_{i+1}[x_0] / X_i[x_0],      b_i = X_{i+1}[o] - a_i X_i[o],      c_i = X_{i+1}[z] - a_i X_i[z].

The ratio also absorbs samplers that remember earlier latents (Heun, UniPC's corrector, singlestep DPM-Solver): an old
latent is itself a combination of the present one and of old outputs. Where a sampler extrapolates in x_0 (DPM-Solver++
2M) that reaches several outputs back, with weights that fall geometrically. The forms are float64, so the table holds
exactly the coefficients that the scheduler's own (float32) tables imply.
"""

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..runtime.errors import AccuQuantError
from ..runtime.plan import PlanStep, SamplingPlan

PRECONDITIONED = "sigma_data"  # a setting that only the schedules and schedulers of EDM-preconditioned networks have
FLOW = "flow_prediction"
# Beside diffusers' own words, of networks for flow matching: the tokens of a picture, which a dynamic shift goes by,
# and whether the shares of noise are spaced from 1 to 1 / steps, as Flux's pipeline has it and no scheduler by itself.
IMAGE_TOKENS, FROM_ONE = "image_tokens", "from_one"
NEGLIGIBLE = 1e-12  # of the row's largest coefficient: below float64's rounding of the traced arithmetic


@dataclass(frozen=True)
class Sampler:
    """How a name on the command line becomes a diffusers scheduler: its class, settings and arguments of `step`.

    `timesteps(steps, num_train_timesteps)` gives the chain's own, falling, where the class has no such spacing.
    """

    scheduler: str
    config: Mapping[str, Any] = field(default_factory=dict)
    step: Mapping[str, Any] = field(default_factory=dict)
    timesteps: Callable[[int, int], list[int]] | None = None


def quadratic(steps: int, train: int) -> list[int]:
    """Timesteps of Song et al.'s quadratic spacing, int(i^2 0.8 T / (steps - 1)^2), falling, each of them once.

    Cut to whole numbers the first few coincide (100 steps of 1000 are 96 timesteps). DDIM without noise does nothing
    between equal timesteps, so that repeats are left out.
    """
    if steps < 2:
        raise AccuQuantError("quadratic spacing has a first and a last timestep; ask for two steps or more")
    sequence = np.linspace(0, np.sqrt(train * 0.8), steps) ** 2  # in the original's own arithmetic, which rounds
    return sorted({int(t) for t in sequence}, reverse=True)


SAMPLERS: Mapping[str, Sampler] = {
    "ddim": Sampler("DDIMScheduler"),
    "ddim-eta1": Sampler("DDIMScheduler", step={"eta": 1.0}),
    # DPM-Solver++ of order one is DDIM, and takes any timesteps; it ends at alpha-bar 1, as the original does.
    "ddim-quad": Sampler(
        "DPMSolverMultistepScheduler", {"solver_order": 1, "final_sigmas_type": "zero"}, timesteps=quadratic
    ),
    "ddpm": Sampler("DDPMScheduler"),
    "pndm": Sampler("PNDMScheduler"),
    "plms": Sampler("PNDMScheduler", {"skip_prk_steps": True}),
    "dpm++2m": Sampler("DPMSolverMultistepScheduler"),
    "dpm++2m-sde": Sampler("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpm-single": Sampler("DPMSolverSinglestepScheduler"),
    "unipc": Sampler("UniPCMultistepScheduler"),
    "deis": Sampler("DEISMultistepScheduler"),
    "lms": Sampler("LMSDiscreteScheduler"),
    "euler": Sampler("EulerDiscreteScheduler"),
    "euler-a": Sampler("EulerAncestralDiscreteScheduler"),
    "heun": Sampler("HeunDiscreteScheduler"),
    "kdpm2": Sampler("KDPM2DiscreteScheduler"),
    "lcm": Sampler("LCMScheduler"),
    "tcd": Sampler("TCDScheduler"),
    "flow-euler": Sampler("FlowMatchEulerDiscreteScheduler"),
    "consistency": Sampler("CMStochasticIterativeScheduler"),
}


class _Form(torch.Tensor):
    """A float64 linear form; several schedulers cast to float32 on the way, which would smear small coefficients."""

    def to(self, *args: Any, **kwargs: Any) -> "_Form":
        return self


def trace(name: str, noise_schedule: Mapping[str, Any], steps: int) -> SamplingPlan:
    """The plan of sampler `name` (a key of SAMPLERS) with `steps` steps on a model's noise schedule.

    `noise_schedule` holds diffusers' own words (num_train_timesteps, beta_start, beta_schedule, prediction_type ...).

    Raises:
        AccuQuantError: unknown name, or a setting that makes the sampler non-linear.
    """
    if name not in SAMPLERS:
        raise AccuQuantError(f"unknown sampler {name!r}; known: {', '.join(sorted(SAMPLERS))}")
    chosen = SAMPLERS[name]
    factory = getattr(importlib.import_module("diffusers"), chosen.scheduler)
    accepted = inspect.signature(factory.__init__).parameters
    settings = {k: v for k, v in {**noise_schedule, **chosen.config}.items() if k in accepted}
    if (PRECONDITIONED in accepted) != (PRECONDITIONED in noise_schedule):
        fitting = "consistency" if PRECONDITIONED in noise_schedule else "any other"
        raise AccuQuantError(f"sampler {name!r} does not fit what this model predicts; choose {fitting}")
    flows = chosen.scheduler.startswith("Flow")
    if noise_schedule.get("prediction_type") == FLOW and not flows:
        raise AccuQuantError(f"sampler {name!r} does not fit what this model predicts, a flow; choose flow-euler")
    for clipping in {"clip_sample", "clip_denoised"} & accepted.keys():
        settings.setdefault(clipping, False)
    spacing = _flow_spacing(noise_schedule, settings, steps) if flows and IMAGE_TOKENS in noise_schedule else {}
    if chosen.timesteps is not None:
        spacing["timesteps"] = chosen.timesteps(steps, settings["num_train_timesteps"])
    return trace_scheduler(factory(**settings), steps, spacing, **chosen.step)


def trace_scheduler(
    scheduler: Any, steps: int, spacing: Mapping[str, Any] | None = None, **step_arguments: Any
) -> SamplingPlan:
    """The plan of any diffusers scheduler object; it is copied, not touched.

    `spacing` are further arguments of its `set_timesteps`.

    Raises:
        AccuQuantError: the scheduler thresholds, clips, learns its variance, or is not linear for another reason.
    """
    _refuse_nonlinear(scheduler)
    scheduler = type(scheduler).from_config(scheduler.config)
    limit = scheduler.config.get("num_train_timesteps")
    if steps < 1 or (limit and steps > limit):
        raise AccuQuantError(f"{steps} sampling steps asked for; this model's schedule allows 1 to {limit}")
    try:
        rows = _rows(scheduler, steps, spacing or {}, step_arguments)
    except (ValueError, NotImplementedError, IndexError, TypeError) as error:
        raise AccuQuantError(
            f"{type(scheduler).__name__} cannot sample this model in {steps} steps ({error}); "
            "choose another number of steps or another sampler"
        ) from error
    return SamplingPlan(
        sampler=type(scheduler).__name__,
        prediction_type=_prediction(scheduler),
        init_sigma=float(getattr(scheduler, "init_noise_sigma", 1.0)),
        steps=tuple(rows),
    )


def _flow_spacing(noise_schedule: Mapping[str, Any], settings: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """What a pipeline passes to the scheduler: mu, linear in the tokens of a picture, and evenly spaced shares."""
    spacing: dict[str, Any] = {}
    if settings.get("use_dynamic_shifting"):
        least, most = settings.get("base_image_seq_len", 256), settings.get("max_image_seq_len", 4096)
        low, high = settings.get("base_shift", 0.5), settings.get("max_shift", 1.15)
        spacing["mu"] = low + (high - low) * (noise_schedule[IMAGE_TOKENS] - least) / (most - least)
    if noise_schedule.get(FROM_ONE):
        spacing["sigmas"] = np.linspace(1.0, 1 / steps, steps)
    return spacing


def _rows(scheduler: Any, steps: int, spacing: Mapping[str, Any], step_arguments: Mapping[str, Any]) -> list[PlanStep]:
    """Run the scheduler on basis vectors and read every row of the plan off the forms."""
    # Schedulers take a number of steps or the timesteps themselves.
    scheduler.set_timesteps(**spacing if "timesteps" in spacing else {"num_inference_steps": steps, **spacing})
    timesteps = scheduler.timesteps
    rows = len(timesteps)

    def basis(index: int) -> Tensor:
        form = torch.zeros(1, 1 + 2 * rows, 1, 1, dtype=torch.float64)
        form[0, index] = 1.0
        return form.as_subclass(_Form)

    x = basis(0)
    plan: list[PlanStep] = []
    for i, t in enumerate(timesteps):
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        input_scale = _ratio(scaled, x, scheduler)
        with _noise_source(scheduler, lambda i=i: basis(1 + rows + i)):
            following = scheduler.step(basis(1 + i), t, x, return_dict=False, **step_arguments)[0]
        before, after = _coefficients(x), _coefficients(following)
        if before[0] == 0.0:
            raise AccuQuantError(
                f"{type(scheduler).__name__} forgets the starting noise before step {i + 1}, so its later steps cannot "
                "be written as a plan; choose another sampler"
            )
        if not torch.isfinite(after).all():
            raise ValueError(f"step {i + 1} has coefficients that are not finite")
        a = float(after[0] / before[0])
        rest = after - a * before
        # What a row may still hold after the subtraction is rounding of numbers as large as those subtracted.
        floor = NEGLIGIBLE * float(torch.maximum(after.abs(), (a * before).abs()).max())
        kept = {int(k): float(rest[k]) for k in rest[1:].abs().gt(floor).nonzero().flatten() + 1}
        plan.append(
            PlanStep(
                timestep=float(t),
                input_scale=input_scale,
                a=a,
                b={k - 1: v for k, v in kept.items() if k <= rows},
                c={k - 1 - rows: v for k, v in kept.items() if k > rows},
            )
        )
        x = following
    return plan


def _coefficients(form: Tensor) -> Tensor:
    return form.as_subclass(torch.Tensor).double().flatten()


def _prediction(scheduler: Any) -> Any:
    if PRECONDITIONED in scheduler.config:
        return "preconditioned"
    is_flow = "flow" in type(scheduler).__name__.lower()
    return "flow_prediction" if is_flow else scheduler.config.get("prediction_type", "epsilon")


def _ratio(scaled: Tensor, x: Tensor, scheduler: Any) -> float:
    """The factor s with scaled = s x, if there is one."""
    u, v = _coefficients(scaled), _coefficients(x)
    largest = int(v.abs().argmax())
    s = float(u[largest] / v[largest])
    if not torch.allclose(u, s * v, rtol=1e-9, atol=1e-12):
        raise AccuQuantError(f"{type(scheduler).__name__} changes the network's input by more than a factor")
    return s


def _refuse_nonlinear(scheduler: Any) -> None:
    config, name = scheduler.config, type(scheduler).__name__
    for setting, repair in {
        "thresholding": "set thresholding=False",
        "clip_sample": "set clip_sample=False",
        "clip_denoised": "set clip_denoised=False",
    }.items():
        if config.get(setting):
            raise AccuQuantError(f"{name} has {setting}=True, which is not linear in the latent; {repair}")
    if str(config.get("variance_type", "")).startswith("learned"):
        raise AccuQuantError(
            f"{name} takes its variance from the network (variance_type={config['variance_type']}); "
            "use a fixed variance, or DDIM"
        )


@contextmanager
def _noise_source(scheduler: Any, draw: Any) -> Iterator[None]:
    """Within the block, the scheduler's module draws `draw()` where it would draw random numbers."""
    module: ModuleType = sys.modules[type(scheduler).__module__]
    original = getattr(module, "randn_tensor", None)
    if original is None:
        yield
        return
    module.randn_tensor = lambda *args, **kwargs: draw()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.randn_tensor = original  # type: ignore[attr-defined]
