"""Stable Diffusion 3 and 3.5 as diffusers keeps them: a pipeline's folder, or its transformer/ alone.

The network is diffusers' own: a latent's and a text's tokens in joint attention, under the timestep and a pooled vector
of the text. Its three text encoders are not read: their outputs, joined as the pipeline joins them, are given as a file
of rows. Flow matching: t is a thousand times the share of noise. Linear layers and the patches' convolution are
quantized, the attention's products stay in float. A smaller picture than the folder's is a choice of `--config`:

    size: 64        # height and width of the latent
"""

import re
from pathlib import Path
from typing import Any, cast

from diffusers import SD3Transformer2DModel
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from ...runtime.bundle import ByRows
from ...runtime.errors import AccuQuantError
from ..folder import Folder
from ..model import DiffusionModel
from ..scheme import Role
from .autoencoder_kl import find_decoder
from .from_diffusers import Sampling, build_empty, fill, flow_sampling, options, settings_of

NAME = "diffusers' Stable Diffusion 3 folder"
KIND = "SD3Transformer2DModel"
GUIDANCE, STEPS = 7.0, 28  # of diffusers' pipeline
USUAL = Sampling({"num_train_timesteps": 1000, "shift": 3.0}, "flow-euler")


class Choice(BaseModel):
    """What the folder does not tell."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int | None = Field(default=None, gt=0)


class Told(nn.Module):
    """diffusers' network as a denoiser of x (B, C, H, W), t (B,), context (B, T, width) and pooled (B, width)."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        made = self.transformer(
            hidden_states=x, encoder_hidden_states=context, pooled_projections=pooled, timestep=t, return_dict=False
        )
        return cast(Tensor, made[0])


def recognise(stored: Any) -> Folder | None:
    """The folder, if `stored` is one with such a transformer."""
    return stored if isinstance(stored, Folder) and stored.part(KIND) is not None else None


def load(folder: Folder, path: Path, config: Path | None) -> DiffusionModel:
    """Build the network that config.json describes and load the weights strictly.

    Raises:
        AccuQuantError: settings that diffusers refuses or that are missing, a size that does not fit them, weights
            missing, left over or not finite, or too many for this machine's memory.
    """
    part = folder.part(KIND)
    assert part is not None
    size, patch, channels, width, pooled, positions = settings_of(
        part, "sample_size", "patch_size", "in_channels", "joint_attention_dim", "pooled_projection_dim",
        "pos_embed_max_size",
    )  # fmt: skip
    size = options(config, Choice).size or size
    if size % patch or size // patch > positions:
        raise AccuQuantError(
            f"{part.path}: a latent of {size}x{size} is no whole number of patches of {patch}, "
            f"or more than {positions} of them on a side"
        )
    network = build_empty(SD3Transformer2DModel, part)
    stored = part.weights()
    stored.check_memory()
    fill(network, part, stored)
    schedule = flow_sampling(folder, USUAL, tokens=(size // patch) ** 2)
    decoder, words = find_decoder(folder)
    millions = sum(p.numel() for p in network.parameters()) / 1e6
    return DiffusionModel(
        family="sd3",
        found=f"{NAME}, {millions:.2f} M parameters, latent {channels}x{size}x{size}, of texts given as rows, {words}",
        network=Told(network).eval(),
        sample_shape=(channels, size, size),
        noise_schedule=schedule.noise_schedule,
        role_of=role_of,
        block_of=block_of,
        default_sampler=schedule.sampler,
        default_steps=STEPS,
        conditioning=ByRows(shapes={"context": (None, width), "pooled": (pooled,)}, guidance=GUIDANCE),
        decoder=decoder,
    )


def role_of(name: str) -> Role:
    """Which part of the network an operator is, for the layer policy."""
    if name == "transformer.pos_embed.proj":
        return "first"
    if name == "transformer.proj_out":
        return "last"
    is_time = name.startswith("transformer.time_text_embed.") or re.search(r"\.norm(1|1_context|_out)\.linear$", name)
    return "time" if is_time else "body"


def block_of(name: str) -> str:
    """The transformer block an operator belongs to, or the operator itself."""
    found = re.match(r"transformer\.transformer_blocks\.\d+", name)
    return found[0] if found else name
