"""The scalars that stand for a step's Jacobian: closed forms, and the cases in which they are no approximation."""

import itertools
import math

import pytest
import torch
from accuquant.calibrate.carry import carry, unit_variance_factor
from accuquant.calibrate.multistep import Group, GroupBatch, accumulate_gradient, cut
from accuquant.calibrate.trace import trace
from accuquant.calibrate.trajectory import Trajectory
from accuquant.runtime.plan import PlanStep, SamplingPlan
from torch import nn


class Linear(nn.Module):
    """theta + k(t) x: a network whose Jacobian is known."""

    def __init__(self, slopes: dict[float, float]) -> None:
        super().__init__()
        self.slopes = slopes
        self.theta = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x, t):
        return self.theta + self.slopes[float(t[0])] * x


def alpha_bar(tiny) -> torch.Tensor:
    s = tiny.NOISE_SCHEDULE
    return torch.cumprod(1 - torch.linspace(s["beta_start"], s["beta_end"], 100), 0).double()


def rotated(prediction: str, angles: list[float]) -> SamplingPlan:
    """Deterministic DDIM over angles (x = cos x0 + sin eps), written in the given prediction."""
    steps = []
    for i, (p, q) in enumerate(itertools.pairwise(angles)):
        a, b = {
            "epsilon": (math.cos(q) / math.cos(p), -math.sin(p - q) / math.cos(p)),
            "sample": (math.sin(q) / math.sin(p), math.sin(p - q) / math.sin(p)),
            "v_prediction": (math.cos(p - q), -math.sin(p - q)),
        }[prediction]
        steps.append(PlanStep(timestep=i, a=a, b={i: b}))
    return SamplingPlan(sampler="Hand", prediction_type=prediction, init_sigma=1.0, steps=tuple(steps))


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_injected_v_is_the_cosine_of_the_turn_in_every_prediction(prediction):
    angles = [1.5, 1.3, 0.9, 0.4, 0.1]
    plan = rotated(prediction, angles)
    for i, (p, q) in enumerate(itertools.pairwise(angles)):
        assert unit_variance_factor(plan, i) == pytest.approx(math.cos(p - q), rel=1e-12)


@pytest.mark.parametrize("sampler", ["ddim", "ddim-eta1", "ddpm", "euler"])
def test_injected_v_is_exact_for_gaussian_data_of_unit_variance(tiny, sampler):
    """The best denoiser is then linear, eps = x sin(phi); variance-exploding samplers are scaled to that first."""
    plan = trace(sampler, tiny.NOISE_SCHEDULE, 8)
    if sampler == "euler":  # its input scale is cos(phi)
        slopes = {s.timestep: math.sqrt(1 - s.input_scale**2) for s in plan.steps}
    else:
        slopes = {s.timestep: math.sqrt(1 - alpha_bar(tiny)[int(s.timestep)]) for s in plan.steps}
    network = Linear(slopes)
    group = Group(1, 7)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 1, 4, 4, generator=generator, dtype=torch.float64)
    data = GroupBatch(x, torch.zeros_like(x), {}, lambda j: torch.zeros_like(x))
    teacher = Trajectory((0, 1), torch.zeros(9, 2, 1, 4, 4), torch.zeros(8, 2, 1, 4, 4))
    got = {}
    for gradient in ("exact", "injected-v", "injected-a"):
        network.zero_grad()
        accumulate_gradient(network, plan, group, data, carry(plan, gradient, network, teacher))
        got[gradient] = float(network.theta.grad)
    assert got["injected-v"] == pytest.approx(got["exact"], rel=2e-3)  # the plan is traced from float32 tables
    assert abs(got["injected-a"] / got["exact"] - 1) > 0.02


def test_measured_factors_of_a_linear_network(tiny):
    """c = a + s b k, whatever direction is probed."""
    plan = trace("euler", tiny.NOISE_SCHEDULE, 5)
    network = Linear({s.timestep: 0.1 * (i + 1) for i, s in enumerate(plan.steps)})
    states = torch.randn(6, 3, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    factors = carry(plan, "measured", network, Trajectory((0, 1, 2), states, states[1:]))
    for i, step in enumerate(plan.steps):
        assert factors[i] == pytest.approx(step.a + step.input_scale * step.b[i] * 0.1 * (i + 1), rel=1e-9)


def test_measured_factors_point_closer_to_the_exact_gradient_than_dropping_the_jacobian(tiny):
    plan = trace("ddim", tiny.NOISE_SCHEDULE, 8)
    network = Linear({s.timestep: 0.9 for s in plan.steps})
    states = torch.randn(9, 3, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    teacher = Trajectory((0, 1, 2), states, states[1:])
    data = GroupBatch(states[0], states[-1], {}, lambda j: states[0])
    got = {}
    for gradient in ("exact", "measured", "injected-a"):
        network.zero_grad()
        accumulate_gradient(network, plan, Group(0, 8), data, carry(plan, gradient, network, teacher))
        got[gradient] = float(network.theta.grad)
    assert got["measured"] == pytest.approx(got["exact"], rel=1e-9)
    assert abs(got["injected-a"] / got["exact"] - 1) > 0.01


@pytest.mark.parametrize("size", [1, 2, 5, 16])
def test_groups_of_equal_angle(tiny, size):
    """They cover every row once, are as many as by count (or fewer), and no group turns much further than another."""
    plan = trace("ddim", {**tiny.NOISE_SCHEDULE, "num_train_timesteps": 1000}, 50)
    by_count, by_angle = cut(plan, size), cut(plan, size, "angle")
    assert [i for g in by_angle for i in range(g.start, g.stop)] == list(range(50))
    assert len(by_angle) <= len(by_count)

    def turn(group):
        return sum(math.acos(min(1.0, unit_variance_factor(plan, i))) for i in range(group.start, group.stop))

    if 1 < size < 50:
        assert max(map(turn, by_angle)) <= max(map(turn, by_count))
