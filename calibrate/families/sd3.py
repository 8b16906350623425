"""Stable Diffusion 3 and 3.5 as diffusers keeps them: a pipeline's folder, or its transformer/ alone.

The network is diffusers' own: a latent's and a text's tokens in joint attention, under the timestep and a pooled vector
of the text. Its three text encoders are not read: their outputs, joined as the pipeline joins them, are given as a file
of rows. Flow matching: t is a thousand times the share of noise. Linear layers and the patches' convolution are
quantized, the attention's products stay in float. A smaller picture than the folder's is a choice of `--config`:

    size: 64        # height and width of the latent
"""

from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from ...runtime.bundle import ByRows
from ...runtime.errors import AccuQuantError
from ..folder import Folder
from ..model import DiffusionModel
from .from_diffusers import Sampling, build_empty, fill, flow_sampling, holding, options, settings_of
from .text_rows import Places, assemble

NAME = "diffusers' Stable Diffusion 3 folder"
KIND = "SD3Transformer2DModel"
GUIDANCE, STEPS = 7.0, 28  # of diffusers' pipeline
USUAL = Sampling({"num_train_timesteps": 1000, "shift": 3.0}, "flow-euler")
PLACES = Places(
    first=r"pos_embed\.proj",
    time=(r"time_text_embed\..+", r".+\.norm1\.linear", r".+\.norm1_context\.linear", r"norm_out\.linear"),
)
recognise = holding(KIND)


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


def load(folder: Folder, path: Path, config: Path | None) -> DiffusionModel:
    """Build the network that config.json describes and load the weights strictly.

    Raises:
        AccuQuantError: settings that diffusers refuses or that are missing, a size that does not fit them, weights
            missing, left over or not finite, or too many for this machine's memory.
    """
    part = folder.of(KIND)
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
    network = build_empty(KIND, part)
    fill(network, part, part.weights())
    schedule = flow_sampling(folder, USUAL, tokens=(size // patch) ** 2)
    conditioning = ByRows(shapes={"context": (None, width), "pooled": (pooled,)}, guidance=GUIDANCE)
    return assemble(
        folder, Told(network), schedule, PLACES, conditioning,
        family="sd3", name=NAME, sample_shape=(channels, size, size), steps=STEPS,
    )  # fmt: skip
