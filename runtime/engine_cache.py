"""Compiled engines kept by all they depend on, so that each is built once on a machine and never taken for another.

    FOLDER/engines/KEY/engine      what the compiler wrote
    FOLDER/engines/KEY/key.json    the parts of the key, the engine's digest, and what is known of it

Whoever wants an engine takes the key's lock first: of two builders one builds and the other waits for it. Locks are the
operating system's, so a killed builder's is free at once; what it had written so far bears another name and is swept.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .errors import AccuQuantError
from .files import atomic_folder, sha256, write_text

Build = Callable[[Path], Mapping[str, Any]]  # writes an engine to a path, returns what is worth knowing of it


@dataclass(frozen=True)
class EngineKey:
    """All that decides a compiled engine's bytes; `graph` is a digest of the graph and its weights."""

    graph: str
    library: str
    target: str
    shapes: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:32]

    def differences(self, other: "EngineKey") -> list[str]:
        """`part: theirs, not ours` for every part in which `other` is not this."""
        ours, theirs = asdict(self), asdict(other)
        return [f"{part}: {theirs[part]}, not {ours[part]}" for part in ours if ours[part] != theirs[part]]


@dataclass(frozen=True)
class CachedEngine:
    """An engine on disk, whole and checked; `built` tells whether this call made it, `instead_of` why it had to."""

    path: Path
    facts: Mapping[str, Any]
    built: bool
    instead_of: tuple[str, ...] = ()


class EngineCache:
    """Engines below `folder`. Any number of processes may use one folder at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "engines"

    def get(
        self, key: EngineKey, build: Build, on_wait: Callable[[], None] = lambda: None, patience: float = 3600
    ) -> CachedEngine:
        """The engine of `key`, built now if there is none; `on_wait` is called if another process is building it.

        An engine whose bytes are not those that were written is built anew.

        Raises:
            AccuQuantError: the folder cannot be written, the other builder took longer than `patience` seconds, or
                whatever `build` raises; then nothing is left behind.
        """
        place = self.folder / key.digest
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise AccuQuantError(f"engines cannot be kept in {self.folder}: {error.strerror}") from error
        with self._locked(key, on_wait, patience):
            facts = _facts(place)
            if facts is not None:
                return CachedEngine(place / "engine", facts, built=False)
            nearest = self.nearest(key)
            for left in self.folder.glob(f".{key.digest}.*"):  # by builders that were killed
                shutil.rmtree(left, ignore_errors=True)
            with atomic_folder(place) as part:
                facts = dict(build(part / "engine"))
                written = {"key": asdict(key), "sha256": sha256(part / "engine"), "facts": facts}
                write_text(part / "key.json", json.dumps(written, indent=1) + "\n")
            return CachedEngine(place / "engine", facts, built=True, instead_of=tuple(nearest))

    def holds(self, key: EngineKey) -> bool:
        return _facts(self.folder / key.digest) is not None

    def nearest(self, key: EngineKey) -> list[str]:
        """In what the most similar engine of the same graph differs from `key`; empty if there is none."""
        found = [key.differences(other) for other in self._keys() if other.graph == key.graph]
        return min((parts for parts in found if parts), key=len, default=[])

    def _keys(self) -> list[EngineKey]:
        keys = []
        for path in self.folder.glob("[!.]*/key.json"):
            try:
                keys.append(EngineKey(**json.loads(path.read_text())["key"]))
            except (OSError, ValueError, KeyError, TypeError):
                continue  # of another version, or damaged: it is no engine of ours
        return keys

    def _locked(self, key: EngineKey, on_wait: Callable[[], None], patience: float) -> AbstractContextManager[object]:
        lock = FileLock(self.folder / f"{key.digest}.lock")
        try:
            return lock.acquire(timeout=0)
        except Timeout:
            on_wait()
            try:
                return lock.acquire(timeout=patience)
            except Timeout:
                raise AccuQuantError(
                    f"another process has been building this engine for {patience:.0f} s ({lock.lock_file}); "
                    "wait for it, or stop it and try again"
                ) from None


def _facts(place: Path) -> dict[str, Any] | None:
    """What is known of the engine at `place`; None if there is none, or its bytes are not the ones written."""
    try:
        written = json.loads((place / "key.json").read_text())
        whole = sha256(place / "engine") == written["sha256"]
        return dict(written["facts"]) if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
