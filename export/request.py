"""What was asked of an export, and the model made ready for it."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ..calibrate.cache import TrajectoryCache
from ..calibrate.estimate import Estimate
from ..calibrate.layers import QuantizedOperator
from ..calibrate.lora import Lora
from ..calibrate.model import DiffusionModel
from ..calibrate.scheme import QuantScheme
from ..calibrate.spec import CalibrationSpec
from ..runtime.errors import AccuQuantError
from ..runtime.plan import SamplingPlan
from .tuning import Tuning


@dataclass(frozen=True)
class Request:
    """What the user asked for; None means the checkpoint family's own default."""

    checkpoint: Path
    out: Path
    scheme: QuantScheme
    spec: CalibrationSpec
    config: Path | None = None
    loras: tuple[Lora, ...] = ()
    conditions: Path | None = None
    sampler: str | None = None
    steps: int | None = None
    resume: bool = False
    device: str = "cpu"
    pictures: int = 64
    time_table: bool = True
    guidance: float | None = None
    cache: TrajectoryCache | None = None
    ray: int = 0  # workers for teacher trajectories; 0 makes them in this process
    tuning: Tuning | None = None  # why the scheme keeps some operators in float

    @property
    def work(self) -> Path:
        """Where what outlives an interruption is kept."""
        return self.out.with_name(f".{self.out.name}.work")


@dataclass(frozen=True)
class Prepared:
    """A loaded model with its operators quantized (not yet calibrated), its plan, and what calibrating will cost.

    `network` is the model's as the sampler calls it, with guidance.
    """

    model: DiffusionModel
    network: nn.Module
    guidance: float
    operators: dict[str, QuantizedOperator]
    plan: SamplingPlan
    estimate: Estimate


def check_out(out: Path) -> None:
    """Raises AccuQuantError if `out` is somebody's folder and no bundle."""
    if out.is_dir() and any(out.iterdir()) and not (out / "manifest.json").exists():
        raise AccuQuantError(f"{out} is a folder that holds something else than a bundle; choose another --out")
