"""Where learning begins, judged by where sampling ends.

What is best for a tensor need not be best for the picture. Ranges of least squared error clip what is rare, and a chain
of steps meets the rare again and again, each time with an error of the same sign; GPTQ's rounding loses less in every
layer and may still end further away. Which of them suits depends on model and bits, and it costs seconds to find out:
every candidate samples the held-out trajectories to the end,

    E = geometric mean over seeds of mean || x_S - x*_S ||^2

and the best is begun from.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

from torch import Tensor, nn

from ..runtime.plan import SamplingPlan
from .gptq import compensate
from .guard import held_out_error
from .initialise import observe, set_ranges
from .layers import QuantizedOperator
from .spec import CalibrationSpec, Ranges
from .trajectory import Trajectory

JUDGED: tuple[Ranges, ...] = ("min-max", "mse")


@dataclass(frozen=True)
class Candidate:
    """Ranges, and whether rounding makes up for its own errors."""

    ranges: Ranges
    compensate: bool

    @property
    def name(self) -> str:
        return f"{self.ranges}, {'gptq' if self.compensate else 'nearest'}"


@dataclass(frozen=True)
class Beginning:
    """The candidate begun from, and E by name of those that were judged: none where there was no choice."""

    chosen: str
    errors: dict[str, float]

    def __str__(self) -> str:
        others = "; ".join(f"{name} {error:.2e}" for name, error in self.errors.items())
        return f"{self.chosen} (held-out error: {others})" if others else self.chosen


def candidates(spec: CalibrationSpec) -> list[Candidate]:
    """All that `spec` leaves to be judged; one if it leaves nothing."""
    ranges = JUDGED if spec.initialisation == "judged" else (spec.initialisation,)
    rounded = {"judged": (True, False), "always": (True,), "never": (False,)}[spec.compensate]
    return [Candidate(*each) for each in product(ranges, rounded)]


def begin(
    network: nn.Module,
    operators: dict[str, QuantizedOperator],
    plan: SamplingPlan,
    teacher: Trajectory,
    judge: Trajectory,
    spec: CalibrationSpec,
    tell: Callable[[str, int, int], None],
    known: Beginning | None = None,
) -> Beginning:
    """Set ranges and rounding of all operators from `teacher`; the choice falls by `judge` unless it is `known`."""
    observed = observe(
        network, operators, plan, teacher, lambda done, total: tell("ranges", done, total), smoothing=spec.smoothing
    )

    weights = [op.weight_quantizer for op in operators.values() if op.weight_quantizer is not None]
    compensated: dict[Candidate, list[Tensor]] = {}

    def put(candidate: Candidate) -> None:
        for weight in weights:
            weight.restore()
        set_ranges(operators, observed, candidate.ranges)
        if not candidate.compensate:
            return
        if candidate in compensated:
            for weight, made in zip(weights, compensated[candidate], strict=True):
                weight.compensate(made)
            return
        compensate(network, operators, plan, teacher, lambda done, total: tell("rounding", done, total))
        compensated[candidate] = [weight.weight for weight in weights]

    choice = {candidate.name: candidate for candidate in candidates(spec)}
    if known is not None:
        put(choice[known.chosen])
        return known
    errors: dict[str, float] = {}
    if len(choice) > 1:
        for name, candidate in choice.items():
            put(candidate)
            errors[name] = held_out_error(network, operators, plan, judge)
            tell("beginnings", len(errors), len(choice))
    best = min(choice, key=lambda name: errors.get(name, 0.0))
    put(choice[best])
    return Beginning(best, errors)
