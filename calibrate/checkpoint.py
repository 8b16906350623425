"""Read a checkpoint file into tensors without ever executing what it holds, and put them into a network.

safetensors, torch's two formats through a reader of our own (archive.py, unpickle.py), or the initialisers of an ONNX
file. Of classes that a torch file names, nothing is imported: they are names in what is read, and no more.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import torch
from google.protobuf.message import DecodeError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..runtime.errors import AccuQuantError
from ..runtime.files import sha256
from .archive import read_torch_file
from .folder import read_folder
from .unpickle import DamagedError, Foreign, RunsCodeError


def read_checkpoint(path: Path) -> Any:
    """The object a checkpoint holds - a state dict, or the dict or list around one - with tensors on the CPU.

    Objects of classes (training frameworks leave them beside the weights) are `Foreign`: a name without content. Of an
    ONNX file it is the onnx.ModelProto, without weights kept in other files, of a folder its Folder.

    Raises:
        AccuQuantError: missing, truncated, not a checkpoint, one pickled object, or a file that runs commands.
    """
    if not path.exists():
        raise AccuQuantError(f"{path} does not exist")
    if path.is_dir():
        return read_folder(path)
    size = path.stat().st_size
    if size == 0:
        raise AccuQuantError(f"{path} is empty; download or copy it again")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise AccuQuantError(f"{path} is not a readable safetensors file ({error}); copy it again") from error
    if path.suffix == ".onnx":
        try:
            return onnx.load(path, load_external_data=False)
        except (DecodeError, OSError) as error:
            raise AccuQuantError(f"{path} is not a readable ONNX file ({error}); copy it again") from error
    try:
        stored = read_torch_file(path)
    except RunsCodeError as error:
        raise AccuQuantError(
            f"{path} asks for code to be run while loading ({error}), which no checkpoint needs and none gets "
            "here; load it nowhere else, and get the weights from a source that you trust, as .safetensors"
        ) from error
    except OSError as error:
        raise AccuQuantError(f"{path} cannot be read: {error.strerror}") from error
    except DamagedError as error:
        problem = "cut off" if _is_cut_archive(path) else "damaged, or not a torch checkpoint"
        raise AccuQuantError(f"{path} is {problem} ({size:,} bytes; {error}); copy it again") from error
    if isinstance(stored, Foreign):
        raise AccuQuantError(
            f"{path} is no state dict but a pickled object ({stored.name}), which only its own program can read; "
            "save its state dict alone, as .safetensors or with torch.save, and use that"
        )
    return stored


def beside(path: Path, config: Path | None = None) -> list[Path]:
    """The files that say what a checkpoint does not: its YAML (or `config` in its place) and its tokenizer."""
    yamls = [config] if config is not None else [path.with_suffix(suffix) for suffix in (".yml", ".yaml")]
    return [file for file in (*yamls, path.with_suffix(".tokenizer.json")) if file.exists()]


def name_of(path: Path) -> str:
    """What a model is called after: its file without the suffix, or its folder."""
    whole = path.resolve()
    return whole.name if whole.is_dir() else whole.stem


def stored_bytes(path: Path) -> int:
    """Size of a checkpoint, of a folder that of its settings, tokenizers and weights."""
    return sum(file.stat().st_size for file in _files(path))


def digest(path: Path) -> str:
    """Hex digest of a checkpoint: a file's own, or of a folder one of all its files' names and digests."""
    if not path.is_dir():
        return sha256(path)
    listed = "".join(f"{file.relative_to(path).as_posix()} {sha256(file)}\n" for file in _files(path))
    return hashlib.sha256(listed.encode()).hexdigest()


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    return sorted(file for file in path.rglob("*") if file.suffix in {".json", ".txt", ".safetensors"})


def load_weights(network: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Put a checkpoint's tensors, as float32, into the network that its keys describe.

    A network on the meta device takes copies as its own, and need not be filled with random numbers first.

    Raises:
        AccuQuantError: weights missing, left over, of another shape, or not finite.
    """
    own = network.state_dict()
    wrong = [f"{name} is missing" for name in own if name not in weights]
    wrong += [f"{name} is left over" for name in weights if name not in own]
    wrong += [
        f"{name} is {tuple(value.shape)}, not {tuple(own[name].shape)}"
        for name, value in weights.items()
        if name in own and value.shape != own[name].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise AccuQuantError(f"{path} does not fit the network its keys describe: {', '.join(wrong[:5])}{more}")
    if any(parameter.is_meta for parameter in network.parameters()):
        made = {name: value.to(torch.float32, copy=True) for name, value in weights.items()}
        network.load_state_dict(made, assign=True)
    else:
        with torch.no_grad():
            for name, value in weights.items():
                own[name].copy_(value)
    broken = [name for name, value in network.state_dict().items() if not torch.isfinite(value).all()]
    if broken:
        raise AccuQuantError(
            f"{path}: weights that are not finite in {', '.join(broken[:3])}; the checkpoint is damaged"
        )


def _is_cut_archive(path: Path) -> bool:
    """A file that begins as torch's zip archive and lacks the directory at its end."""
    with path.open("rb") as opened:
        if opened.read(4) != b"PK\x03\x04":
            return False
        opened.seek(max(0, path.stat().st_size - 65_557))  # the longest an end record can be
        tail = opened.read()
        record = tail.rfind(b"PK\x05\x06")
        return record < 0 or len(tail) - record < 22
