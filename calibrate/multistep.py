"""The AccuQuant objective and its gradient in O(1) memory.

A group is a run of M consecutive rows p..q-1 of the sampling plan. Teacher and student start it from the same latent
x_p with the same noise; the loss looks only at its end (AccuQuant, NeurIPS 2025, arXiv 2510.20348):

    L = mean || x~_q - x_q ||^2

Unrolled autograd keeps M networks alive. Instead, one pass without gradient stores the M latents x~_p..x~_{q-1}; then
the rows are taken from last to first, each network call made once more with gradient and at once freed. With
lam_i = dL/dx~_i and mu_i = dL/do_i, row i of the plan gives

    mu_j  += b_ij lam_{i+1}                        for every output j that row i reads
    dL/dtheta += (df/dtheta)^T mu_i                at the network call of row i
    lam_i  = a_i lam_{i+1} + s_i (df/dx)^T mu_i    "exact": the adjoint, equal to unrolled autograd

    lam_i  = a_i lam_{i+1}                         "injected-a": the network's Jacobian dropped
    lam_i  = lam_{i+1}                             "injected-1": every step passes the end residual on unchanged

The injected forms are the paper's approximation: the residual at the end of the group enters each step's output with a
scalar weight and nothing is propagated through the later networks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..runtime.plan import SamplingPlan
from .trajectory import call

Gradient = Literal["exact", "injected-a", "injected-1"]


@dataclass(frozen=True)
class Group:
    """Rows start..stop-1 of a plan."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class GroupBatch:
    """What a group is trained on: teacher's latent at both ends, its outputs before the group, and the noise.

    start and end are (B, C, H, W); `history[j]` is the teacher's output j < group.start, for rows that look back.
    """

    start: Tensor
    end: Tensor
    history: dict[int, Tensor]
    noise: Callable[[int], Tensor]


def cut(plan: SamplingPlan, size: int) -> list[Group]:
    """Groups of `size` rows in order; the last may be shorter. Rows that leave the latent as it is belong to none.

    Such rows come from schedules that round to a repeated timestep: nothing to learn, and they would fill a group.
    """
    idle = [s.a == 1.0 and not any(s.b.values()) and not any(s.c.values()) for s in plan.steps]
    rows = [i for i in range(len(plan)) if not idle[i]]
    groups = []
    for k in range(0, len(rows), size):
        part = rows[k : k + size]
        groups.append(Group(part[0], part[-1] + 1))
    return groups


def history_needed(plan: SamplingPlan, group: Group) -> list[int]:
    """Outputs from before the group that its rows read."""
    read = {j for i in range(group.start, group.stop) for j in plan.steps[i].b}
    return sorted(j for j in read if j < group.start)


@torch.no_grad()
def roll(network: nn.Module, plan: SamplingPlan, group: Group, data: GroupBatch) -> list[Tensor]:
    """The student's latents x~_start..x~_stop, without gradient."""
    outputs = dict(data.history)
    latents = [data.start]
    for i in range(group.start, group.stop):
        outputs[i] = call(network, plan, i, latents[-1])
        latents.append(plan.advance(i, latents[-1], outputs, data.noise))
    return latents


def accumulate_gradient(
    network: nn.Module, plan: SamplingPlan, group: Group, data: GroupBatch, gradient: Gradient
) -> Tensor:
    """Add dL/dtheta of the group's end loss to the parameters' `.grad`; returns L, a detached scalar.

    Peak memory is that of one network call with gradient plus len(group) latents.
    """
    latents = roll(network, plan, group, data)
    residual = latents.pop() - data.end
    lam = residual * (2.0 / residual.numel())
    mu: dict[int, Tensor] = {}
    for i in reversed(range(group.start, group.stop)):
        step = plan.steps[i]
        for j, weight in step.b.items():
            if j >= group.start:
                mu[j] = mu[j] + weight * lam if j in mu else weight * lam
        x = latents.pop()
        carried = lam if gradient == "injected-1" else step.a * lam
        if i in mu:
            # The first row's input is data; a gradient with respect to it would be computed for nobody.
            wanted = gradient == "exact" and i > group.start
            x = x.detach().requires_grad_(wanted)
            call(network, plan, i, x).backward(mu.pop(i))
            if wanted:
                assert x.grad is not None
                carried = carried + x.grad
        lam = carried
    return residual.square().mean()


def unrolled_loss(network: nn.Module, plan: SamplingPlan, group: Group, data: GroupBatch) -> Tensor:
    """The same loss with the whole group in one graph: O(M) memory, the yardstick for the forms above."""
    outputs: dict[int, Tensor] = dict(data.history)
    x = data.start
    for i in range(group.start, group.stop):
        outputs[i] = call(network, plan, i, x)
        x = plan.advance(i, x, outputs, data.noise)
    return (x - data.end).square().mean()


def select(values: Tensor, rows: Sequence[int]) -> Tensor:
    """Trajectories `rows` of a stacked (N, ...) tensor."""
    return values[torch.as_tensor(rows, device=values.device)]
