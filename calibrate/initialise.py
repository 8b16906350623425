"""Starting scales, from what the full-precision network shows along teacher trajectories."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.plan import SamplingPlan
from .layers import QuantizedOperator, quantization
from .observers import Histogram, Range, max_weight_scale, min_max, mse_activation, mse_weight_scale, percentile
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
    """Set every scale and zero point, for inputs by `method`; weights clip nothing with "min-max", else err least."""
    for operator in operators.values():
        weight = operator.weight_quantizer
        if weight is not None:
            pick = max_weight_scale if method == "min-max" else mse_weight_scale
            weight.set_scale(pick(weight.weight, weight.grid))

    table = next((q.table for op in operators.values() for q in op.quantizers), None)
    wanted = OBSERVED_STEPS if table is None else max(OBSERVED_STEPS, 2 * len(table))
    rows = torch.linspace(0, len(plan) - 1, min(wanted, len(plan))).round().int().tolist()
    device = next(network.parameters()).device
    passes = 2 * len(rows)

    Key = tuple[str, int, int]  # operator, input, row of its table
    row = 0

    def watch(see: Callable[[Key, Tensor], None], done: int) -> None:
        """Run the float network over the chosen states and show `see` every operator input."""
        nonlocal row

        def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def look(_: nn.Module, inputs: tuple[Any, ...]) -> None:
                for index, x in enumerate(operators[name].parts(inputs)):
                    see((name, index, row), x)

            return look

        handles = [op.register_forward_pre_hook(hook(name)) for name, op in operators.items()]
        try:
            with quantization(operators, active=False):
                for n, i in enumerate(rows):
                    row = 0 if table is None else table.row(plan.steps[i].timestep)
                    call(network, plan, i, teacher.states[i, :OBSERVED_TRAJECTORIES].to(device))
                    if progress is not None:
                        progress(done + n + 1, passes)
        finally:
            for handle in handles:
                handle.remove()

    ranges: dict[Key, Range] = defaultdict(Range)
    watch(lambda key, x: ranges[key].add(x), 0)
    histograms = {key: Histogram(seen.low, seen.high) for key, seen in ranges.items()}
    watch(lambda key, x: histograms[key].add(x), len(rows))
    find = {"mse": mse_activation, "min-max": min_max, "percentile": percentile}[method]
    for (name, k, at), seen in histograms.items():
        quantizer = operators[name].quantizers[k]
        quantizer.set(*find(seen, quantizer.grid), at)
