"""Artifacts appear whole or not at all: write beside the target, flush to disk, rename."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from .errors import AccuQuantError


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is renamed to `path`, on any error it is removed.

    Raises:
        AccuQuantError: the disk is full or not writable; says how much room is left.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        with part.open("rb") as written:
            os.fsync(written.fileno())
        os.chmod(part, 0o666 & ~_umask())  # some libraries write files that only their owner may read
        os.replace(part, path)
    except (OSError, SafetensorError) as error:  # safetensors says of a full disk that it is an error of its own
        where = path.parent if path.parent.exists() else Path.cwd()
        free = shutil.disk_usage(where).free / 2**20
        raise AccuQuantError(
            f"cannot write {path}: {getattr(error, 'strerror', None) or error} ({free:.0f} MiB free there); "
            "free some space or choose another folder with --out"
        ) from error
    finally:
        with suppress(OSError):  # a parent that is a file, say: the error above is the one to hear
            part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with atomic(path) as part:
        part.write_text(text)


def write_bytes(path: Path, data: bytes) -> None:
    with atomic(path) as part:
        part.write_bytes(data)


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`; on success it takes the name `path` (an older one is replaced).

    Raises:
        AccuQuantError: the folder cannot be written, or `path` exists and is not a folder.
    """
    if path.exists() and not path.is_dir():
        raise AccuQuantError(f"{path} exists and is not a folder; choose another --out")
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    try:
        shutil.rmtree(part, ignore_errors=True)  # of a killed process that had our number
        part.mkdir(parents=True)
        yield part
        if path.exists():
            os.replace(path, old)
        try:
            os.replace(part, path)
        except OSError:
            if old.exists():
                os.replace(old, path)
            raise
    except OSError as error:
        raise AccuQuantError(f"cannot write {path}: {error.strerror or error}; choose another --out") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def cache_folder() -> Path:
    """Where what can be made again is kept: $ACCUQUANT_CACHE, else accuquant/ in the user's cache folder."""
    named = os.environ.get("ACCUQUANT_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "accuquant"


def sha256(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    with path.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()
