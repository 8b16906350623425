"""The AccuQuant objective and its gradient in O(1) memory.

A group is a run of M consecutive rows p..q-1 of the sampling plan. Teacher and student take it with the same noise; the
loss looks at its end (AccuQuant, NeurIPS 2025, arXiv 2510.20348) and, with a weight w, at the latents between:

    L = mean || x~_q - x_q ||^2 + w sum_{p < i < q} mean || x~_i - x_i ||^2

Unrolled autograd keeps M networks alive. Instead, one pass without gradient stores the M latents x~_p..x~_{q-1}; then
the rows are taken from last to first, each network call made once more with gradient and at once freed. The last K
rows, as many as a memory budget allows and at least one, keep their graphs from the first pass and are called once.
With lam_i = dL/dx~_i and mu_i = dL/do_i, row i of the plan gives

    mu_j  += b_ij lam_{i+1}                        for every output j that row i reads
    dL/dtheta += (df/dtheta)^T mu_i                at the network call of row i
    lam_i  = a_i lam_{i+1} + s_i (df/dx)^T mu_i    exact: the adjoint, equal to unrolled autograd
    lam_i  = c_i lam_{i+1}                         injected: a scalar for the row, see carry.py

plus the term of L that sees x~_i itself. The injected forms are the paper's approximation: the residual at the end of
the group enters each step's output with a scalar weight and nothing is propagated through the later networks.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from ..runtime.plan import SamplingPlan
from .carry import unit_variance_factor
from .trajectory import NOTHING, Condition, call

Grouping = Literal["count", "angle"]


@dataclass(frozen=True)
class Group:
    """Rows start..stop-1 of a plan."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class GroupBatch:
    """What a group is trained on: latents at both ends, outputs from before the group, and the noise.

    start and end are (B, C, H, W); `history[j]` is output j < group.start, for rows that look back; `between[i]` is the
    wanted latent before row i, for losses that look at it; `condition` has B rows.
    """

    start: Tensor
    end: Tensor
    history: Mapping[int, Tensor]
    noise: Callable[[int], Tensor]
    between: Mapping[int, Tensor] = field(default_factory=dict)
    condition: Condition = field(default_factory=dict)


@dataclass(frozen=True)
class Rollout:
    """What the student did in a group: its loss, the latent it ended in, and its outputs by row."""

    loss: Tensor
    end: Tensor
    outputs: dict[int, Tensor]


def cut(plan: SamplingPlan, size: int, grouping: Grouping = "count") -> list[Group]:
    """Groups in order that cover every row once; "count" gives each `size` rows, the last may be shorter.

    "angle" makes as many groups, each over an equal part of the chain's angle, so that coarse ends get shorter groups;
    a step's angle is that of its rotation between signal and noise, arccos of the injected-v factor. Rows that leave
    the latent as it is belong to no group: they come from schedules that round to a repeated timestep, hold nothing to
    learn, and would fill a group.
    """
    idle = [s.a == 1.0 and not any(s.b.values()) and not any(s.c.values()) for s in plan.steps]
    rows = [i for i in range(len(plan)) if not idle[i]]
    if grouping == "count":
        parts = [rows[k : k + size] for k in range(0, len(rows), size)]
    else:
        wanted = math.ceil(len(rows) / size)
        angles = [angle(plan, i) for i in rows]
        total, passed = sum(angles), 0.0
        parts = [[] for _ in range(wanted)]
        for row, turn in zip(rows, angles, strict=True):
            parts[min(wanted - 1, int((passed + turn / 2) / total * wanted))].append(row)
            passed += turn
        parts = [p for p in parts if p]
    return [Group(part[0], part[-1] + 1) for part in parts]


def angle(plan: SamplingPlan, i: int) -> float:
    """By how much row i turns the latent from noise to signal, in radians."""
    return math.acos(max(-1.0, min(1.0, unit_variance_factor(plan, i))))


def history_needed(plan: SamplingPlan, group: Group) -> list[int]:
    """Outputs from before the group that its rows read."""
    read = {j for i in range(group.start, group.stop) for j in plan.steps[i].b}
    return sorted(j for j in read if j < group.start)


@torch.no_grad()
def roll(
    network: nn.Module, plan: SamplingPlan, group: Group, data: GroupBatch
) -> tuple[list[Tensor], dict[int, Tensor]]:
    """The network's latents x~_start..x~_stop and its outputs by row, without gradient."""
    outputs = dict(data.history)
    latents = [data.start]
    for i in range(group.start, group.stop):
        outputs[i] = call(network, plan, i, latents[-1], data.condition)
        latents.append(plan.advance(i, latents[-1], outputs, data.noise))
    return latents, outputs


