"""How the residual at the end of a group reaches the steps before it: one factor per row of the plan.

Row i maps the latent by A_i = a_i I + s_i b_i J, with J the network's Jacobian (b_i the sum of the row's weights). The
exact adjoint multiplies by A_i transposed, at the price of backpropagating through every later network. The paper
(AccuQuant, arXiv 2510.20348) puts something without a network in its place; here that is a scalar c_i:

    injected-a   c_i = a_i                                   J dropped in the plan's own parametrisation
    injected-1   c_i = 1                                     the residual arrives everywhere unchanged
    injected-v   c_i = (r/s) (1 + a'^2 - b'^2 - c'^2) / 2a'  exact for Gaussian data of unit variance
    measured     c_i = a_i + s_i b_i <v, J v> / <v, v>       least squares over random v, on teacher latents

In injected-v the latents are scaled to unit variance: with s and r = s_{i+1} the input scales before and after the row,
a' = a s^-1 r, b' = b r, c' = c r. For a deterministic step between angles p and q it is cos(p - q), what v-prediction
gives when its Jacobian is dropped, and it is the same number in whichever prediction the plan is written.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from ..runtime.plan import SamplingPlan
from .trajectory import Trajectory, call

Gradient = Literal["exact", "injected-a", "injected-1", "injected-v", "measured"]
PROBES = 8  # latents per row on which the measured factor is taken, each with one random direction


def carry(plan: SamplingPlan, gradient: Gradient, network: nn.Module, teacher: Trajectory) -> tuple[float, ...] | None:
    """The factors c_i of `gradient`, or None for the exact adjoint. Network and teacher serve "measured" alone."""
    if gradient == "exact":
        return None
    if gradient == "injected-a":
        return tuple(step.a for step in plan.steps)
    if gradient == "injected-1":
        return (1.0,) * len(plan)
    if gradient == "injected-v":
        return tuple(unit_variance_factor(plan, i) for i in range(len(plan)))
    return tuple(_measured(plan, i, network, teacher) for i in range(len(plan)))


def unit_variance_factor(plan: SamplingPlan, i: int) -> float:
    step = plan.steps[i]
    before, after = step.input_scale, plan.steps[i + 1].input_scale if i + 1 < len(plan) else 1.0
    a = step.a * after / before
    if a == 0:
        return 0.0
    b, c = sum(step.b.values()) * after, sum(w * w for w in step.c.values()) * after**2
    return (1 + a * a - b * b - c) / (2 * a) * before / after


@torch.no_grad()
def _measured(plan: SamplingPlan, i: int, network: nn.Module, teacher: Trajectory) -> float:
    step = plan.steps[i]
    if not step.b:
        return step.a
    device = next(network.parameters()).device
    condition = teacher.condition_of(slice(PROBES), device)
    x = teacher.states[i, :PROBES].to(device)
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(i), dtype=x.dtype).to(device)

    def response(x: Tensor) -> Tensor:
        return call(network, plan, i, x, condition)

    jv: Tensor = torch.func.jvp(response, (x,), (v,))[1]
    return step.a + sum(step.b.values()) * float((v * jv).sum() / v.square().sum())
