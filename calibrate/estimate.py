"""How long a calibration will take and how much memory it needs, measured on the model itself before it starts."""

import time
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor, nn

from ..runtime.plan import SamplingPlan
from . import gptq, sensitivity
from .begin import candidates
from .initialise import OBSERVED_STEPS, OBSERVED_TRAJECTORIES
from .layers import QuantizedOperator, fast_compute, quantization
from .multistep import cut, graph_bytes
from .spec import CalibrationSpec
from .trajectory import NOTHING, Condition, call


@dataclass(frozen=True)
class Estimate:
    """Seconds in all, and bytes of weights, optimizer state and the activations kept for gradients together."""

    seconds: float
    bytes: int

    def told(self, free: int) -> str:
        """The two in words, and that `free` bytes of memory are less, if they are."""
        short = f"; {free / 2**30:.1f} GiB are free, so it may not come to its end" if self.bytes > free else ""
        return f"about {self.seconds / 60:.1f} min and {self.bytes / 2**30:.1f} GiB{short}"


def free_memory(device: str) -> int:
    """Bytes that are free where a calibration on that device runs."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def estimate(
    network: nn.Module,
    operators: dict[str, QuantizedOperator],
    plan: SamplingPlan,
    spec: CalibrationSpec,
    shape: tuple[int, ...],
    condition: Condition = NOTHING,
    *,
    reserve: float = 0.0,
) -> Estimate:
    """Time one plain, one quantized and one differentiated call at the training batch, and multiply.

    `condition` holds one row of every input that the network takes beside x and t.
    """
    device = next(network.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(spec.batch, *shape, device=device, generator=generator)
    many = torch.randn(max(spec.batch, 8), *shape, device=device, generator=generator)  # as trajectories are computed

    def given(count: int) -> Condition:
        return {name: value[:1].to(device).expand(count, *value.shape[1:]) for name, value in condition.items()}

    def timed(x: Tensor, active: bool, differentiate: bool) -> float:
        compute = fast_compute(device) if differentiate and spec.compute == "auto" else torch.float32
        # The adjoint needs the gradient of the latent too; of weights alone there are no other variables yet.
        x = x.clone().requires_grad_(differentiate)
        with quantization(operators, active, compute), torch.set_grad_enabled(differentiate):
            taken = []
            for _ in range(2):  # the first call of a kind compiles and allocates
                begun = time.perf_counter()
                out = call(network, plan, 0, x, given(len(x)))
                if differentiate:
                    out.square().mean().backward()
                taken.append(time.perf_counter() - begun)
            return min(taken)

    plain, judged = timed(many, False, False) / len(many), timed(many, True, False) / len(many)
    quantized, both = timed(x, True, False), timed(x, True, True)
    for parameter in network.parameters():
        parameter.grad = None

    with quantization(operators, True, fast_compute(device) if spec.compute == "auto" else torch.float32):
        graph = graph_bytes(network, plan, x, given(len(x)))

    rows = len(plan)
    per_group = rows / len(cut(plan, spec.group, spec.grouping))
    kept = min(per_group, max(1, spec.graph_mib * 2**20 // graph))
    teacher = (spec.trajectories + spec.held_out) * rows * plain
    begun = candidates(spec)
    # Every beginning, every group by itself before and after, and the corrected output.
    judged_times = len(begun) + (spec.checks + 2 if spec.total else 0) + (spec.correct > 0)
    judging = judged_times * spec.held_out * rows * judged
    looking = sensitivity.calls(operators, plan) * plain if reserve else 0.0
    looking += 2 * OBSERVED_STEPS * min(OBSERVED_TRAJECTORIES, spec.trajectories) * plain
    once = gptq.seconds(operators, device) + gptq.CALLS * plain
    rounding = sum(candidate.compensate for candidate in begun) * once
    correcting = min(spec.correct, spec.trajectories) * rows * judged
    learning = spec.warmup * both + spec.iterations * ((per_group - kept) * quantized + per_group * both)
    weights = sum(p.numel() * p.element_size() for p in network.parameters())
    # Rounding variables, their gradient and two moments: four more numbers for every weight.
    return Estimate(teacher + looking + rounding + judging + learning + correcting, 6 * weights + int(kept * graph))
