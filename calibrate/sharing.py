"""Activation parameters shared by all steps, or one set for each of K stretches of the chain.

What a layer sees drifts with the noise level. A table of K scales follows it: a call at timestep t uses

    row(t) = #{k : t < bound_k}        bounds falling, the lowest timestep of every stretch but the last

so that a plan with other timesteps finds its rows too. Weights, their rounding and the zero points stay one set: an
integer kernel adds its padding and its zero point where no step is known, while a scale can be divided out before the
quantizer and multiplied back behind the operator.
"""

import torch
from torch import Tensor, nn

from ..runtime.errors import AccuQuantError
from ..runtime.plan import SamplingPlan
from .guidance import unguided
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
        if torch.compiler.is_exporting():  # the float network is exported, which has no rows
            return
        rows = {self.row(float(t)) for t in arguments[1].unique()}
        if len(rows) > 1:
            raise AccuQuantError(f"one call at timesteps of rows {sorted(rows)}; a call simulates one row of the table")
        (self.current,) = rows


def tabulate(network: nn.Module, operators: dict[str, QuantizedOperator], plan: SamplingPlan, rows: int) -> StepTable:
    """Give every activation quantizer a table of about `rows` sets, cut from `plan` in stretches of equal count.

    Raises:
        AccuQuantError: a stretch without a timestep of its own, or operators that write on one grid at all steps.
    """
    if fixed := [name for name, operator in operators.items() if operator.output is not None]:
        raise AccuQuantError(
            f"layer {fixed[0]} writes 8 bits on this target, on one grid for all steps; use one set (table=1)"
        )
    stretches = cut(plan, -(-len(plan) // rows))
    bounds = [min(plan.steps[i].timestep for i in range(g.start, g.stop)) for g in stretches]
    table = StepTable(tuple(bounds[:-1]))
    if {table.row(step.timestep) for step in plan.steps} != set(range(len(table))):
        raise AccuQuantError(
            f"{rows} sets of activation parameters do not fit a sampler whose timesteps go back and forth; use fewer"
        )
    unguided(network).register_forward_pre_hook(table.look)
    for operator in operators.values():
        for quantizer in operator.quantizers:
            quantizer.table = table
            quantizer.log_scale = nn.Parameter(torch.zeros(len(table), device=quantizer.log_scale.device))
    return table
