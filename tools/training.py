"""What trainers of reference models share: moving averages, rates, checkpoints that are whole, and one check.

    ema <- d ema + (1 - d) theta,   d = min(decay, (1 + step) / (10 + step))

The memory is short at first: a fixed decay would carry the random start for thousands of steps.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accuquant.calibrate.checkpoint import read_checkpoint
from accuquant.runtime.errors import AccuQuantError
from torch import Tensor, nn


class Ema:
    """A moving average of a network's state, which `weights` holds by the network's own names."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network, self.decay = network, decay
        self.weights = {k: v.clone() for k, v in network.state_dict().items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After the optimizer's step number `step`, counted from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        current = self.network.state_dict()
        torch._foreach_lerp_(list(self.weights.values()), [current[k] for k in self.weights], 1 - decay)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        for name, value in weights.items():
            self.weights[name].copy_(value)


def warmup_cosine(step: int, steps: int, peak: float, warmup: int = 300) -> float:
    """Linear warm-up, then a cosine to a hundredth of the peak."""
    warm = min(1.0, (step + 1) / warmup)
    return peak * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))


def check_gradients(network: nn.Module) -> None:
    """Raises AccuQuantError if a parameter got none: a compiled backward once never reached the lower levels."""
    dead = [n for n, p in network.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    if dead:
        raise AccuQuantError(f"no gradient reaches {', '.join(dead[:5])}: this torch cannot train the model")


def save_atomically(value: object, path: Path) -> None:
    part = path.with_suffix(path.suffix + ".part")
    torch.save(value, part)
    os.replace(part, path)


def save_training(
    path: Path, network: nn.Module, optimizer: torch.optim.Optimizer, epoch: int, step: int, ema: Ema, seconds: float
) -> None:
    """ermongroup/ddim's list [model, optimizer, epoch, step, ema]; the seconds spent so far go beside it."""
    prefixed = {f"module.{k}": v for k, v in network.state_dict().items()}
    save_atomically([prefixed, optimizer.state_dict(), epoch, step, ema.weights], path)
    path.with_name("progress.json").write_text(json.dumps({"seconds": seconds}))


def load_training(path: Path, network: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema) -> tuple[int, float]:
    """Put what `save_training` wrote back; the steps done and the seconds they took.

    Raises:
        AccuQuantError: no such file, or one of another network.
    """
    states: Any = read_checkpoint(path)
    try:
        network.load_state_dict({k.removeprefix("module."): v for k, v in states[0].items()})
        optimizer.load_state_dict(states[1])
        ema.load(states[4])
    except (RuntimeError, KeyError, ValueError, IndexError, AttributeError) as error:
        raise AccuQuantError(f"{path} is of another training ({str(error)[:200]}); choose another --out") from error
    return int(states[3]), float(json.loads(path.with_name("progress.json").read_text())["seconds"])
