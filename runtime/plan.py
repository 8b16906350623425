"""The sampling plan: any linear sampler as a small table of numbers.

With x_i the latent, o_j the network's outputs and z_j fresh standard normal noise, row i says

    o_i     = network(s_i x_i, t_i)
    x_{i+1} = a_i x_i + sum_{j<=i} b_ij o_j + sum_{j<=i} c_ij z_j,        x_0 = init_sigma * z_init

One row is one network call. One-step samplers (DDIM, DDPM, Euler) have a single b; Heun, DPM-Solver and the linear
multistep family have a few. Both tables are sparse, so the sampler keeps exactly the outputs that a later row still
needs. The same rows drive the torch simulation, the checks and every engine.
"""

import math
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import AccuQuantError
from .files import write_text

Array = TypeVar("Array")  # numpy array or torch tensor: the rows only scale and add
Prediction = Literal["epsilon", "sample", "v_prediction", "flow_prediction", "preconditioned"]


def one_line(text: str) -> str:
    """Validates what is printed: it must not steer a terminal."""
    if not text.isprintable():
        raise ValueError("control characters; a name or a sentence in one line is expected")
    return text


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
    sampler: Annotated[str, AfterValidator(one_line)]
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

    @cached_property
    def _ends(self) -> tuple[tuple[float, float], ...]:
        """(A, B) of every row: A x_i + B o_i is where the chain would end if the network went on to say o_i.

        Of noise predictions A is 1 / alpha_i. Networks are trained on inputs of unit variance, which tells the share of
        noise in s_i x_i also where the sampler adds noise of its own: sigma_i^2 = 1 - (s_i / A)^2.
        """
        ends, a, b = [], 1.0, 0.0
        for step in reversed(self.steps):
            b += a * sum(step.b.values())
            a *= step.a
            clean = abs(a / step.input_scale) if step.input_scale else 0.0
            noise = math.sqrt((clean - 1.0) * (clean + 1.0)) if clean > 1.0 else 0.0
            ends.append((a, -noise if self.prediction_type == "epsilon" else b))
        return tuple(reversed(ends))

    def glance(self, i: int, x: np.ndarray, output: np.ndarray) -> np.ndarray:
        """The picture that the network sees in x_i, judging by its output of row i; arrays of any one shape.

        Exact of predictions of noise, samples and flows. Of v_prediction it is where the chain would end if the output
        stayed as it is.
        """
        if self.prediction_type in ("sample", "preconditioned"):
            return output
        a, b = self._ends[i]
        return np.asarray(a * x + b * output, dtype=np.float32)

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
        on_output: Callable[[int, np.ndarray, np.ndarray], None] | None = None,
    ) -> np.ndarray:
        """Run every row. `noise(-1)` starts the chain, `noise(j)` is step j's.

        `on_output(i, x_i, o_i)` follows the network, `on_step(i, x_{i+1})` the row; either may raise to stop.

        Raises:
            AccuQuantError: the latent is not finite after a step; the message names the step.
        """
        x = np.asarray(self.init_sigma * noise(-1), dtype=np.float32)
        live: dict[int, np.ndarray] = {}
        for i, step in enumerate(self.steps):
            scaled = x if step.input_scale == 1.0 else x * np.float32(step.input_scale)
            live[i] = network(scaled, step.timestep)
            if on_output is not None:
                on_output(i, x, live[i])
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
            return cls.model_validate_json(path.read_text("utf-8"))
        except FileNotFoundError:
            raise AccuQuantError(f"{path} is missing; a bundle needs its sampling plan: export it again") from None
        except (ValidationError, UnicodeDecodeError) as error:
            raise AccuQuantError(f"{path} is not a sampling plan of schema 1: {error}") from None
