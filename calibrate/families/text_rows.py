"""diffusers' transformers that take texts as rows of a file: what PixArt, Stable Diffusion 3 and Flux have in common.

A family puts diffusers' network, as `transformer`, into a coat that takes (x, t, **rows), and says where its operators
stand; everything else of the model comes from the folder.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from ...runtime.bundle import ByRows
from ..folder import Folder
from ..model import DiffusionModel
from ..roles import Roles
from .autoencoder_kl import find_decoder
from .from_diffusers import Sampling

NONE: Mapping[str, tuple[float, ...]] = {}


@dataclass(frozen=True)
class Places:
    """Patterns of operators' names inside `transformer`: of its two ends, of what knows no latent, of blocks."""

    first: str
    time: tuple[str, ...]
    last: str = "proj_out"
    block: str = r"transformer_blocks\.\d+"

    @property
    def role_of(self) -> Roles:
        return Roles(self.first, self.last, self.time, inside=r"transformer\.")

    def block_of(self, name: str) -> str:
        """The transformer block an operator belongs to, or the operator itself."""
        found = re.match(rf"transformer\.({self.block})", name)
        return found[0] if found else name


def assemble(
    folder: Folder,
    network: nn.Module,
    schedule: Sampling,
    places: Places,
    conditioning: ByRows,
    *,
    family: str,
    name: str,
    sample_shape: tuple[int, int, int],
    steps: int,
    told: str = "",
    constants: Mapping[str, tuple[float, ...]] = NONE,
) -> DiffusionModel:
    """The model of a filled network in its coat, with the folder's decoder; `told` is what else the network is told.

    Raises:
        AccuQuantError: the decoder's weights are missing, left over or not finite.
    """
    decoder, words = find_decoder(folder)
    millions = sum(p.numel() for p in network.parameters()) / 1e6
    latent = "x".join(map(str, sample_shape))
    return DiffusionModel(
        family=family,
        found=f"{name}, {millions:.2f} M parameters, latent {latent}{told}, of texts given as rows, {words}",
        network=network.eval(),
        sample_shape=sample_shape,
        noise_schedule=schedule.noise_schedule,
        role_of=places.role_of,
        block_of=places.block_of,
        default_sampler=schedule.sampler,
        default_steps=steps,
        conditioning=conditioning,
        decoder=decoder,
        constants=constants,
    )
