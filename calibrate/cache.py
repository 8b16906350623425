"""Teacher trajectories kept between runs, by the content they depend on.

The same checkpoint calibrated at other bits, targets or settings follows the same teacher, and for a large model that
teacher is hours of work. A file is named by the digest of everything that decides its bytes; the files together stay
below a budget, those unused for longest going first. Loading maps a file into memory, so that only the latents a batch
asks for are read.
"""

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..runtime.errors import AccuQuantError
from .trajectory import Trajectory


class TrajectoryCache:
    """Trajectories in `folder`, at most `budget` bytes of them; with a budget of 0 nothing is read or written."""

    def __init__(self, folder: Path, budget: int) -> None:
        self.folder, self.budget = folder, budget

    def path(self, depends_on: dict[str, Any]) -> Path:
        """Where a trajectory lies that depends on this much and no more."""
        text = json.dumps(depends_on, sort_keys=True)
        return self.folder / f"teacher-{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"

    def get(self, depends_on: dict[str, Any], compute: Callable[[], Trajectory]) -> Trajectory:
        """The stored trajectory, or what `compute` returns, stored for the next time.

        A damaged file is computed anew; a full disk or a folder that cannot be written costs the cache, not the run.
        """
        path = self.path(depends_on)
        if self.budget and path.exists():
            try:
                found = Trajectory.load(path)
                os.utime(path)
                return found
            except (OSError, SafetensorError):
                with suppress(OSError):
                    path.unlink()
        made = compute()
        if self.budget:
            with suppress(AccuQuantError, OSError, SafetensorError):
                made.save(path)
                self._shrink()
        return made

    def _shrink(self) -> None:
        files = [(p.stat().st_mtime, p.stat().st_size, p) for p in self.folder.glob("teacher-*.safetensors")]
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self.budget:
                return
            path.unlink(missing_ok=True)
            total -= size
