"""The settings of one calibration, and their named presets."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..runtime.errors import AccuQuantError
from .carry import Gradient
from .multistep import Grouping
from .rounding import Rounding

Ranges = Literal["mse", "min-max", "percentile"]
Initialisation = Literal["judged", "mse", "min-max", "percentile"]
Start = Literal["teacher", "student"]
Aim = Literal["trajectory", "local"]
PresetName = Literal["smoke", "default", "best"]


class CalibrationSpec(BaseModel):
    """Everything that decides the outcome, together with the model, the plan and the scheme."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    initialisation: Initialisation = Field("judged", description="how ranges are found; judged tries min-max and mse")
    smoothing: float = Field(0.0, ge=0, le=1, description="SmoothQuant's alpha for linear layers; 0 does without")
    compensate: Literal["judged", "always", "never"] = Field(
        "judged", description="whether rounding starts where later columns make up for earlier ones (GPTQ)"
    )
    group: int = Field(5, ge=1, description="M, the sampling steps that are simulated before the loss is taken")
    grouping: Grouping = Field("count", description="groups of equal count, or of equal angle between signal and noise")
    gradient: Gradient = "exact"
    start: Start = Field("teacher", description="whose latents groups start from")
    aim: Aim = Field("trajectory", description="end of the teacher's trajectory, or its end from the same start")
    table: int = Field(1, ge=1, description="sets of activation parameters along the chain; 1 shares one by all steps")
    between: float = Field(0.0, ge=0, description="weight of the latents inside a group beside its end")
    rounding: Rounding = "offset"
    warmup: int = Field(0, ge=0, description="iterations on groups of one step before the others")
    iterations: int = Field(400, ge=0, description="iterations on groups of M steps")
    batch: int = Field(2, ge=1, description="trajectories per iteration")
    graph_mib: int = Field(512, ge=0, description="memory for graphs that the exact gradient need not compute twice")
    width: int = Field(16, ge=1, description="samples that may share a call of the injected gradient's second pass")
    trajectories: int = Field(64, ge=1)
    held_out: int = Field(24, ge=1, description="trajectories that only judge")
    checks: int = Field(2, ge=1, description="how often the held-out trajectories are sampled to the end")
    scale_rate: float = Field(2e-5, gt=0, description="Adam's step for log scales")
    zero_point_rate: float = Field(0.003, gt=0, description="Adam's step for zero points, in codes")
    weight_scale_rate: float = Field(2e-5, ge=0, description="Adam's step for log scales of weights; 0 leaves them")
    correct: int = Field(0, ge=0, description="trajectories that the output's correction is fitted to; 0 has none")
    bias_rate: float = Field(0.0, ge=0, description="Adam's step for biases; 0 leaves them as they are")
    rounding_rate: float = Field(3e-4, gt=0, description="Adam's step for the rounding variables")
    rounding_weight: float = Field(1.0, ge=0, description="AdaRound's undecided share of a layer, in losses")
    clip_norm: float = Field(10.0, gt=0, description="largest gradient norm, in multiples of its running mean")
    compute: Literal["auto", "float32"] = Field("auto", description="auto multiplies codes in bfloat16 where native")
    seed: int = Field(0, ge=0)

    @property
    def total(self) -> int:
        """Iterations of both kinds."""
        return self.warmup + self.iterations


PRESETS: Mapping[PresetName, Mapping[str, Any]] = {
    "smoke": {"iterations": 8, "trajectories": 8, "held_out": 4, "batch": 4, "checks": 1},
    "default": {},
    "best": {"iterations": 4000, "batch": 4, "trajectories": 256, "held_out": 32, "checks": 10},
}


def parse_settings(texts: Sequence[str]) -> dict[str, Any]:
    """Settings of a CalibrationSpec from `name=value` texts, such as group=10 or gradient=injected-v.

    Raises:
        AccuQuantError: not of that form, or no setting of that name.
    """
    settings: dict[str, Any] = {}
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals or name not in CalibrationSpec.model_fields:
            known = ", ".join(CalibrationSpec.model_fields)
            raise AccuQuantError(f"--set {text}: name=value is expected, with a name among {known}")
        settings[name] = value
    return settings