def accumulate_gradient(
    network: nn.Module,
    plan: SamplingPlan,
    group: Group,
    data: GroupBatch,
    carry: Sequence[float] | None = None,
    between: float = 0.0,
    width: int = 0,
    kept: int = 1,
) -> Rollout:
    """Add dL/dtheta to the parameters' `.grad`; `carry` holds a factor per row of the plan, None is the exact adjoint.

    `between` is the weight w of the latents inside the group. Exact: `kept` is K. Injected: all rows know their
    gradient once the group's end is known, so up to `width` samples (at least one row's) of them share one network
    call. Peak memory is that of K calls, or of `width` samples, with gradient plus len(group) latents.
    """
    if carry is None or len(group) == 1:
        return _adjoint(network, plan, group, data, between, kept)
    latents, outputs = roll(network, plan, group, data)
    residual = latents[-1] - data.end
    loss = residual.square().mean()
    lam = residual * (2.0 / residual.numel())
    rows: list[tuple[int, Tensor]] = []
    mu: dict[int, Tensor] = {}
    for i in reversed(range(group.start, group.stop)):
        _spread(plan, i, lam, mu, group)
        if i in mu:
            rows.append((i, mu.pop(i)))
        lam = carry[i] * lam
        lam, loss = _look(i, latents[i - group.start], data, between, lam, loss)
    together = max(1, width // len(data.start))
    for k in range(0, len(rows), together):
        part = rows[k : k + together]
        x = torch.cat([latents[i - group.start] * plan.steps[i].input_scale for i, _ in part])
        t = torch.tensor([plan.steps[i].timestep for i, _ in part], device=x.device, dtype=torch.float32)
        condition = {name: torch.cat([value] * len(part)) for name, value in data.condition.items()}
        output = network(x, t.repeat_interleave(len(data.start)), **condition)
        if output.requires_grad:
            output.backward(torch.cat([gradient for _, gradient in part]))
    return Rollout(loss, latents[-1], {i: outputs[i] for i in range(group.start, group.stop)})


def _adjoint(
    network: nn.Module, plan: SamplingPlan, group: Group, data: GroupBatch, between: float, kept: int
) -> Rollout:
    """The exact form, rows from last to first; the graphs of the last `kept` rows stay from the way there."""
    first_kept = max(group.start, group.stop - max(1, kept))
    latents, outputs = roll(network, plan, Group(group.start, first_kept), data)
    calls: dict[int, tuple[Tensor, Tensor]] = {}

    def differentiable(i: int, latent: Tensor) -> tuple[Tensor, Tensor]:
        # The first row's input is data; a gradient with respect to it would be computed for nobody.
        x = latent.detach().requires_grad_(i > group.start)
        return x, call(network, plan, i, x, data.condition)

    for i in range(first_kept, group.stop):
        calls[i] = differentiable(i, latents[-1])
        outputs[i] = calls[i][1].detach()
        latents.append(plan.advance(i, latents[-1], outputs, data.noise))
    residual = latents[-1] - data.end
    loss = residual.square().mean()
    lam = residual * (2.0 / residual.numel())
    mu: dict[int, Tensor] = {}
    for i in reversed(range(group.start, group.stop)):
        _spread(plan, i, lam, mu, group)
        lam = plan.steps[i].a * lam
        if i in mu:
            x, output = calls.pop(i) if i in calls else differentiable(i, latents[i - group.start])
            if output.requires_grad:
                output.backward(mu.pop(i))
            if x.grad is not None:
                lam = lam + x.grad
        lam, loss = _look(i, latents[i - group.start], data, between, lam, loss)
    return Rollout(loss, latents[-1], {i: outputs[i] for i in range(group.start, group.stop)})


def _spread(plan: SamplingPlan, i: int, lam: Tensor, mu: dict[int, Tensor], group: Group) -> None:
    """mu_j += b_ij lam_{i+1} for the outputs of the group."""
    for j, weight in plan.steps[i].b.items():
        if j >= group.start:
            mu[j] = mu[j] + weight * lam if j in mu else weight * lam


def _look(i: int, latent: Tensor, data: GroupBatch, weight: float, lam: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
    """Add the loss's own look at x~_i, if it has one, to the adjoint and to the loss."""
    if not weight or i not in data.between:
        return lam, loss
    difference = latent - data.between[i]
    return lam + difference * (2.0 * weight / difference.numel()), loss + weight * difference.square().mean()


def graph_bytes(network: nn.Module, plan: SamplingPlan, x: Tensor, condition: Condition = NOTHING) -> int:
    """What one network call at latent x (B, C, H, W) keeps for its gradient, weights excepted."""
    known = {p.untyped_storage().data_ptr() for p in (*network.parameters(), *network.buffers())}
    saved: dict[int, int] = {}

    def see(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, lambda t: t):
        call(network, plan, 0, x.detach().requires_grad_(), condition)
    return sum(saved.values())


def unrolled_loss(
    network: nn.Module, plan: SamplingPlan, group: Group, data: GroupBatch, between: float = 0.0
) -> Tensor:
    """The same loss with the whole group in one graph: O(M) memory, the yardstick for the forms above."""
    outputs: dict[int, Tensor] = dict(data.history)
    x, loss = data.start, torch.zeros((), device=data.start.device)
    for i in range(group.start, group.stop):
        if between and i in data.between:
            loss = loss + between * (x - data.between[i]).square().mean()
        outputs[i] = call(network, plan, i, x, data.condition)
        x = plan.advance(i, x, outputs, data.noise)
    return loss + (x - data.end).square().mean()


def select(values: Tensor, rows: Sequence[int]) -> Tensor:
    """Trajectories `rows` of a stacked (N, ...) tensor."""
    return values[torch.as_tensor(rows, device=values.device)]
