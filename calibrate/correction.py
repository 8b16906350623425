"""What low bits do to the output alike in every picture, made up for by a few numbers for every timestep.

A quantized network errs in two ways: differently in every picture, and alike in all of them - its prediction is a
little weak, leans towards its input, or is a little bright. Of single steps the second kind is the smaller part, but
it has one direction, so it is what adds up along the chain. With x what the network is given and o what it returns,

    o' = o + alpha_t o + beta_t x + gamma_t,        gamma_t a number for every channel,

where the coefficients bring the student's own chain back to the teacher's. They are found row by row, those of the
rows before being in force already, by least squares over trajectories, channels and pixels:

    r = (x_{i+1} - x~_{i+1}) / b_ii                 what the output of row i lacks, x~ with o'_i = o_i
    alpha, beta, gamma = argmin || r - alpha o - beta x - gamma ||^2

It is the multi-step objective with a group as long as the chain, in closed form. PTQD (He et al., NeurIPS 2023) takes
what correlates with the output out of every step by itself; here what was left over by earlier steps is seen as well.
Guided outputs are o_0 + g (o_c - o_0), whose weights sum to one: correcting both halves corrects the whole alike.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..runtime.plan import SamplingPlan
from .guard import held_out_error
from .guidance import unguided
from .layers import QuantizedOperator, quantization
from .trajectory import Progress, Trajectory, call, step_noise

BATCH = 32


@dataclass(frozen=True, eq=False)
class OutputCorrection:
    """`timesteps` (T,) and `coefficients` (T, 2 + C), float32: alpha, beta and gamma of every timestep.

    A timestep that is none of them has the nearest one's.
    """

    timesteps: Tensor
    coefficients: Tensor

    def __call__(self, x: Tensor, t: Tensor, output: Tensor) -> Tensor:
        """o' of what the network was given, x (B, C, ...) and t (B,), and its output (B, C, ...)."""
        points, coefficients = self.timesteps.to(t.device), self.coefficients.to(output)
        found = coefficients[(t[:, None] - points).abs().argmin(1)]
        alpha, beta, gamma = found.reshape(*found.shape, *[1] * (output.ndim - 2)).split([1, 1, found.shape[1] - 2], 1)
        return output + alpha * output + beta * x + gamma

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, OutputCorrection):
            return NotImplemented
        return torch.equal(self.timesteps, other.timesteps) and torch.equal(self.coefficients, other.coefficients)

    def attach(self, network: nn.Module, operators: Mapping[str, QuantizedOperator]) -> RemovableHandle:
        """Correct the outputs of `network` from now on, wherever its quantizers are on."""

        def corrected(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            # The float network is exported, and its corrected form written behind it.
            if torch.compiler.is_exporting() or not any(operator.active for operator in operators.values()):
                return None
            return self(arguments[0], arguments[1], output)

        return unguided(network).register_forward_hook(corrected)


@torch.no_grad()
def fit(
    network: nn.Module,
    operators: dict[str, QuantizedOperator],
    plan: SamplingPlan,
    teacher: Trajectory,
    count: int,
    progress: Progress | None = None,
) -> OutputCorrection:
    """The correction of a network that has none yet, from the first `count` trajectories of the teacher."""
    seeds = teacher.seeds[:count]
    device = next(network.parameters()).device

    def noise(j: int) -> Tensor:
        return step_noise(seeds, j, teacher.states.shape[2:], "cpu")

    x, live = teacher.states[0, :count], dict[int, Tensor]()
    found: dict[float, Tensor] = {}
    for i, step in enumerate(plan.steps):
        outputs = []
        with quantization(operators, active=True):
            for first in range(0, len(seeds), BATCH):
                some = slice(first, min(first + BATCH, len(seeds)))
                outputs.append(call(network, plan, i, x[some].to(device), teacher.condition_of(some, device)).cpu())
        live[i] = torch.cat(outputs)
        given, weight = x * step.input_scale, step.b.get(i, 0.0)
        if step.timestep not in found:
            lacks = teacher.states[i + 1, :count] - plan.advance(i, x, live, noise)
            found[step.timestep] = least_squares(live[i], given, lacks / weight if weight else torch.zeros_like(lacks))
        here = OutputCorrection(torch.tensor([step.timestep]), found[step.timestep][None])
        live[i] = here(given, torch.full((len(seeds),), step.timestep), live[i])
        x = plan.advance(i, x, live, noise)
        live = {j: output for j, output in live.items() if plan.last_use[j] > i}
        if progress is not None:
            progress(i + 1, len(plan))
    return OutputCorrection(torch.tensor(list(found)), torch.stack(list(found.values())))


def least_squares(output: Tensor, x: Tensor, lacks: Tensor) -> Tensor:
    """(2 + C,): alpha, beta, gamma that explain most of `lacks`; all (N, C, ...).

    The shortest of them where output and x are one direction.
    """
    over = [d for d in range(output.ndim) if d != 1]
    o, x, r = (value.double() for value in (output, x, lacks))
    means = [value.mean(over, keepdim=True) for value in (o, x, r)]
    columns = torch.stack([(o - means[0]).flatten(), (x - means[1]).flatten()])
    normal, wanted = columns @ columns.T, columns @ (r - means[2]).flatten()
    alpha, beta = torch.linalg.pinv(normal, hermitian=True) @ wanted
    gamma = means[2] - alpha * means[0] - beta * means[1]
    return torch.cat([torch.stack([alpha, beta]), gamma.flatten()]).float()


def correct(
    network: nn.Module,
    operators: dict[str, QuantizedOperator],
    plan: SamplingPlan,
    teacher: Trajectory,
    judge: Trajectory,
    count: int,
    before: float,
    progress: Progress | None = None,
) -> tuple[OutputCorrection | None, float]:
    """Fit and attach a correction; none where the error on held-out seeds is no less than `before`. And that error."""
    found = fit(network, operators, plan, teacher, count, progress)
    attached = found.attach(network, operators)
    after = held_out_error(network, operators, plan, judge)
    if after < before:
        return found, after
    attached.remove()
    return None, before
