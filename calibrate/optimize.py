"""Learn scales, zero points and rounding by the multi-step objective.

Every iteration takes one group (each once per round, in shuffled order), a batch of teacher trajectories, the gradient
of the group's end loss, and one Adam step on three kinds of variables with rates of their own, cosine-decayed to zero.
The state that samples held-out seeds best, to the end of the whole chain, is the one that is kept - be it the first;
guard.py then looks at every group by itself. If asked for, what all pictures have in common is made up for before
(correction.py), so that it is the rest that is learned.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

from ..runtime.plan import SamplingPlan
from .batches import Batches
from .begin import Beginning, begin
from .carry import carry
from .correction import OutputCorrection, correct
from .guard import GroupGain, activation_state, fall_back, group_errors, held_out_error
from .journal import Journal, Snapshot, pack_optimizer, unpack_optimizer
from .layers import QuantizedOperator, fast_compute, quantization
from .multistep import accumulate_gradient, cut, graph_bytes
from .rounding import annealed_beta, training_codes
from .sharing import tabulate
from .spec import CalibrationSpec
from .trajectory import Trajectory

NORM_MEMORY = 0.9  # of the running mean that gradient clipping compares with


@dataclass
class Outcome:
    """Held-out error by iteration, as `held_out_error` defines it; `kept` is the iteration of the best.

    `groups` tells what learning did to every group; empty if nothing was learned. `uncorrected` is the error that was
    begun with, where the output's correction was tried; without a `correction` it did not help.
    """

    beginning: Beginning
    held_out: dict[int, float] = field(default_factory=dict)
    kept: int = 0
    groups: list[GroupGain] = field(default_factory=list)
    correction: OutputCorrection | None = None
    uncorrected: float | None = None

    @property
    def initial(self) -> float:
        return self.held_out[0]

    @property
    def begun(self) -> str:
        """The error that learning began with in words, and what correcting the output had to do with it."""
        if self.correction is not None:
            return f"{self.uncorrected:.2e} at the start, {self.initial:.2e} with the output corrected by timestep"
        return f"{self.initial:.2e} at the start" + (
            "" if self.uncorrected is None else " (correcting it did not help)"
        )

    @property
    def best(self) -> float:
        return self.held_out[self.kept]


Report = Callable[[str, int, int, float | None], None]  # stage, done, total, the latest loss if there is one


def calibrate(
    network: nn.Module,
    operators: dict[str, QuantizedOperator],
    plan: SamplingPlan,
    teacher: Trajectory,
    judge: Trajectory,
    spec: CalibrationSpec,
    journal: Journal,
    *,
    resume: bool = False,
    report: Report | None = None,
) -> Outcome:
    """Begin, learn from `teacher`, and leave the best state (judged on `judge`) in the operators, active."""

    def tell(stage: str, done: int, total: int, loss: float | None = None) -> None:
        if report is not None:
            report(stage, done, total, loss)

    if spec.table > 1:
        tabulate(network, operators, plan, spec.table)
    snapshot = journal.read() if resume else None
    known = None if snapshot is None else Beginning(**snapshot.record["beginning"])
    beginning = begin(network, operators, plan, teacher, judge, spec, tell, known)
    learner = _Learner(network, operators, plan, teacher, spec)
    outcome = Outcome(beginning)
    if snapshot is not None:
        outcome.uncorrected = snapshot.record["uncorrected"]
        if kept := snapshot.under("correction"):
            outcome.correction = OutputCorrection(**kept)
            outcome.correction.attach(network, operators)
    elif spec.correct:
        outcome.uncorrected = beginning.errors.get(beginning.chosen)
        if outcome.uncorrected is None:
            outcome.uncorrected = held_out_error(network, operators, plan, judge)
        outcome.correction, outcome.held_out[0] = correct(
            network, operators, plan, teacher, judge, spec.correct, outcome.uncorrected,
            lambda done, total: tell("correction", done, total),
        )  # fmt: skip
    start, norm = 0, 0.0
    best = learner.state()
    groups = cut(plan, spec.group, spec.grouping) if spec.total else []
    initial, before = activation_state(operators), group_errors(network, operators, plan, judge, groups)

    if snapshot is not None:
        start, norm = snapshot.iteration, snapshot.record["norm"]
        outcome.held_out = {int(k): v for k, v in snapshot.record["held_out"].items()}
        outcome.kept = snapshot.record["kept"]
        learner.restore(snapshot.under("now"))
        best = snapshot.under("best")
        learner.warmup.restore(snapshot.under("warmup"))
        learner.groups.restore(snapshot.under("groups"))
        unpack_optimizer(learner.optimizer, snapshot.tensors)

    def judge_now(iteration: int, error: float | None = None) -> None:
        nonlocal best
        found = held_out_error(network, operators, plan, judge) if error is None else error
        outcome.held_out[iteration] = found
        if outcome.held_out[iteration] <= outcome.best or iteration == 0:
            outcome.kept, best = iteration, learner.state()

    def record(iteration: int) -> None:
        tensors = {f"now/{k}": v for k, v in learner.state().items()} | {f"best/{k}": v for k, v in best.items()}
        for name, batches in (("warmup", learner.warmup), ("groups", learner.groups)):
            tensors |= {f"{name}/{k}": v for k, v in batches.state().items()}
        if outcome.correction is not None:
            tensors |= {f"correction/{k}": v for k, v in vars(outcome.correction).items()}
        written = {"held_out": outcome.held_out, "kept": outcome.kept, "norm": norm, "beginning": asdict(beginning)}
        written["uncorrected"] = outcome.uncorrected
        journal.write(Snapshot(iteration, tensors | pack_optimizer(learner.optimizer), written))

    if 0 not in outcome.held_out:
        judge_now(0, beginning.errors.get(beginning.chosen))
    every = max(1, math.ceil(spec.total / spec.checks))
    save_every = max(1, min(every, 20))
    for iteration in range(start, spec.total):
        loss, norm = learner.step(iteration, norm)
        done = iteration + 1
        if done % every == 0 or done == spec.total:
            judge_now(done)
        if done % save_every == 0 or done == spec.total:
            record(done)
        tell("multi-step", done, spec.total, loss)
    learner.restore(best)
    outcome.groups = fall_back(network, operators, plan, judge, groups, before, initial)
    for operator in operators.values():
        operator.active = True
    return outcome


class _Learner:
    """The trainable variables, their optimizer, and what an iteration is as a function of its number."""

    def __init__(
        self,
        network: nn.Module,
        operators: dict[str, QuantizedOperator],
        plan: SamplingPlan,
        teacher: Trajectory,
        spec: CalibrationSpec,
    ) -> None:
        self.network, self.operators, self.plan, self.spec = network, operators, plan, spec
        self.warmup = Batches(network, operators, plan, teacher, cut(plan, 1), spec)
        self.groups = Batches(network, operators, plan, teacher, cut(plan, spec.group, spec.grouping), spec)
        with quantization(operators, active=False):
            self.carry = carry(plan, spec.gradient, network, teacher)
        device = next(network.parameters()).device
        self.compute = fast_compute(device) if spec.compute == "auto" else torch.float32
        with quantization(operators, True, self.compute):
            some = slice(spec.batch)
            one = graph_bytes(network, plan, teacher.states[0, some].to(device), teacher.condition_of(some, device))
        self.kept = spec.graph_mib * 2**20 // max(1, one)
        self.weights = [op.weight_quantizer for op in operators.values() if op.weight_quantizer is not None]
        for weight in self.weights:
            weight.learn(spec.rounding, scale=spec.weight_scale_rate > 0)
        if spec.bias_rate:
            for operator in operators.values():
                operator.learn_bias()
        quantizers = [q for op in operators.values() for q in op.quantizers]
        # (name in snapshots, variable, rate)
        kinds = {
            "scale": ([q.log_scale for q in quantizers], spec.scale_rate),
            "zero_point": ([q.zero_point for q in quantizers if q.zero_point.requires_grad], spec.zero_point_rate),
            "bias": ([op.shift for op in operators.values() if op.shift is not None], spec.bias_rate),
            "weight_scale": ([w.gain for w in self.weights if w.gain is not None], spec.weight_scale_rate),
            "choice": ([w.choice for w in self.weights if w.choice is not None], spec.rounding_rate),
        }
        self.variables = {f"{k}/{i}": v for k, (many, _) in kinds.items() for i, v in enumerate(many)}
        self.rates = [rate for many, rate in kinds.values() if many]
        self.optimizer = torch.optim.Adam(
            [{"params": many, "lr": rate} for many, rate in kinds.values() if many], betas=(0.9, 0.99)
        )

    def state(self) -> dict[str, Tensor]:
        return {name: v.detach().clone() for name, v in self.variables.items()}

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor]) -> None:
        for name, v in self.variables.items():
            v.copy_(state[name])

    def step(self, iteration: int, norm: float) -> tuple[float, float]:
        """One iteration; returns the group's loss and the updated running gradient norm."""
        spec = self.spec
        progress = iteration / spec.total
        for variables, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            variables["lr"] = rate * 0.5 * (1 + math.cos(math.pi * progress))
        self.optimizer.zero_grad(set_to_none=True)
        warm = iteration < spec.warmup
        batches, number = (self.warmup, iteration) if warm else (self.groups, iteration - spec.warmup)
        group, data = batches.draw(number)
        with quantization(self.operators, True, self.compute), training_codes(self.weights):
            ended = accumulate_gradient(
                self.network, self.plan, group, data, self.carry, spec.between, spec.width, self.kept
            )
        batches.keep(number, group, data, ended)
        loss = float(ended.loss)
        if spec.rounding == "adaround" and math.isfinite(beta := annealed_beta(progress)):
            for weight in self.weights:
                (weight.regulariser(beta) * (spec.rounding_weight * loss)).backward()
        with torch.no_grad():
            now = float(torch.stack([v.grad.norm() for v in self.variables.values() if v.grad is not None]).norm())
            if math.isfinite(now):
                limit = spec.clip_norm * norm if norm else now
                if now > limit:  # a rare outlier; Adam absorbs the rest
                    for v in self.variables.values():
                        if v.grad is not None:
                            v.grad.mul_(limit / now)
                norm = NORM_MEMORY * norm + (1 - NORM_MEMORY) * min(now, limit) if norm else now
                self.optimizer.step()
        for weight in self.weights:
            weight.project()
        return loss, norm
