"""What every family turns a checkpoint into."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from .layers import QuantizedOperator, quantize_operators
from .scheme import QuantScheme, Role
from .splits import find_splits


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


def quantize(model: DiffusionModel, scheme: QuantScheme) -> dict[str, QuantizedOperator]:
    """Put the model's operators on the scheme's grids, in place, and return them by name; still to be calibrated."""
    splits = find_splits(model.network, model.sample_shape) if scheme.split else None
    return quantize_operators(model.network, scheme, model.role_of, splits)
