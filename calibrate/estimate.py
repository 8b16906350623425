"""How long a calibration will take and how much memory it needs, measured on the model itself before it starts."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..runtime.plan import SamplingPlan
from .layers import QuantizedOperator, fast_compute, quantization
from .multistep import cut
from .spec import CalibrationSpec
from .trajectory import call


@dataclass(frozen=True)
class Estimate:
    """Seconds in all, and bytes of weights, optimizer state and one network call's activations together."""

    seconds: float
    bytes: int


def estimate(
    network: nn.Module,
    operators: dict[str, QuantizedOperator],
    plan: SamplingPlan,
    spec: CalibrationSpec,
    shape: tuple[int, ...],
) -> Estimate:
    """Time one plain, one quantized and one differentiated call at the training batch, and multiply."""
    device = next(network.parameters()).device
    x = torch.randn(spec.batch, *shape, device=device, generator=torch.Generator(device).manual_seed(0))
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    def timed(active: bool, differentiate: bool) -> float:
        compute = fast_compute(device) if differentiate and spec.compute == "auto" else torch.float32
        with quantization(operators, active, compute), torch.set_grad_enabled(differentiate):
            begun = time.perf_counter()
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                out = call(network, plan, 0, x)
            if differentiate:
                out.square().mean().backward()
            return time.perf_counter() - begun

    timed(False, False)  # first-call allocations
    plain, quantized, both = timed(False, False), timed(True, False), timed(True, True)
    for parameter in network.parameters():
        parameter.grad = None

    rows = len(plan)
    per_group = rows / len(cut(plan, spec.group, spec.grouping))
    teacher = (spec.trajectories + spec.held_out) * rows / spec.batch * plain
    judging = (spec.checks + 1) * spec.held_out * rows / spec.batch * quantized
    learning = spec.warmup * both + spec.iterations * ((per_group - 1) * quantized + per_group * both)
    weights = sum(p.numel() * p.element_size() for p in network.parameters())
    # Rounding variables, their gradient and two moments: four more numbers for every weight.
    return Estimate(teacher + judging + learning, 6 * weights + sum(saved.values()))
