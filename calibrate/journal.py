"""Calibration that survives its process: atomic snapshots, resumed bit for bit.

A snapshot holds every tensor that later iterations depend on (parameters, optimizer moments) and the number of
iterations done. Nothing else may matter: batches and orders are pure functions of (seed, iteration). A snapshot belongs
to one specification; another one is refused, naming what differs.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..runtime.errors import AccuQuantError
from ..runtime.files import atomic


@dataclass(frozen=True)
class Snapshot:
    """State after `iteration` optimizer steps; `record` is free JSON (losses so far, best state's score)."""

    iteration: int
    tensors: dict[str, Tensor]
    record: dict[str, Any]

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The tensors named `prefix/...`, without the prefix."""
        return {k.removeprefix(f"{prefix}/"): v for k, v in self.tensors.items() if k.startswith(f"{prefix}/")}


class Journal:
    """The snapshots of one calibration, in a folder of its own."""

    def __init__(self, folder: Path, specification: dict[str, Any]) -> None:
        self.folder = folder
        self.specification = json.loads(json.dumps(specification, sort_keys=True))

    @property
    def path(self) -> Path:
        return self.folder / "snapshot.safetensors"

    def write(self, snapshot: Snapshot) -> None:
        meta = {
            "specification": json.dumps(self.specification),
            "iteration": str(snapshot.iteration),
            "record": json.dumps(snapshot.record),
        }
        with atomic(self.path) as part:
            save_file({k: v.detach().cpu().contiguous() for k, v in snapshot.tensors.items()}, part, meta)

    def read(self) -> Snapshot | None:
        """The last snapshot, or None if there is none.

        Raises:
            AccuQuantError: it belongs to another specification, or is damaged.
        """
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="pt") as stored:
                meta = stored.metadata()
                # Copies: views into the file lie at any address, and kernels sum in an order that depends on alignment.
                tensors = {name: stored.get_tensor(name).clone() for name in stored.keys()}  # noqa: SIM118
            theirs, iteration, record = (json.loads(meta[k]) for k in ("specification", "iteration", "record"))
        except Exception as error:
            raise AccuQuantError(f"{self.path} is damaged ({error}); delete it or run without --resume") from error
        differing = sorted(
            k for k in theirs.keys() | self.specification.keys() if theirs.get(k) != self.specification.get(k)
        )
        if differing:
            named = ", ".join(f"{k}: {theirs.get(k)!r} then, {self.specification.get(k)!r} now" for k in differing)
            raise AccuQuantError(f"{self.path} belongs to another run ({named}); use the same options or drop --resume")
        return Snapshot(iteration, tensors, record)


def pack_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Optimizer moments as named tensors, for a snapshot."""
    state = optimizer.state_dict()["state"]
    return {f"optimizer/{k}/{name}": torch.as_tensor(v) for k, entry in state.items() for name, v in entry.items()}


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put `pack_optimizer`'s tensors back."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer/"):
            _, index, field = name.split("/")
            state.setdefault(int(index), {})[field] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
