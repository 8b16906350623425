"""Did every group of the chain gain from learning?

Taken from the teacher's latents, with parameters theta, the end of group g errs by

    e_g(theta) = geometric mean over held-out seeds of mean || x~_q - x_q ||^2

and a group with e_g(learned) > e_g(initial) did not improve. Where its stretch of the chain has activation parameters
of its own (a row of a table), they fall back to the initial ones if those do better beside the learned weights. Where
all steps share one set there is nothing of its own to fall back to: the whole chain decides (optimize.py), and the
group is named.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..runtime.plan import SamplingPlan
from .layers import QuantizedOperator, quantization
from .multistep import Group, GroupBatch, history_needed, roll
from .trajectory import Trajectory, simulate, step_noise


@dataclass(frozen=True)
class GroupGain:
    """Error at the end of rows start..stop-1 before and after learning; `restored` where the start was gone back to."""

    start: int
    stop: int
    before: float
    after: float
    restored: bool = False

    @property
    def improved(self) -> bool:
        return self.after <= self.before


def held_out_error(
    network: nn.Module, operators: dict[str, QuantizedOperator], plan: SamplingPlan, judge: Trajectory
) -> float:
    """Squared difference of the final latents per element, its geometric mean over the judge's seeds.

    Errors of single pictures span decades; their arithmetic mean would be the error of the worst one, and the mean of
    logarithms is what PSNR averages.
    """
    with quantization(operators, active=True):
        run = simulate(network, plan, judge.seeds, judge.states.shape[2:], judge.condition)
    errors = (run.states[-1] - judge.states[-1]).square().flatten(1).mean(1).double()
    return float(errors.clamp(min=1e-20).log().mean().exp())


def group_errors(
    network: nn.Module,
    operators: dict[str, QuantizedOperator],
    plan: SamplingPlan,
    judge: Trajectory,
    groups: Sequence[Group],
) -> list[float]:
    """e_g for every group, with the operators' present parameters."""
    device = next(network.parameters()).device

    def noise(j: int) -> Tensor:
        return step_noise(judge.seeds, j, judge.states.shape[2:], device)

    errors = []
    for group in groups:
        start, end = (judge.states[i].to(device) for i in (group.start, group.stop))
        history = {j: judge.outputs[j].to(device) for j in history_needed(plan, group)}
        data = GroupBatch(start, end, history, noise, condition=judge.condition_of(slice(None), device))
        with quantization(operators, active=True):
            latents, _ = roll(network, plan, group, data)
        each = (latents[-1] - end).square().flatten(1).mean(1).double()
        errors.append(float(each.clamp(min=1e-20).log().mean().exp()))
    return errors


def activation_state(operators: dict[str, QuantizedOperator]) -> list[Tensor]:
    """Copies of every activation quantizer's log scales, in order: all of it that has rows."""
    quantizers = (q for op in operators.values() for q in op.quantizers)
    return [q.log_scale.detach().clone() for q in quantizers]


@torch.no_grad()
def fall_back(
    network: nn.Module,
    operators: dict[str, QuantizedOperator],
    plan: SamplingPlan,
    judge: Trajectory,
    groups: Sequence[Group],
    before: Sequence[float],
    initial: Sequence[Tensor],
) -> list[GroupGain]:
    """Compare with `before`, undo the rows of a table that learning made worse, and tell what became of every group.

    `before` holds the groups' errors and `initial` the activation state when learning began.
    """
    after = group_errors(network, operators, plan, judge, groups)
    quantizers = [q for op in operators.values() for q in op.quantizers]
    table = next((q.table for q in quantizers), None)
    restored: set[int] = set()

    def put(state: Sequence[Tensor], row: int) -> None:
        for quantizer, log_scale in zip(quantizers, state, strict=True):
            quantizer.log_scale[row] = log_scale[row]

    for row in range(0 if table is None else len(table)):
        assert table is not None
        members = [k for k, g in enumerate(groups) if table.row(plan.steps[g.start].timestep) == row]
        if _level(before, members) >= _level(after, members):
            continue
        learned = activation_state(operators)
        put(initial, row)
        errors = group_errors(network, operators, plan, judge, [groups[k] for k in members])
        if _level(errors, range(len(errors))) >= _level(after, members):
            put(learned, row)
            continue
        restored.update(members)
        for k, error in zip(members, errors, strict=True):
            after[k] = error
    return [GroupGain(g.start, g.stop, before[k], after[k], k in restored) for k, g in enumerate(groups)]


def verdict(gains: Sequence[GroupGain]) -> str:
    """One sentence on all groups: how many improved, which did not, which went back."""
    parts = [f"{sum(g.improved for g in gains)} of {len(gains)} no worse than before"]
    for words, chosen in (
        ("worse", [g for g in gains if not g.improved]),
        ("back to their initial parameters", [g for g in gains if g.restored]),
    ):
        if chosen:
            listed = ", ".join(f"steps {g.start + 1}-{g.stop} ({g.before:.1e} to {g.after:.1e})" for g in chosen)
            parts.append(f"{words}: {listed}")
    return "; ".join(parts)


def _level(errors: Sequence[float], members: Sequence[int]) -> float:
    return sum(math.log(errors[k]) for k in members)
