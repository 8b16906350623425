"""The sampling plan: any linear sampler as a small table of numbers.

With x_i the latent, o_j the network's outputs and z_j fresh standard normal noise, row i says

    o_i     = network(s_i x_i, t_i)
    x_{i+1} = a_i x_i + sum_{j<=i} b_ij o_j + sum_{j<=i} c_ij z_j,        x_0 = init_sigma * z_init

One row is one network call. One-step samplers (DDIM, DDPM, Euler) have a single b; Heun, DPM-Solver and the linear
multistep family have a few. Both tables are sparse, so the sampler keeps exactly the outputs that a later row still
needs. The same rows drive the torch simulation, the checks and every engine.
"""

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import AccuQuantError
from .files import write_text

Array = TypeVar("Array")  # numpy array or torch tensor: the rows only scale and add
Prediction = Literal["epsilon", "sample", "v_prediction", "flow_prediction", "preconditioned"]


class PlanStep(BaseModel):
    """Row i: t_i, s_i, a_i and the sparse rows b_i and c_i, keyed by the index j <= i of the output or noise."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    timestep: float
    input_scale: float = 1.0
    a: float
    b: dict[int, float]
    c: dict[int, float] = Field(default_factory=dict)


class SamplingPlan(BaseModel):
    """A sampler with its settings. `sampler` names the scheduler it was traced from; nothing else depends on it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    schema_version: Literal[1] = 1
    sampler: str
    prediction_type: Prediction
    init_sigma: float
    steps: tuple[PlanStep, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _looks_back_only(self) -> "SamplingPlan":
        for i, step in enumerate(self.steps):
            wrong = [j for j in (*step.b, *step.c) if not 0 <= j <= i]
            if wrong:
                raise ValueError(f"row {i} uses outputs or noise {wrong}; only 0..{i} exist at that step")
        return self

    def __len__(self) -> int:
        return len(self.steps)

    @cached_property
    def timesteps(self) -> frozenset[float]:
        return frozenset(step.timestep for step in self.steps)

    @cached_property
    def last_use(self) -> tuple[int, ...]:
        """For every output j, the last row that reads it; an output may be dropped after that row."""
        last = list(range(len(self)))
        for i, step in enumerate(self.steps):
            for j in step.b:
                last[j] = max(last[j], i)
        return tuple(last)

    def advance(self, i: int, x: Array, outputs: Mapping[int, Array], noise: Callable[[int], Array]) -> Array:
        """x_{i+1} from x_i, the live outputs by index and noise(j), which is called only where c_ij is not zero."""
        step = self.steps[i]
        result: Any = step.a * x  # type: ignore[operator]
        for j, weight in step.b.items():
            result = result + weight * outputs[j]  # type: ignore[operator]
        for j, weight in step.c.items():
            result = result + weight * noise(j)  # type: ignore[operator]
        return result  # type: ignore[no-any-return]

    def sample(
        self,
        network: Callable[[np.ndarray, float], np.ndarray],
        noise: Callable[[int], np.ndarray],
        on_step: Callable[[int, np.ndarray], None] | None = None,
    ) -> np.ndarray:
        """Run every row. `noise(-1)` starts the chain, `noise(j)` is step j's; `on_step(i, x_{i+1})` may raise to stop.

        Raises:
            AccuQuantError: the latent is not finite after a step; the message names the step.
        """
        x = np.asarray(self.init_sigma * noise(-1), dtype=np.float32)
        live: dict[int, np.ndarray] = {}
        for i, step in enumerate(self.steps):
            scaled = x if step.input_scale == 1.0 else x * np.float32(step.input_scale)
            live[i] = network(scaled, step.timestep)
            x = np.asarray(self.advance(i, x, live, noise), dtype=np.float32)
            if not np.isfinite(x).all():
                raise AccuQuantError(
                    f"step {i + 1} of {len(self)} (timestep {step.timestep:g}) produced values that are not finite; "
                    "compare the engine with its fp twin, or recalibrate with wider activation scales"
                )
            live = {j: o for j, o in live.items() if self.last_use[j] > i}
            if on_step is not None:
                on_step(i, x)
        return x

    def save(self, path: Path) -> None:
        write_text(path, self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "SamplingPlan":
        try:
            return cls.model_validate_json(path.read_text())
        except FileNotFoundError:
            raise AccuQuantError(f"{path} is missing; a bundle needs its sampling plan: export it again") from None
        except (ValidationError, UnicodeDecodeError) as error:
            raise AccuQuantError(f"{path} is not a sampling plan of schema 1: {error}") from None
