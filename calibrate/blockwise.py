"""The rival most tools use: every block of the network reconstructed by itself, without a sampler.

For blocks B in the order they run, with x~ the inputs that the already quantized part gives and x the float ones,

    min  E_t || B~(x~) - B(x) ||^2         over the block's rounding, activation scales and zero points

on samples drawn evenly over the timesteps (Q-Diffusion, Li et al. 2023; blocks as in BRECQ, Li et al. 2021; rounding
and activations learned together as in EDA-DM, Liu et al. 2024). Errors of a block are seen by the blocks behind it,
errors of a step by nobody.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.errors import AccuQuantError
from ..runtime.plan import SamplingPlan
from .gptq import compensate
from .initialise import initialise
from .layers import QuantizedOperator, fast_compute, quantization
from .rounding import annealed_beta, training_codes
from .spec import CalibrationSpec
from .trajectory import Trajectory, call

STEPS, TRAJECTORIES = 16, 32  # 512 samples to reconstruct on
Arguments = tuple[Tensor, ...]


def reconstruct(
    network: nn.Module,
    operators: dict[str, QuantizedOperator],
    plan: SamplingPlan,
    teacher: Trajectory,
    spec: CalibrationSpec,
    block_of: Callable[[str], str],
    report: Callable[[str, int, int], None] | None = None,
) -> None:
    """Initialise from `teacher` and learn block by block, spec.iterations each, leaving every operator active.

    `block_of` names the module that an operator is reconstructed with, the operator itself if it stands alone.

    Raises:
        AccuQuantError: a beginning that is to be judged, which takes the end of a chain.
    """
    if spec.initialisation == "judged" or spec.compensate == "judged":
        raise AccuQuantError("block-wise reconstruction has no end to judge by; choose initialisation and compensate")
    initialise(network, operators, plan, teacher, spec.initialisation, smoothing=spec.smoothing)
    if spec.compensate == "always":
        compensate(network, operators, plan, teacher)
    blocks: dict[str, dict[str, QuantizedOperator]] = {}
    for name, operator in operators.items():
        blocks.setdefault(block_of(name), {})[name] = operator
    order = _called(network, list(blocks), plan, teacher)
    for n, name in enumerate(order):
        with quantization(operators, active=False):
            wanted = _capture(network, name, plan, teacher)[1]
        inputs = _capture(network, name, plan, teacher)[0]
        _learn(network.get_submodule(name), blocks[name], inputs, wanted, spec, n)
        for operator in blocks[name].values():
            operator.active = True
        if report is not None:
            report(name, n + 1, len(order))


def _called(network: nn.Module, names: list[str], plan: SamplingPlan, teacher: Trajectory) -> list[str]:
    """The blocks in the order in which a forward pass calls them."""
    order: list[str] = []
    handles = [
        network.get_submodule(name).register_forward_pre_hook(lambda _, __, name=name: order.append(name))
        for name in names
    ]
    try:
        with torch.no_grad():
            device = next(network.parameters()).device
            call(network, plan, 0, teacher.states[0, :1].to(device), teacher.condition_of([0], device))
    finally:
        for handle in handles:
            handle.remove()
    return order


@torch.no_grad()
def _capture(network: nn.Module, name: str, plan: SamplingPlan, teacher: Trajectory) -> tuple[Arguments, Tensor]:
    """The block's arguments and output over the samples, as the operators are switched now."""
    device, some = next(network.parameters()).device, slice(TRAJECTORIES)
    arguments: list[Arguments] = []
    outputs: list[Tensor] = []

    def look(_: nn.Module, given: Any, output: Tensor) -> None:
        arguments.append(given)
        outputs.append(output)

    handle = network.get_submodule(name).register_forward_hook(look)
    try:
        for i in torch.linspace(0, len(plan) - 1, min(STEPS, len(plan))).round().int().tolist():
            call(network, plan, i, teacher.states[i, some].to(device), teacher.condition_of(some, device))
    finally:
        handle.remove()
    return tuple(torch.cat(parts) for parts in zip(*arguments, strict=True)), torch.cat(outputs)


def _learn(
    block: nn.Module,
    operators: dict[str, QuantizedOperator],
    inputs: Arguments,
    wanted: Tensor,
    spec: CalibrationSpec,
    number: int,
) -> None:
    compute = fast_compute(wanted.device) if spec.compute == "auto" else torch.float32
    weights = [op.weight_quantizer for op in operators.values() if op.weight_quantizer is not None]
    for weight in weights:
        weight.learn(spec.rounding, scale=spec.weight_scale_rate > 0)
    quantizers = [q for op in operators.values() for q in op.quantizers]
    kinds: list[tuple[list[nn.Parameter], float]] = [
        ([q.log_scale for q in quantizers], spec.scale_rate),
        ([q.zero_point for q in quantizers if q.zero_point.requires_grad], spec.zero_point_rate),
        ([w.gain for w in weights if w.gain is not None], spec.weight_scale_rate),
        ([w.choice for w in weights if w.choice is not None], spec.rounding_rate),
    ]
    optimizer = torch.optim.Adam([{"params": p, "lr": r, "rate": r} for p, r in kinds if p], betas=(0.9, 0.99))
    generator = torch.Generator().manual_seed(spec.seed * 1_000_003 + number)
    for iteration in range(spec.iterations):
        progress = iteration / spec.iterations
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * 0.5 * (1 + math.cos(math.pi * progress))
        optimizer.zero_grad(set_to_none=True)
        rows = torch.randint(len(wanted), (spec.batch,), generator=generator).to(wanted.device)
        with quantization(operators, True, compute), training_codes(weights):
            error = block(*(x[rows] for x in inputs)) - wanted[rows]
            error.square().mean().backward()
        if spec.rounding == "adaround" and math.isfinite(beta := annealed_beta(progress)):
            scale = spec.rounding_weight * float(error.detach().square().mean())
            for weight in weights:
                (weight.regulariser(beta) * scale).backward()
        optimizer.step()
        for weight in weights:
            weight.project()
