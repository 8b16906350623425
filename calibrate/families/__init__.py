"""Checkpoint families, one file each; a checkpoint is recognised by its keys.

A family module offers `NAME`, `recognise(object)`, which gives what `load` reads (a state dict, or a Folder) or None,
and `load(that, path, config) -> DiffusionModel`. Adding one is a new file and its line in FAMILIES.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from ...runtime.errors import AccuQuantError
from ..checkpoint import read_checkpoint
from ..folder import Folder
from ..model import DiffusionModel
from ..unpickle import Foreign
from . import adm, consistency, ddim, diffusers_dit, dit, flux, ldm, pixart, sd3, sd_folder, sdxl, sdxl_folder


class Family(Protocol):
    NAME: str

    def recognise(self, stored: Any) -> Any: ...

    def load(self, state: Any, path: Path, config: Path | None) -> DiffusionModel: ...


# Of two that know the same keys, the more particular one comes first.
FAMILIES: tuple[Family, ...] = (
    ddim, adm, dit, sdxl, ldm, consistency, diffusers_dit, pixart, sd3, flux, sdxl_folder, sd_folder,
)  # fmt: skip


def load_model(path: Path, config: Path | None = None, conditions: Path | None = None) -> DiffusionModel:
    """Read a checkpoint of any known family; `config` overrides the configuration found beside it.

    `conditions` is a file of rows (runtime/rows.py), which models without their text encoder need.

    Raises:
        AccuQuantError: unreadable file, a family this tool does not know (the message shows what the keys look like),
            or rows that are missing, needless or do not fit.
    """
    stored = read_checkpoint(path)
    for family in FAMILIES:
        state = family.recognise(stored)
        if state is not None:
            return family.load(state, path, config).supplied(conditions)
    if isinstance(stored, Folder):
        kinds = ", ".join(part.kind or name for name, part in stored.parts.items()) or "no parts with settings"
        raise AccuQuantError(f"{path} is a folder of no known family (it holds {kinds}); known: {_known()}")
    held = [_shown(*item) for item in stored.items()] if isinstance(stored, Mapping) else [f"a {type(stored).__name__}"]
    shown = ", ".join(held[:5]) + (", ..." if len(held) > 5 else "")
    raise AccuQuantError(f"{path} is of no known family (it holds {shown}); known: {_known()}")


def _known() -> str:
    return ", ".join(family.NAME for family in FAMILIES)


def _shown(key: Any, value: Any) -> str:
    """A key, without what would steer a terminal, and why there are no weights behind it if that is known."""
    name = "".join(c if c.isprintable() else "?" for c in f"{key!s:.80}")
    return f"{name}: a pickled {value.name}, not read" if isinstance(value, Foreign) else name
