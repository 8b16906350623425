"""What every engine is: a compiled graph of fixed batch that maps named arrays to one array."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path
from typing import Literal

import numpy as np

from ..errors import AccuQuantError

Rest = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Port:
    """A network input or output: name, numpy dtype and full shape, batch included."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Kernel:
    """One step of the engine's own execution graph: what runs, in which precision, for which graph nodes."""

    kind: str
    precision: str
    nodes: tuple[str, ...]
    microseconds: float | None = None


def parts_told(found: Mapping[str, str]) -> dict[str, str]:
    """Precisions by name; a layer that was taken apart into `qkv`, `qkv/1`, `qkv/2` has those of all its parts."""
    told = dict(found)
    for name in found:
        parts = takewhile(found.__contains__, (f"{name}/{n}" for n in count(1)))
        told[name] = " and ".join(dict.fromkeys([found[name], *map(found.__getitem__, parts)]))
    return told


@dataclass(frozen=True)
class EngineOptions:
    """How a graph is compiled.

    `threads` 0 leaves the choice to the library; `rest` is the type of all that is not integer, of a twin everything;
    with `profile` kernels are timed while they run, which costs time; `target` is what a bundle's graph was made for.
    """

    batch: int = 8
    threads: int = 0
    rest: Rest = "float32"
    profile: bool = False
    target: str = ""


class Engine(ABC):
    """Load by constructing, then `run`, then `close`. Engines are not thread-safe; give each thread its own."""

    name: str  # library and version, as shown to people
    kept_in_float: Mapping[str, str] = {}  # operators that this engine does not run in integers on this machine: why

    def __init__(self, path: Path, options: EngineOptions) -> None:
        if not path.exists():
            raise AccuQuantError(f"{path} does not exist; is the bundle complete?")
        if options.rest not in self.rests():
            known = ", ".join(self.rests())
            raise AccuQuantError(f"{type(self).__name__} computes in {known} on this machine; {options.rest} was asked")
        self.path, self.options = path, options
        self.inputs: tuple[Port, ...] = ()
        self.outputs: tuple[Port, ...] = ()

    @classmethod
    def rests(cls) -> tuple[Rest, ...]:
        """Types besides integers that this machine computes in natively."""
        return ("float32",)

    def run(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """The network's output for `inputs` by name; the array stays valid until the next call.

        Raises:
            AccuQuantError: names, dtypes or shapes are not the engine's, or the library fails.
        """
        return self._outputs(inputs)[0]

    def run_all(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Like `run`, of a graph with several outputs: all of them in the graph's order, as copies."""
        return [np.array(output) for output in self._outputs(inputs)]

    def _outputs(self, inputs: Mapping[str, np.ndarray]) -> Sequence[np.ndarray]:
        self._check(inputs)
        try:
            return self._infer(inputs)
        except AccuQuantError:
            raise
        except Exception as error:  # ONNX Runtime's share no base class
            # What the library says names files of this machine, and servers pass our sentences on.
            raise AccuQuantError(
                f"{self.path.name} fails on {self.name}: {type(error).__name__}; the cause is with the traceback"
            ) from error

    def _check(self, inputs: Mapping[str, np.ndarray]) -> None:
        if inputs.keys() != {port.name for port in self.inputs}:
            expected = ", ".join(port.name for port in self.inputs)
            raise AccuQuantError(f"{self.path.name} takes {expected}; got {', '.join(inputs) or 'nothing'}")
        for port in self.inputs:
            given = inputs[port.name]
            if given.shape != port.shape or given.dtype != port.dtype:
                raise AccuQuantError(
                    f"{self.path.name}: input {port.name} is {given.dtype} {given.shape}, "
                    f"this engine was compiled for {port.dtype} {port.shape}"
                )

    @abstractmethod
    def _infer(self, inputs: Mapping[str, np.ndarray]) -> Sequence[np.ndarray]: ...

    @abstractmethod
    def kernels(self) -> list[Kernel]:
        """The execution graph as the library reports it, empty if it reports none; timed on the last run if asked."""

    @abstractmethod
    def close(self) -> None:
        """Free the engine; it must not be run afterwards."""
