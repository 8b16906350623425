"""Checkpoint families, one file each; a checkpoint is recognised by its keys.

A family module offers `NAME`, `recognise(object) -> state dict or None` and `load(state, path, config) ->
DiffusionModel`. Adding one is a new file and its line in FAMILIES.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ...runtime.errors import AccuQuantError
from ..checkpoint import read_checkpoint
from ..model import DiffusionModel
from ..unpickle import Foreign
from . import adm, consistency, ddim, dit, ldm

StateDict = Mapping[str, Tensor]


class Family(Protocol):
    NAME: str

    def recognise(self, stored: Any) -> StateDict | None: ...

    def load(self, state: StateDict, path: Path, config: Path | None) -> DiffusionModel: ...


FAMILIES: tuple[Family, ...] = (ddim, adm, dit, ldm, consistency)


def load_model(path: Path, config: Path | None = None) -> DiffusionModel:
    """Read a checkpoint of any known family; `config` overrides the configuration found beside it.

    Raises:
        AccuQuantError: unreadable file, or a family this tool does not know; the message shows what the keys look like.
    """
    stored = read_checkpoint(path)
    for family in FAMILIES:
        state = family.recognise(stored)
        if state is not None:
            return family.load(state, path, config)
    held = [_shown(*item) for item in stored.items()] if isinstance(stored, Mapping) else [f"a {type(stored).__name__}"]
    shown = ", ".join(held[:5]) + (", ..." if len(held) > 5 else "")
    known = ", ".join(family.NAME for family in FAMILIES)
    raise AccuQuantError(f"{path} is of no known family (it holds {shown}); known: {known}")


def _shown(key: Any, value: Any) -> str:
    """A key, without what would steer a terminal, and why there are no weights behind it if that is known."""
    name = "".join(c if c.isprintable() else "?" for c in f"{key!s:.80}")
    return f"{name}: a pickled {value.name}, not read" if isinstance(value, Foreign) else name
