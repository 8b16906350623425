"""Which layers low bits hurt most: a few, and mostly small ones. Those keep 8 bits.

With f the network and f_l the same with nothing but the weight of operator l rounded to the bits asked for,

    S_l = mean over timesteps t of   E || f_l(x_t, t) - f(x_t, t) ||^2  /  sum_k E || f_k(x_t, t) - f(x_t, t) ||^2

on the teacher's latents, every timestep counting alike. Operators are taken by S_l per weight, the largest first, while
all of them together hold no more than the share of the weights that may keep 8 bits.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from ..runtime.plan import SamplingPlan
from .grid import Grid
from .layers import QuantizedOperator, quantization
from .observers import max_weight_scale
from .rounding import WeightQuantizer
from .trajectory import Progress, Trajectory, call

STEPS = 4  # in the middle of as many stretches of the chain
SAMPLES = 2
KEPT = Grid(8, signed=True, symmetric=True)


def low_bit(operators: dict[str, QuantizedOperator]) -> dict[str, WeightQuantizer]:
    """The weights of less than 8 bits, by operator."""
    weights = {name: operator.weight_quantizer for name, operator in operators.items()}
    return {name: weight for name, weight in weights.items() if weight is not None and weight.grid.bits < KEPT.bits}


def calls(operators: dict[str, QuantizedOperator], plan: SamplingPlan) -> int:
    """Network calls of one sample that `sensitivity` takes."""
    return min(STEPS, len(plan)) * SAMPLES * (len(low_bit(operators)) + 1)


@torch.no_grad()
def sensitivity(
    network: nn.Module,
    operators: dict[str, QuantizedOperator],
    plan: SamplingPlan,
    teacher: Trajectory,
    progress: Progress | None = None,
) -> dict[str, float]:
    """S_l of every operator with a weight of less than 8 bits, summing to one."""
    weights = low_bit(operators)
    device, some = next(network.parameters()).device, slice(SAMPLES)
    count = min(STEPS, len(plan))
    rows = ((torch.arange(count) + 0.5) * len(plan) / count).int().tolist()
    shares = dict.fromkeys(weights, 0.0)
    with quantization(operators, active=False):
        for done, i in enumerate(rows):
            x, condition = teacher.states[i, some].to(device), teacher.condition_of(some, device)
            wanted = call(network, plan, i, x, condition)
            errors = {}
            for n, (name, weight) in enumerate(weights.items()):
                with _rounded(operators[name], weight):
                    errors[name] = float((call(network, plan, i, x, condition) - wanted).square().mean())
                if progress is not None:
                    progress(done * len(weights) + n + 1, count * len(weights))
            total = sum(errors.values())
            for name, error in errors.items():
                shares[name] += error / total / count if total else 0.0
    return shares


def keep_sensitive(
    network: nn.Module,
    operators: dict[str, QuantizedOperator],
    plan: SamplingPlan,
    teacher: Trajectory,
    share: float,
    progress: Progress | None = None,
) -> list[str]:
    """Put the most sensitive of the low-bit weights on 8 bits, at most `share` of all their entries; tells which."""
    if not share or not low_bit(operators):
        return []
    return keep(operators, sensitivity(network, operators, plan, teacher, progress), share)


def keep(operators: dict[str, QuantizedOperator], found: Mapping[str, float], share: float) -> list[str]:
    """The same, by sensitivities `found` before."""
    weights = low_bit(operators)
    left = share * sum(weight.weight.numel() for weight in weights.values())
    chosen = []
    for name in sorted(weights, key=lambda name: found[name] / weights[name].weight.numel(), reverse=True):
        size = weights[name].weight.numel()
        if size > left:
            break
        left -= size
        weights[name].grid = KEPT
        chosen.append(name)
    return chosen


@contextmanager
def _rounded(operator: QuantizedOperator, weight: WeightQuantizer) -> Iterator[None]:
    """The float operator with its weight rounded to nearest, within the block."""
    layer, scale = operator.layer, max_weight_scale(weight.weight, weight.grid)
    own = layer.weight.data
    codes = weight.grid.clamp(weight.grid.nearest(weight.weight / scale))
    layer.weight.data = (codes * scale).reshape(own.shape)
    try:
        yield
    finally:
        layer.weight.data = own
