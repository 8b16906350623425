"""Read a checkpoint file into tensors without ever executing what it holds.

safetensors, or torch's format through `weights_only=True`. Nothing else: a file that wants to import a class is
refused, not trusted.
"""

import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..runtime.errors import AccuQuantError


def read_checkpoint(path: Path) -> Any:
    """The object a checkpoint holds - a state dict, or the dict or list around one - with tensors on the CPU.

    Raises:
        AccuQuantError: missing, truncated, not a checkpoint, or one that needs code to be executed.
    """
    if not path.exists():
        raise AccuQuantError(f"{path} does not exist")
    if path.is_dir():
        raise AccuQuantError(f"{path} is a folder; a checkpoint file (.ckpt, .pt, .pth, .safetensors) is expected")
    size = path.stat().st_size
    if size == 0:
        raise AccuQuantError(f"{path} is empty; download or copy it again")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise AccuQuantError(f"{path} is not a readable safetensors file ({error}); copy it again") from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own words advise to load without the safety; ours must not repeat them.
        raise AccuQuantError(
            f"{path} is no plain state dict: it is damaged, or asks for code to be run while loading, which this tool "
            "never does; save its state dict alone, as .safetensors or with torch.save, and use that"
        ) from error
    except Exception as error:  # damaged archives and pickles fail in every way there is
        problem = "cut off" if _is_cut_archive(path) else "damaged, or not a torch checkpoint"
        raise AccuQuantError(f"{path} is {problem} ({size:,} bytes, {type(error).__name__}); copy it again") from error


def _is_cut_archive(path: Path) -> bool:
    """A file that begins as torch's zip archive and lacks the directory at its end."""
    with path.open("rb") as opened:
        if opened.read(4) != b"PK\x03\x04":
            return False
        opened.seek(max(0, path.stat().st_size - 65_557))  # the longest an end record can be
        tail = opened.read()
        record = tail.rfind(b"PK\x05\x06")
        return record < 0 or len(tail) - record < 22
