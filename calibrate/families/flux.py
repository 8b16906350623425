"""Flux transformers as diffusers keeps them: a pipeline's folder, or its transformer/ alone.

The network is diffusers' own, on tokens of 2x2 latent values; the packing is done here, so that its latent is a picture
(B, C, H, W) like everyone's. Where a token stands (rotary embedding) is constant. The text encoders are not read: T5's
output for every token and CLIP's pooled vector are given as a file of rows. Flow matching: t is a thousand times the
share of noise, which diffusers' network takes divided by a thousand. Guidance is distilled into the dev model as an
input of its own, a constant here; classifier-free guidance is none unless asked for. Linear layers are quantized, the
attention's products stay in float. What the folder does not tell is a choice of `--config`:

    size: 128       # height and width of the latent
    guidance: 3.5   # what the dev model is told
"""

from pathlib import Path
from typing import Any, cast

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from ...runtime.bundle import ByRows
from ...runtime.errors import AccuQuantError
from ..folder import Folder
from ..model import DiffusionModel
from .from_diffusers import Sampling, build_empty, check_settings, fill, flow_sampling, holding, options, settings_of
from .text_rows import Places, assemble

NAME = "diffusers' Flux folder"
KIND = "FluxTransformer2DModel"
STEPS, DISTILLED_STEPS = 28, 4  # of the dev and of the schnell model, which is not told a guidance
USUAL = Sampling(
    {
        "num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15,
        "base_image_seq_len": 256, "max_image_seq_len": 4096,
    },
    "flow-euler",
)  # fmt: skip
DISTILLED = Sampling({"num_train_timesteps": 1000, "shift": 1.0}, "flow-euler")
PLACES = Places(
    first="x_embedder",
    time=(
        r"time_text_embed\..+",
        r".+\.norm\.linear",
        r".+\.norm1\.linear",
        r".+\.norm1_context\.linear",
        r"norm_out\.linear",
    ),
    block=r"(single_)?transformer_blocks\.\d+",
)
recognise = holding(KIND)


class Choice(BaseModel):
    """What the folder does not tell."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    size: int = Field(default=128, gt=0, multiple_of=2)
    guidance: float = 3.5


class Positions(nn.Module):
    """The rotary embedding (T, width) of all tokens: texts stand at zero, where nothing turns, before the picture's."""

    cosine: Tensor
    sine: Tensor

    def __init__(self, rotary: nn.Module, side: int) -> None:
        super().__init__()
        rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        ids = torch.stack([torch.zeros(side, side), rows, columns], dim=-1).reshape(-1, 3)
        cosine, sine = rotary(ids)
        self.register_buffer("cosine", cosine, persistent=False)
        self.register_buffer("sine", sine, persistent=False)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        texts = (len(ids) - len(self.cosine), self.cosine.shape[1])
        return (
            torch.cat([self.cosine.new_ones(texts), self.cosine]),
            torch.cat([self.sine.new_zeros(texts), self.sine]),
        )


class Packed(nn.Module):
    """diffusers' network as a denoiser of x (B, C, H, W), t (B,), context (B, T, width) and pooled (B, width)."""

    def __init__(self, transformer: Any, side: int, guidance: float) -> None:
        super().__init__()
        self.transformer, self.side, self.guidance = transformer, side, guidance
        transformer.pos_embed = Positions(transformer.pos_embed, side)

    def forward(self, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        side, channels = self.side, x.shape[1]
        tokens = x.reshape(-1, channels, side, 2, side, 2).permute(0, 2, 4, 1, 3, 5)
        made = self.transformer(
            hidden_states=tokens.reshape(-1, side * side, 4 * channels),
            encoder_hidden_states=context,
            pooled_projections=pooled,
            timestep=t / 1000,
            guidance=torch.full_like(t, self.guidance) if self.transformer.config.guidance_embeds else None,
            txt_ids=x.new_zeros(context.shape[1], 3),
            img_ids=x.new_zeros(side * side, 3),  # only counted: see Positions
            return_dict=False,
        )[0]
        whole = made.reshape(-1, side, side, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return cast(Tensor, whole.reshape(-1, channels, 2 * side, 2 * side))


def load(folder: Folder, path: Path, config: Path | None) -> DiffusionModel:
    """Build the network that config.json describes and load the weights strictly.

    Raises:
        AccuQuantError: settings that diffusers refuses or that are missing, a network for other than pictures, weights
            missing, left over or not finite, or too many for this machine's memory.
    """
    part, choice = folder.of(KIND), options(config, Choice)
    check_settings(part, {"patch_size": 1})
    packed, width, pooled = settings_of(part, "in_channels", "joint_attention_dim", "pooled_projection_dim")
    out = part.config.get("out_channels") or packed
    if packed % 4 or out != packed:
        raise AccuQuantError(
            f"{part.path / 'config.json'}: {packed} packed channels in and {out} out; four times a latent's, in and "
            "out, are expected (networks given a picture besides are not supported)"
        )
    told = bool(part.config.get("guidance_embeds"))
    network = build_empty(KIND, part)
    fill(network, part, part.weights())
    side, channels = choice.size // 2, packed // 4
    schedule = flow_sampling(folder, USUAL if told else DISTILLED, tokens=side * side, from_one=True)
    conditioning = ByRows(shapes={"context": (None, width), "pooled": (pooled,)})
    return assemble(
        folder, Packed(network, side, choice.guidance), schedule, PLACES, conditioning,
        family="flux", name=NAME, sample_shape=(channels, choice.size, choice.size),
        steps=STEPS if told else DISTILLED_STEPS,
        told=f", guidance {choice.guidance:g} distilled" if told else "",
        constants={"guidance": (choice.guidance,)} if told else {},
    )  # fmt: skip
