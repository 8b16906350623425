"""A plan, replayed, is the scheduler it was traced from."""

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from accuquant.calibrate.trace import SAMPLERS, _noise_source, trace, trace_scheduler
from accuquant.runtime.errors import AccuQuantError

SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}

# diffusers itself has no such combination.
NO_SAMPLE_PREDICTION = {"pndm", "plms", "euler-a", "kdpm2"}


PRECONDITIONED = {"num_train_timesteps": 40, "sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5}
DIFFUSION = sorted(SAMPLERS.keys() - {"consistency"})


def schedule_of(name: str, prediction: str) -> Mapping[str, Any]:
    return PRECONDITIONED if name == "consistency" else {**SCHEDULE, "prediction_type": prediction}


def scheduler_of(name: str, prediction: str) -> Any:
    chosen = SAMPLERS[name]
    factory = getattr(importlib.import_module("diffusers"), chosen.scheduler)
    accepted = inspect.signature(factory.__init__).parameters
    wanted = {**schedule_of(name, prediction), **chosen.config, "clip_sample": False, "clip_denoised": False}
    return factory(**{k: v for k, v in wanted.items() if k in accepted})


def replay(name: str, prediction: str, steps: int) -> None:
    """Run both on the same float64 outputs and noise, and compare latent, network input and timestep at every row."""
    plan = trace(name, schedule_of(name, prediction), steps)
    scheduler = scheduler_of(name, prediction)
    chosen = SAMPLERS[name].timesteps
    scheduler.set_timesteps(steps) if chosen is None else scheduler.set_timesteps(timesteps=chosen(steps, 1000))
    rows = len(scheduler.timesteps)
    assert len(plan) == rows
    assert plan.init_sigma == pytest.approx(float(scheduler.init_noise_sigma) if name != "flow-euler" else 1.0)
    generator = torch.Generator().manual_seed(steps)
    outputs = torch.randn(rows, 1, 2, 3, 3, generator=generator, dtype=torch.float64)
    noise = torch.randn(rows, 1, 2, 3, 3, generator=generator, dtype=torch.float64)
    x = torch.randn(1, 2, 3, 3, generator=generator, dtype=torch.float64)
    y = x.clone()
    for i, t in enumerate(scheduler.timesteps):
        assert plan.steps[i].timestep == float(t)
        if hasattr(scheduler, "scale_model_input"):
            wanted = scheduler.scale_model_input(x, t)
            assert (wanted - plan.steps[i].input_scale * y).norm() <= 1e-6 * wanted.norm()
        with _noise_source(scheduler, lambda i=i: noise[i].clone()):
            x = scheduler.step(outputs[i], t, x, return_dict=False, **SAMPLERS[name].step)[0]
        y = plan.advance(i, y, outputs, noise.__getitem__)
        # Several schedulers compute in float32, hence 1e-6 and not 1e-12.
        assert (x - y).norm() <= 1e-6 * x.norm(), f"row {i} of {rows}"


@pytest.mark.parametrize("steps", [4, 7, 20, 50])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", DIFFUSION)
def test_replay_equals_the_scheduler(name, prediction, steps):
    if prediction == "sample" and name in NO_SAMPLE_PREDICTION:
        pytest.skip("diffusers has no sample prediction for this scheduler")
    if (name, prediction, steps) == ("lcm", "sample", 50):
        with pytest.raises(AccuQuantError, match="forgets the starting noise"):
            trace(name, {**SCHEDULE, "prediction_type": prediction}, steps)
        return
    replay(name, prediction, steps)


@pytest.mark.parametrize("steps", [1, 2, 8, 40])
def test_replay_equals_the_scheduler_of_preconditioned_networks(steps):
    replay("consistency", "", steps)


@pytest.mark.parametrize("name", sorted(NO_SAMPLE_PREDICTION))
def test_the_skipped_combinations_are_indeed_refused_by_diffusers(name):
    scheduler = scheduler_of(name, "sample")
    scheduler.set_timesteps(10)
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises((ValueError, NotImplementedError), match="sample"):
        scheduler.step(x, scheduler.timesteps[0], x)


@pytest.mark.parametrize("name", sorted(NO_SAMPLE_PREDICTION))
def test_a_prediction_type_that_the_scheduler_lacks_is_a_user_error(name):
    with pytest.raises(AccuQuantError, match="sample"):
        trace(name, {**SCHEDULE, "prediction_type": "sample"}, 10)


def alpha_bar() -> np.ndarray:
    """prod 1 - beta, as the DDPM paper defines it; in float32 like the scheduler, whose own rounding is 1e-5."""
    betas = torch.linspace(SCHEDULE["beta_start"], SCHEDULE["beta_end"], 1000, dtype=torch.float32)
    return torch.cumprod(1 - betas, 0).double().numpy()


@pytest.mark.parametrize("steps", [1, 10, 50, 100])
def test_ddim_in_closed_form(steps):
    """a = sqrt(abar' / abar),  b = sqrt(1 - abar') - a sqrt(1 - abar)."""
    settings = {**SCHEDULE, "prediction_type": "epsilon", "timestep_spacing": "leading", "steps_offset": 0}
    plan = trace("ddim", settings, steps)
    abar = alpha_bar()
    stride = 1000 // steps
    t = np.arange(steps)[::-1] * stride
    now = abar[t]
    following = np.where(t >= stride, abar[np.maximum(t - stride, 0)], 1.0)
    a = np.sqrt(following / now)
    b = np.sqrt(1 - following) - a * np.sqrt(1 - now)
    assert [s.timestep for s in plan.steps] == t.tolist()
    np.testing.assert_allclose([s.a for s in plan.steps], a, rtol=1e-6)
    assert all(s.b.keys() == {i} for i, s in enumerate(plan.steps))
    # 1 - abar is 1e-4 at the last step, where float32's rounding of abar is 6e-4 of it.
    np.testing.assert_allclose([s.b[i] for i, s in enumerate(plan.steps)], b, rtol=1e-6, atol=1e-6)
    assert all(not s.c and s.input_scale == 1.0 for s in plan.steps)
    assert plan.init_sigma == 1.0
    assert (np.array([s.a for s in plan.steps]) > 1).all()
    assert all(s.b[i] < 0 for i, s in enumerate(plan.steps))


def test_ddim_angle_form():
    """b = -sin(p - q) / cos p with abar = cos^2: the same number by another road."""
    plan = trace("ddim", {**SCHEDULE, "prediction_type": "epsilon", "timestep_spacing": "leading"}, 20)
    abar = np.append(alpha_bar()[np.arange(20)[::-1] * 50], 1.0)
    p, q = np.arccos(np.sqrt(abar))[:-1], np.arccos(np.sqrt(abar))[1:]
    np.testing.assert_allclose([s.b[i] for i, s in enumerate(plan.steps)], -np.sin(p - q) / np.cos(p), rtol=1e-5)


def test_eta_one_adds_the_ddpm_posteriors_noise():
    """sigma^2 = (1 - abar') / (1 - abar) (1 - abar / abar'), b = sqrt(1 - abar' - sigma^2) - a sqrt(1 - abar)."""
    plan = trace("ddim-eta1", {**SCHEDULE, "prediction_type": "epsilon", "timestep_spacing": "leading"}, 20)
    abar = np.append(alpha_bar()[np.arange(20)[::-1] * 50], 1.0)
    now, following = abar[:-1], abar[1:]
    sigma = np.sqrt((1 - following) / (1 - now) * (1 - now / following))
    b = np.sqrt(1 - following - sigma**2) - np.sqrt(following / now) * np.sqrt(1 - now)
    np.testing.assert_allclose([s.c.get(i, 0.0) for i, s in enumerate(plan.steps)], sigma, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose([s.b[i] for i, s in enumerate(plan.steps)], b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("steps", [10, 50, 100])
def test_quadratic_ddim_is_the_original_loop_with_all_its_repeats(steps):
    """ermongroup/ddim with skip_type "quad": x' = sqrt(abar') x0 + sqrt(1 - abar') eps, abar 1 at the end."""
    settings = {**SCHEDULE, "prediction_type": "epsilon", "timestep_spacing": "leading", "steps_offset": 0}
    plan = trace("ddim-quad", settings, steps)
    abar = np.concatenate([[1.0], alpha_bar()])  # abar[t + 1] is that of t
    sequence = [int(s) for s in np.linspace(0, np.sqrt(1000 * 0.8), steps) ** 2]
    assert sequence[-1] == 800
    direction = np.random.default_rng(steps).normal(size=(5, 3))

    def network(x: np.ndarray, t: float) -> np.ndarray:
        return np.tanh(x @ np.ones((3, 3)) * 0.3 + direction + 1e-3 * t)

    start = np.random.default_rng(1).normal(size=(5, 3))
    x = start
    for t, following in zip(sequence[::-1], [*sequence[-2::-1], -1], strict=True):
        eps = network(x, t)
        x0 = (x - eps * np.sqrt(1 - abar[t + 1])) / np.sqrt(abar[t + 1])
        x = np.sqrt(abar[following + 1]) * x0 + np.sqrt(1 - abar[following + 1]) * eps
    assert [s.timestep for s in plan.steps] == sorted(set(sequence), reverse=True)
    y, outputs = start, dict[int, np.ndarray]()
    for i, step in enumerate(plan.steps):  # in float64, since latents in float32 round by the CPU
        outputs[i] = network(y, step.timestep)
        y = plan.advance(i, y, outputs, lambda j: start)
    np.testing.assert_allclose(y, x, atol=2e-5)


def test_a_hundred_quadratic_steps_call_the_network_96_times():
    assert len(trace("ddim-quad", SCHEDULE, 100)) == 96


def test_heun_and_prk_take_more_calls_than_steps():
    assert len(trace("heun", SCHEDULE, 10)) == 19
    assert len(trace("pndm", SCHEDULE, 10)) > 10


def test_deterministic_samplers_draw_no_noise_and_stochastic_ones_do():
    stochastic = {n for n in SAMPLERS if any(s.c for s in trace(n, schedule_of(n, "epsilon"), 8).steps)}
    assert stochastic == {"ddim-eta1", "ddpm", "dpm++2m-sde", "euler-a", "consistency", "lcm", "tcd"}


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("DDIMScheduler", {"clip_sample": True}, "clip_sample"),
        ("DDIMScheduler", {"clip_sample": False, "thresholding": True}, "thresholding"),
        ("DDPMScheduler", {"clip_sample": True}, "clip_sample"),
        ("DPMSolverMultistepScheduler", {"thresholding": True}, "thresholding"),
        ("DDPMScheduler", {"clip_sample": False, "variance_type": "learned_range"}, "learned_range"),
        ("DDPMScheduler", {"clip_sample": False, "variance_type": "learned"}, "learned"),
    ],
)
def test_what_is_not_linear_is_refused_by_name(name, settings, said):
    scheduler = getattr(importlib.import_module("diffusers"), name)(**settings)
    with pytest.raises(AccuQuantError, match=rf"{name}.*{said}"):
        trace_scheduler(scheduler, 10)


def test_clipping_is_off_unless_the_model_asks_for_it():
    """DDIMScheduler clips by default, which no plan can express."""
    trace("ddim", SCHEDULE, 5)
    with pytest.raises(AccuQuantError, match="clip_sample"):
        trace("ddim", {**SCHEDULE, "clip_sample": True}, 5)


def test_a_sampler_of_the_other_kind_is_refused():
    with pytest.raises(AccuQuantError, match="'consistency' does not fit"):
        trace("consistency", SCHEDULE, 4)
    with pytest.raises(AccuQuantError, match="'ddim' does not fit what this model predicts; choose consistency"):
        trace("ddim", PRECONDITIONED, 4)
    with pytest.raises(AccuQuantError, match="clip_denoised"):
        trace("consistency", PRECONDITIONED | {"clip_denoised": True}, 4)


def test_unknown_sampler_lists_the_known_ones():
    with pytest.raises(AccuQuantError) as caught:
        trace("dpm++3m", SCHEDULE, 10)
    assert all(name in str(caught.value) for name in SAMPLERS)


@pytest.mark.parametrize("steps", [-1, 0, 1001])
@pytest.mark.parametrize("name", ["ddim", "plms", "euler", "dpm++2m"])
def test_steps_out_of_range_are_refused(name, steps):
    with pytest.raises(AccuQuantError, match=rf"{steps} .*1 to 1000"):
        trace(name, SCHEDULE, steps)


@pytest.mark.parametrize("steps", [1, 2, 3, 1000])
@pytest.mark.parametrize("name", ["ddim", "ddpm", "euler", "dpm++2m"])
def test_the_ends_of_the_allowed_range_give_a_plan(name, steps):
    if (name, steps) == ("dpm++2m", 1000):
        # diffusers divides by a log-SNR difference of zero here; a plan of NaNs must not come out.
        with pytest.raises(AccuQuantError, match="not finite"):
            trace(name, SCHEDULE, steps)
        return
    assert len(trace(name, SCHEDULE, steps)) == steps


@pytest.mark.parametrize("name", DIFFUSION)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_very_few_steps_give_a_plan_or_a_user_error(name, steps):
    """Multistep samplers need a few steps to start; whatever they say must reach the user as a sentence."""
    try:
        plan = trace(name, SCHEDULE, steps)
    except AccuQuantError:
        return
    assert len(plan) >= steps


def test_the_given_scheduler_is_not_touched():
    scheduler = scheduler_of("plms", "epsilon")
    scheduler.set_timesteps(3)
    before = (scheduler.timesteps.clone(), scheduler.counter, list(scheduler.ets))
    trace_scheduler(scheduler, 20)
    assert torch.equal(scheduler.timesteps, before[0])
    assert (scheduler.counter, scheduler.ets) == before[1:]


def test_tracing_twice_gives_the_same_table():
    schedule: Mapping[str, Any] = {**SCHEDULE, "prediction_type": "epsilon"}
    assert trace("unipc", schedule, 12) == trace("unipc", schedule, 12)
