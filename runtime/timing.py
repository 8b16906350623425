"""Where a step's time goes, operator by operator, as the engine itself measures it.

Kernels are told apart by the operator that each computes; what belongs to none (norms, activations, copies between
layouts) is told apart by kind. Times of a profiled run add up to more than a step takes: measuring costs time as well.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from . import noise
from .bundle import Bundle, NetworkName
from .denoiser import Denoiser
from .engines import open_engine
from .engines.base import EngineOptions, Kernel


@dataclass(frozen=True)
class StepTimes:
    """Microseconds of one step: of every operator by name, and of all other kernels by their kind."""

    operators: dict[str, float]
    others: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.operators.values()) + sum(self.others.values())


def step_times(bundle: Bundle, network: NetworkName, engine: str, options: EngineOptions, repeats: int) -> StepTimes:
    """Medians over `repeats` profiled steps of `network` at `options.batch`, after three that warm up.

    Raises:
        AccuQuantError: no such engine here, or one that does not time its kernels.
    """
    opened = open_engine(bundle.graph(network), replace(options, profile=True), engine, bundle.manifest.target)
    x = noise.batch(range(options.batch), -1, bundle.manifest.sample_shape)
    try:
        fed = Denoiser(opened, options.batch).feed(x, bundle.plan.steps[0].timestep)
        runs = []
        for i in range(-3, repeats):
            opened.run(fed)
            if i >= 0:
                runs.append(attribute(opened.kernels(), bundle.manifest.operators))
    finally:
        opened.close()
    return StepTimes(_medians(run.operators for run in runs), _medians(run.others for run in runs))


def attribute(kernels: Iterable[Kernel], operators: Iterable[str]) -> StepTimes:
    """Give every kernel's time to the operators it computes, in equal parts, or else to its kind.

    Engines derive names from ours: what stands before a slash is the operator's.
    """
    known = set(operators)
    times: dict[str, float] = dict.fromkeys(known, 0.0)
    others: dict[str, float] = defaultdict(float)
    for kernel in kernels:
        taken = kernel.microseconds or 0.0
        owners = {node.partition("/")[0] for node in kernel.nodes} & known
        for owner in owners:
            times[owner] += taken / len(owners)
        if not owners and taken:
            others[kernel.kind] += taken
    return StepTimes(times, dict(others))


def _medians(rows: Iterable[Mapping[str, float]]) -> dict[str, float]:
    taken: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        for name, value in row.items():
            taken[name].append(value)
    return {name: float(np.median(values)) for name, values in taken.items()}
