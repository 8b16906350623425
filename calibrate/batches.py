"""What each iteration trains on: a group, and a batch of trajectories at its start.

    start "teacher"    every group starts on the teacher's latents: errors made before the group are not seen
    start "student"    it starts where the student itself, with the parameters it had, ended the group before

For the second, as many batches as there are groups walk down the chain side by side, each a group further per round, so
that the drifted start costs no network call: it is the end of that batch's last visit. What the group must end in is

    aim "trajectory"       the teacher's latent on its own trajectory: the group also learns to undo what drifted before
    aim "local"            where the teacher ends from the same start, at the price of its network calls

Everything is a function of (seed, iteration) and of the latents kept here, which belong to a snapshot.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..runtime.plan import SamplingPlan
from .layers import QuantizedOperator, quantization
from .multistep import Group, GroupBatch, Rollout, history_needed, roll, select
from .spec import CalibrationSpec
from .trajectory import Trajectory, step_noise


class Batches:
    """Draws (group, batch) for an iteration and takes back where the student ended."""

    def __init__(
        self,
        network: nn.Module,
        operators: dict[str, QuantizedOperator],
        plan: SamplingPlan,
        teacher: Trajectory,
        groups: Sequence[Group],
        spec: CalibrationSpec,
    ) -> None:
        self.network, self.operators, self.plan, self.teacher = network, operators, plan, teacher
        self.groups, self.spec = groups, spec
        self.device = next(network.parameters()).device
        self.walked: dict[int, dict[str, Tensor]] = {}  # lane -> latent "x" and live outputs by row

    def draw(self, iteration: int) -> tuple[Group, GroupBatch]:
        lane, visit = self._place(iteration)
        group = self.groups[visit % len(self.groups)]
        rows = self._rows(lane, visit)
        seeds = [self.teacher.seeds[r] for r in rows]
        shape = self.teacher.states.shape[2:]
        needed = history_needed(self.plan, group)
        walked = self.walked.get(lane) if visit % len(self.groups) else None
        if walked is None:
            start = self._teacher_state(group.start, rows)
            history = {j: select(self.teacher.outputs[j], rows).to(self.device) for j in needed}
        else:
            start, history = walked["x"].to(self.device), {j: walked[str(j)].to(self.device) for j in needed}

        def noise(j: int) -> Tensor:
            return step_noise(seeds, j, shape, self.device)

        condition = self.teacher.condition_of(rows, self.device)
        inner = range(group.start + 1, group.stop) if self.spec.between else range(0)
        if walked is not None and self.spec.aim == "local":
            with quantization(self.operators, active=False):
                here = GroupBatch(start, start, history, noise, condition=condition)
                latents, _ = roll(self.network, self.plan, group, here)
            wanted = {i: latents[i - group.start] for i in (*inner, group.stop)}
        else:
            wanted = {i: self._teacher_state(i, rows) for i in (*inner, group.stop)}
        return group, GroupBatch(start, wanted.pop(group.stop), history, noise, wanted, condition)

    def keep(self, iteration: int, group: Group, data: GroupBatch, ended: Rollout) -> None:
        """Remember the end of iteration's group as the start of its lane's next one."""
        lane, visit = self._place(iteration)
        if self.spec.start == "teacher" or (visit + 1) % len(self.groups) == 0:
            self.walked.pop(lane, None)
            return
        outputs = {**data.history, **ended.outputs}
        live = {str(j): o.cpu() for j, o in outputs.items() if self.plan.last_use[j] >= group.stop}
        self.walked[lane] = {"x": ended.end.cpu()} | live

    def state(self) -> dict[str, Tensor]:
        return {f"{lane}/{name}": v for lane, kept in self.walked.items() for name, v in kept.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.walked = {}
        for key, value in state.items():
            lane, name = key.split("/")
            self.walked.setdefault(int(lane), {})[name] = value

    def _place(self, iteration: int) -> tuple[int, int]:
        """The lane an iteration belongs to, and how many groups down (over all its passes) that lane then is.

        Every round visits every group once, in shuffled order.
        """
        cycle, place = divmod(iteration, len(self.groups))
        generator = torch.Generator().manual_seed(self.spec.seed * 1_000_003 + cycle)
        lane = int(torch.randperm(len(self.groups), generator=generator)[place])
        return lane, lane + cycle

    def _rows(self, lane: int, visit: int) -> list[int]:
        """Which trajectories: a new draw for every visit, or for every pass where a lane walks with the student."""
        n, count = len(self.teacher.seeds), len(self.groups)
        number = visit * count + lane if self.spec.start == "teacher" else (visit // count) * count + lane
        generator = torch.Generator().manual_seed(self.spec.seed * 1_000_003 + 500_009 + number)
        return torch.randperm(n, generator=generator)[: min(n, self.spec.batch)].tolist()

    def _teacher_state(self, i: int, rows: list[int]) -> Tensor:
        return select(self.teacher.states[i], rows).to(self.device)
