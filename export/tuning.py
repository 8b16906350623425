"""The record of a tuning: what was measured, what was decided, and how the whole came out.

It lies in the manifest, so a bundle says why some of its layers are in float, and in JSON wherever it is asked for. The
decisions can be taken again from it without measuring: times differ from run to run, a replayed record does not.
"""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..calibrate.scheme import TargetName
from ..runtime.bundle import Bundle
from ..runtime.errors import AccuQuantError
from ..runtime.files import write_text


class Saving(BaseModel):
    """The share of a step that is saved: the median of `n` pairs and the ends of its 99 % confidence interval."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    median: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.median:+.1%} ({self.low:+.1%} to {self.high:+.1%})"


class GroupDecision(BaseModel):
    """Layers that run alike, what a step saves with them in float, and whether they stay so."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    form: str
    layers: tuple[str, ...] = Field(min_length=1)
    saves: Saving
    in_float: bool


class Tuning(BaseModel):
    """Measured on `engine` at `batch`; `noise` is the share by which two engines of one graph were apart.

    `whole` is what the tuned engine saves of the untuned one; None where nothing was to be left in float.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    target: TargetName
    engine: str
    machine: dict[str, str]
    batch: int
    noise: float
    groups: tuple[GroupDecision, ...]
    whole: Saving | None = None
    step_seconds: tuple[float, float] | None = None  # medians of the untuned and the tuned engine

    @property
    def in_float(self) -> tuple[str, ...]:
        return tuple(sorted(layer for group in self.groups if group.in_float for layer in group.layers))

    @property
    def told(self) -> str:
        """What came of it, in a sentence."""
        measured = f"{self.engine} at batch {self.batch}, noise {self.noise:.1%}"
        if self.whole is None or self.step_seconds is None:
            return f"none of {len(self.groups)} groups of layers is faster in float ({measured})"
        before, after = (1e3 * seconds for seconds in self.step_seconds)
        times = f"a step takes {before:.2f} ms without and {after:.2f} ms with it, {self.whole} saved"
        if not self.in_float:
            return f"dropped: {times} ({measured})"
        count = sum(group.in_float for group in self.groups)
        return f"{len(self.in_float)} layers in {count} of {len(self.groups)} groups in float; {times} ({measured})"

    def save(self, path: Path) -> None:
        write_text(path, self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Tuning":
        """From a bundle that was tuned, or from a JSON file.

        Raises:
            AccuQuantError: there is no such record at `path`.
        """
        try:
            if path.is_dir():
                return cls.model_validate(Bundle(path).manifest.provenance["tuning"])
            return cls.model_validate_json(path.read_text())
        except KeyError:
            raise AccuQuantError(f"{path} was exported without --tune and holds no decisions to take again") from None
        except FileNotFoundError:
            raise AccuQuantError(f"{path} does not exist; name a bundle that was exported with --tune") from None
        except (ValidationError, UnicodeDecodeError) as error:
            raise AccuQuantError(f"{path} holds no tuning that this version understands: {error}") from None
