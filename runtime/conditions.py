"""What samples are sampled under: classes, prompts or rows in, rows of the network's condition inputs out.

A row depends on the class or prompt alone. Where nobody chose, a seed has one of its own, so that a bundle can be
sampled, measured and compared without further ado.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from .bundle import Bundle, ByClass, ByRows, ByText, Conditioning
from .engines import open_engine
from .engines.base import EngineOptions
from .errors import AccuQuantError
from .rows import Rows, read_rows
from .tokenizer import Tokenizer

REMEMBERED = 256  # texts; a served model sees the same negative prompt again and again


def classes_of(seeds: Sequence[int], classes: int) -> list[int]:
    """The class of every seed that nobody chose one for."""
    return [seed % classes for seed in seeds]


def prompts_of(seeds: Sequence[int], examples: Sequence[str]) -> list[str]:
    """The prompt of every seed that nobody wrote one for."""
    return [examples[seed % len(examples)] for seed in seeds]


def check_guidance(known: Conditioning | None, guidance: float) -> None:
    """Raises AccuQuantError if a network cannot be guided by that much."""
    if not np.isfinite(guidance) or guidance < 0:
        raise AccuQuantError(f"guidance {guidance:g} is out of range; 1 is none, models are used with 1.5 to 8")
    if guidance != 1.0 and (known is None or not known.can_be_guided):
        why = "takes no condition" if known is None else "has nothing that stands for none"
        raise AccuQuantError(f"guidance {guidance:g} was asked and the network {why}; leave guidance out")


class Conditions(ABC):
    """A network's condition inputs: `rows` by name for what is wanted, `free` for none.

    Wishes are classes, prompts, or rows by name.
    """

    takes: ClassVar[str]

    @abstractmethod
    def wishes(self, seeds: Sequence[int]) -> list[Any]:
        """What each seed is sampled under where nobody chose."""

    @abstractmethod
    def rows(self, wishes: Sequence[Any]) -> Mapping[str, np.ndarray]:
        """(len(wishes), ...) by input; raises AccuQuantError if the network does not know one of them."""

    @abstractmethod
    def free(self, unwanted: str = "") -> Mapping[str, np.ndarray]:
        """One row (...) by input that stands for none, or for what is unwanted."""

    def close(self) -> None:  # noqa: B027 (most hold nothing)
        """Free what it holds."""


class Classes(Conditions):
    """Class-conditional networks."""

    takes = "classes"

    def __init__(self, known: ByClass) -> None:
        self._known = known

    def wishes(self, seeds: Sequence[int]) -> list[int]:
        return classes_of(seeds, self._known.classes)

    def rows(self, wishes: Sequence[int]) -> Mapping[str, np.ndarray]:
        for wish in wishes:
            if not 0 <= wish < self._known.classes:
                raise AccuQuantError(f"class {wish} is out of range; the network knows 0 to {self._known.classes - 1}")
        return {self._known.input: np.array(wishes, np.int64)}

    def free(self, unwanted: str = "") -> Mapping[str, np.ndarray]:
        if unwanted:
            raise AccuQuantError("a network of classes takes no negative prompt; leave it out")
        return {self._known.input: np.array(self._known.null, np.int64)}


class Prompts(Conditions):
    """Text-to-image networks; every text goes through the bundle's text encoder by itself, once."""

    takes = "prompts"

    def __init__(self, bundle: Bundle, known: ByText, engine: str, threads: int) -> None:
        self._known = known
        self._tokenizer = Tokenizer(bundle.tokenizer.read_text(), str(bundle.tokenizer))
        options, target = EngineOptions(1, threads), bundle.manifest.target
        self._encoder = open_engine(bundle.graph("text_encoder"), options, engine, target)
        if len(self._encoder.outputs) != len(known.inputs):
            raise AccuQuantError(f"{self._encoder.path} has {len(self._encoder.outputs)} outputs for {known.inputs}")
        self._encoded: dict[str, list[np.ndarray]] = {}  # a row for every input

    def wishes(self, seeds: Sequence[int]) -> list[str]:
        return prompts_of(seeds, self._known.examples)

    def rows(self, wishes: Sequence[str]) -> Mapping[str, np.ndarray]:
        unknown = dict.fromkeys(text for text in wishes if text not in self._encoded)
        for text, tokens in zip(unknown, self._tokenizer(list(unknown)), strict=True):
            self._encoded[text] = [output[0] for output in self._encoder.run_all({"tokens": tokens[None]})]
        made = zip(*(self._encoded[text] for text in wishes), strict=True)
        rows = {name: np.stack(values) for name, values in zip(self._known.inputs, made, strict=True)}
        while len(self._encoded) > REMEMBERED:
            del self._encoded[next(iter(self._encoded))]
        return rows

    def free(self, unwanted: str = "") -> Mapping[str, np.ndarray]:
        rows = {name: rows[0] for name, rows in self.rows([unwanted]).items()}
        if unwanted or not self._known.zeros_for_none:
            return rows
        return {name: np.zeros_like(row) for name, row in rows.items()}

    def close(self) -> None:
        self._encoder.close()


class GivenRows(Conditions):
    """Networks that take rows made elsewhere; the bundle's own examples where nobody gave any."""

    takes = "rows"

    def __init__(self, bundle: Bundle, known: ByRows) -> None:
        self._known, self._stored = known, read_rows(bundle.conditions, known)

    def wishes(self, seeds: Sequence[int]) -> list[dict[str, np.ndarray]]:
        return [{name: value[0] for name, value in self._stored.of([seed]).items()} for seed in seeds]

    def rows(self, wishes: Sequence[Mapping[str, np.ndarray]]) -> Mapping[str, np.ndarray]:
        for wish in wishes:
            if wish.keys() != self._known.shapes.keys():
                raise AccuQuantError(f"rows of {', '.join(wish) or 'nothing'} were given; the network takes "
                                     f"{', '.join(self._known.shapes)}")  # fmt: skip
            for name, shape in self._known.shapes.items():
                if np.shape(wish[name]) != shape:
                    raise AccuQuantError(f"a row of {name} has the shape {np.shape(wish[name])}; the network takes "
                                         f"{shape}")  # fmt: skip
        return {name: np.stack([np.asarray(wish[name], np.float32) for wish in wishes]) for name in self._known.shapes}

    def free(self, unwanted: str = "") -> Mapping[str, np.ndarray]:
        if unwanted:
            raise AccuQuantError("a network of given rows takes no negative prompt; leave it out")
        return self._stored.empty


def read_conditions(bundle: Bundle, path: Path) -> Rows:
    """The rows of a file that a bundle's network is to be sampled under.

    Raises:
        AccuQuantError: a network that takes none, and as `read_rows`.
    """
    known = bundle.manifest.conditioning
    if not isinstance(known, ByRows):
        raise AccuQuantError(f"--conditions {path}: the network takes no rows of a file; leave it out")
    return read_rows(path, known)


def open_conditions(bundle: Bundle, engine: str = "auto", threads: int = 0) -> "Conditions | None":
    """Those of a bundle's network; None if it takes nothing beside latent and timestep."""
    known = bundle.manifest.conditioning
    if isinstance(known, ByText):
        return Prompts(bundle, known, engine, threads)
    if isinstance(known, ByRows):
        return GivenRows(bundle, known)
    return None if known is None else Classes(known)
