"""Folders as diffusers' save_pretrained writes them: settings in config.json, weights in safetensors beside it.

A pipeline's folder names its parts in model_index.json, each with a folder of its own; the folder of one network holds
its config.json and nothing above it. Weights stay on disk, mapped into memory and read one tensor at a time, in one
file or in the shards that an index lists. Pickled weights (.bin) are not read.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..runtime.errors import AccuQuantError

STEMS = ("diffusion_pytorch_model", "model")  # of diffusers' own parts, and of transformers'
CONFIGS = ("config.json", "scheduler_config.json")


class Shards(Mapping[str, Tensor]):
    """A network's weights by name, each read when it is asked for.

    Raises:
        AccuQuantError: on opening: no safetensors, or a shard that is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = {file.name: _open(file) for file in _weight_files(folder)}
        self._place = {key: file for file in self._files.values() for key in file.keys()}  # noqa: SIM118 (no mapping)

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._place[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._place)

    def __len__(self) -> int:
        return len(self._place)

    def shape(self, name: str) -> tuple[int, ...]:
        """From the file's header; nothing is read."""
        return tuple(self._place[name].get_slice(name).get_shape())

    @property
    def parameters(self) -> int:
        """How many numbers they are, by the headers."""
        count = 0
        for name in self:
            size = 1
            for length in self.shape(name):
                size *= length
            count += size
        return count

    def check_memory(self) -> None:
        """Raises AccuQuantError if the weights as float32 are more than this machine's free memory."""
        needed, free = 4 * self.parameters, psutil.virtual_memory().available
        if needed > free:
            raise AccuQuantError(
                f"{self.folder} holds {self.parameters / 1e6:,.0f} M parameters, {needed / 2**30:.1f} GiB in float32, "
                f"and {free / 2**30:.1f} GiB of memory are free; calibrating takes several times that. "
                "Use a machine with more memory"
            )


@dataclass(frozen=True)
class Part:
    """One part of a folder: where it lies, its class by diffusers' or transformers' name, and its settings."""

    path: Path
    kind: str
    config: Mapping[str, Any]

    def weights(self) -> Shards:
        """The weights, still on disk.

        Raises:
            AccuQuantError: no safetensors, a shard missing or damaged, or more of them than fit into free memory.
        """
        stored = Shards(self.path)
        stored.check_memory()
        return stored


@dataclass(frozen=True)
class Folder:
    """The parts by their name in model_index.json; a network alone is called by its folder's name.

    `settings` are the pipeline's own, what model_index.json holds beside its parts.
    """

    path: Path
    parts: Mapping[str, Part]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def part(self, *kinds: str) -> Part | None:
        """The first of these classes."""
        return next((part for part in self.parts.values() if part.kind in kinds), None)

    def of(self, kind: str) -> Part:
        """The part of a class that the folder is known to hold."""
        found = self.part(kind)
        assert found is not None
        return found


def read_folder(path: Path) -> Folder:
    """The folder's parts, without their weights.

    Raises:
        AccuQuantError: neither a pipeline's folder nor a network's, a part that is missing, or JSON that is none.
    """
    if (path / "model_index.json").exists():
        index = _json(path / "model_index.json")
        named = {k: v[1] for k, v in index.items() if isinstance(v, list) and len(v) == 2 and isinstance(v[1], str)}
        wrong = [name for name in named if not _is_plain(name)]
        if wrong:
            raise AccuQuantError(f"{path}: model_index.json names {wrong[0]!r}, which is not a folder of it")
        found = {name: _part(path / name, kind) for name, kind in named.items()}
        own = {name: value for name, value in index.items() if not isinstance(value, list)}
        return Folder(path, {name: part for name, part in found.items() if part is not None}, own)
    alone = _part(path, "")
    if alone is None:
        raise AccuQuantError(
            f"{path} is a folder without model_index.json or config.json; a checkpoint file (.ckpt, .pt, .pth, "
            ".safetensors, .onnx) or a folder written by diffusers' save_pretrained is expected"
        )
    return Folder(path, {path.name: alone})


def _is_plain(name: str) -> bool:
    """Is it the name of something in the folder, and no way out of it?"""
    return Path(name).name == name != ".."


def _part(path: Path, kind: str) -> Part | None:
    """None of parts without settings, such as a tokenizer."""
    config = next((path / name for name in CONFIGS if (path / name).exists()), None)
    if config is None:
        return None
    settings = _json(config)
    return Part(path, str(settings.get("_class_name", kind)), settings)


def _weight_files(folder: Path) -> list[Path]:
    for stem in STEMS:
        index = folder / f"{stem}.safetensors.index.json"
        if index.exists():
            places = _json(index).get("weight_map")
            names = sorted({str(name) for name in places.values()}) if isinstance(places, Mapping) else []
            if not names or not all(_is_plain(name) for name in names):
                raise AccuQuantError(f"{index} lists no shards of its folder; copy it again")
            missing = [name for name in names if not (folder / name).exists()]
            if missing:
                raise AccuQuantError(f"{folder / missing[0]} is missing; copy the folder again, whole")
            return [folder / name for name in names]
        if (folder / f"{stem}.safetensors").exists():
            return [folder / f"{stem}.safetensors"]
    variants = sorted(folder.glob("*.safetensors"))
    if len(variants) == 1:  # such as diffusion_pytorch_model.fp16.safetensors
        return variants
    held = f"{len(variants)} of other names" if variants else "none"
    raise AccuQuantError(
        f"{folder} should hold {STEMS[0]}.safetensors, alone or in shards with an index, and holds {held}; save the "
        "pipeline again with safe_serialization=True"
    )


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise AccuQuantError(f"{path} is not a readable safetensors file ({error}); copy it again") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise AccuQuantError(f"{path} cannot be read as JSON ({error}); copy it again") from error
    if not isinstance(read, dict):
        raise AccuQuantError(f"{path} holds no settings; copy it again")
    return read
