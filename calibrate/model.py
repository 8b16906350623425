"""What every family turns a checkpoint into."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from .scheme import Role


@dataclass(frozen=True)
class DiffusionModel:
    """A denoiser ready to run, and what must be known to sample from it.

    `network(x, t)` maps x (B, *sample_shape) and t (B,), float32 both, to its prediction of the same batch.
    `noise_schedule` holds diffusers' scheduler settings. `block_of` names the module whose output an operator is judged
    with when blocks are reconstructed one by one. `found` is one line for the person who gave the file.
    """

    family: str
    found: str
    network: nn.Module
    sample_shape: tuple[int, int, int]
    noise_schedule: Mapping[str, Any]
    role_of: Callable[[str], Role]
    block_of: Callable[[str], str]
    default_sampler: str
    default_steps: int
