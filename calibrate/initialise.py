"""Starting scales, from what the full-precision network shows along teacher trajectories."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.plan import SamplingPlan
from .layers import QuantizedOperator, quantization
from .observers import Histogram, Range, max_weight_scale, min_max, mse_activation, mse_weight_scale
from .spec import Initialisation
from .trajectory import Progress, Trajectory, call

OBSERVED_STEPS = 16  # spread over the chain: ranges drift with the noise level, slowly
OBSERVED_TRAJECTORIES = 16


@torch.no_grad()
def initialise(
    network: nn.Module,
    operators: dict[str, QuantizedOperator],
    plan: SamplingPlan,
    teacher: Trajectory,
    method: Initialisation,
    progress: Progress | None = None,
) -> None:
    """Set every scale and zero point: least squared error ("mse") or full range ("min-max"), for weights and inputs."""
    for operator in operators.values():
        weight = operator.weight_quantizer
        if weight is not None:
            pick = mse_weight_scale if method == "mse" else max_weight_scale
            weight.set_scale(pick(weight.weight, weight.grid))

    rows = torch.linspace(0, len(plan) - 1, min(OBSERVED_STEPS, len(plan))).round().int().tolist()
    device = next(network.parameters()).device
    passes = 2 * len(rows)

    def watch(see: Callable[[str, int, Tensor], None], done: int) -> None:
        """Run the float network over the chosen states and show `see` every operator input."""

        def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def look(_: nn.Module, inputs: tuple[Any, ...]) -> None:
                for index, x in enumerate(inputs):
                    see(name, index, x)

            return look

        handles = [op.register_forward_pre_hook(hook(name)) for name, op in operators.items()]
        try:
            with quantization(operators, active=False):
                for n, i in enumerate(rows):
                    call(network, plan, i, teacher.states[i, :OBSERVED_TRAJECTORIES].to(device))
                    if progress is not None:
                        progress(done + n + 1, passes)
        finally:
            for handle in handles:
                handle.remove()

    ranges = {(name, k): Range() for name, op in operators.items() for k in range(len(op.inputs))}
    watch(lambda name, k, x: ranges[name, k].add(x), 0)
    histograms = {key: Histogram(seen.low, seen.high) for key, seen in ranges.items()}
    watch(lambda name, k, x: histograms[name, k].add(x), len(rows))
    for (name, k), seen in histograms.items():
        quantizer = operators[name].quantizers[k]
        find = mse_activation if method == "mse" else min_max
        quantizer.set(*find(seen, quantizer.grid))
