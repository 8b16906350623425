"""Activation parameters shared by all steps, or one set for each of K stretches of the chain.

What a layer sees drifts with the noise level. A table of K scales and zero points follows it: a call at timestep t uses

    row(t) = #{k : t < bound_k}        bounds falling, the lowest timestep of every stretch but the last

so that a plan with other timesteps finds its rows too. Weights and their rounding stay one set.
"""

import torch
from torch import Tensor, nn

from ..runtime.errors import AccuQuantError
from ..runtime.plan import SamplingPlan
from .layers import QuantizedOperator
from .multistep import cut


class StepTable:
    """The rows' bounds, and the row that the network's current call uses."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.current = 0

    def __len__(self) -> int:
        return len(self.bounds) + 1

    def row(self, timestep: float) -> int:
        return sum(timestep < bound for bound in self.bounds)

    def look(self, _: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        """Forward pre-hook of the network, arguments (x, t).

        Raises:
            AccuQuantError: a batch whose timesteps belong to different rows.
        """
        rows = {self.row(float(t)) for t in arguments[1].unique()}
        if len(rows) > 1:
            raise AccuQuantError(f"one call at timesteps of rows {sorted(rows)}; a call simulates one row of the table")
        (self.current,) = rows


def tabulate(network: nn.Module, operators: dict[str, QuantizedOperator], plan: SamplingPlan, rows: int) -> StepTable:
    """Give every activation quantizer a table of about `rows` sets, cut from `plan` in stretches of equal count.

    Raises:
        AccuQuantError: a stretch without a timestep of its own.
    """
    stretches = cut(plan, -(-len(plan) // rows))
    bounds = [min(plan.steps[i].timestep for i in range(g.start, g.stop)) for g in stretches]
    table = StepTable(tuple(bounds[:-1]))
    if {table.row(step.timestep) for step in plan.steps} != set(range(len(table))):
        raise AccuQuantError(
            f"{rows} sets of activation parameters do not fit a sampler whose timesteps go back and forth; use fewer"
        )
    network.register_forward_pre_hook(table.look)
    for operator in operators.values():
        for quantizer in operator.quantizers:
            quantizer.table = table
            for name in ("log_scale", "zero_point"):
                old = getattr(quantizer, name)
                value = torch.zeros(len(table), device=old.device)
                setattr(quantizer, name, nn.Parameter(value, requires_grad=old.requires_grad))
    return table
