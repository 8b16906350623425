"""What every family turns a checkpoint into."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..runtime.bundle import Conditioning
from ..runtime.denoiser import check_guidance, drawn
from .guidance import Guided
from .layers import QuantizedOperator, quantize_operators
from .scheme import QuantScheme, Role
from .splits import find_splits
from .trajectory import NOTHING, Condition


@dataclass(frozen=True)
class DiffusionModel:
    """A denoiser ready to run, and what must be known to sample from it.

    `network(x, t, **condition)` maps x (B, *sample_shape) and t (B,), float32 both, to its prediction of that batch.
    `noise_schedule` holds diffusers' scheduler settings. `block_of` names the module whose output an operator is judged
    with when blocks are reconstructed one by one. `found` is one line for the person who gave the file. `conditioning`
    tells what the network takes besides, and the guidance it is used with.
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
    conditioning: Conditioning | None = None

    def condition(self, seeds: Sequence[int]) -> Condition:
        """What each seed is sampled under where nobody chose, as rows by name."""
        if self.conditioning is None:
            return NOTHING
        return {self.conditioning.input: torch.from_numpy(drawn(seeds, self.conditioning.classes))}

    def guided(self, guidance: float) -> nn.Module:
        """The network as a sampler calls it; it shares all modules with `network`.

        Raises:
            AccuQuantError: a network that cannot be guided.
        """
        check_guidance(self.conditioning, guidance)
        if guidance == 1.0:
            return self.network
        known = self.conditioning
        assert known is not None
        return Guided(self.network, {known.input: torch.tensor([known.null])}, guidance)


def quantize(model: DiffusionModel, scheme: QuantScheme) -> dict[str, QuantizedOperator]:
    """Put the model's operators on the scheme's grids, in place, and return them by name; still to be calibrated."""
    splits = find_splits(model.network, model.sample_shape, model.condition([0])) if scheme.split else None
    return quantize_operators(model.network, scheme, model.role_of, splits)
