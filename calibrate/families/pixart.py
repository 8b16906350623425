"""PixArt's transformers (alpha and sigma) as diffusers keeps them: a pipeline's folder, or its transformer/ alone.

The network is diffusers' own. It takes a T5 encoder's output for every token of a text and a mask, 1 where a token
counts and 0 where it only fills up; the encoder (4.8 billion parameters) is not read: its outputs are given as a file
of rows. What the 1024-pixel models are told of resolution and aspect is constant here, that of their square pictures.
A learned variance is left out, as no sampler here reads it. Linear layers and the patches' convolution are quantized,
the attention's products stay in float.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from ...runtime.bundle import ByRows
from ...runtime.errors import AccuQuantError
from ..folder import Folder
from ..model import DiffusionModel
from .from_diffusers import (
    Sampling,
    build_empty,
    fill,
    holding,
    options,
    pixels,
    positions,
    sampling,
    settings_of,
    without_variance,
)
from .text_rows import Places, assemble

NAME = "diffusers' PixArt folder"
KIND = "PixArtTransformer2DModel"
GUIDANCE, STEPS = 4.5, 20  # of diffusers' pipeline
USUAL = Sampling(
    {
        "num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear",
        "prediction_type": "epsilon",
    },
    "dpm++2m",
)  # fmt: skip
PLACES = Places(first=r"pos_embed\.proj", time=(r"adaln_single\..+",))
recognise = holding(KIND)


class Choice(BaseModel):
    """The folder leaves none."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Told(nn.Module):
    """diffusers' network as a denoiser of x (B, C, H, W), t (B,), context (B, T, width) and mask (B, T), in float32.

    Its parts are called from here, in its order, because its own forward does not export: it folds captions by the
    latent's batch, and squeezes tokens of which there are many.
    """

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, x: Tensor, t: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        network, patch = self.transformer, self.transformer.config.patch_size
        for value in (context, mask):
            # Else the exporter takes them for batches of their own; by len() it would take the batch for a constant.
            torch._check(value.shape[0] == x.shape[0])
        hidden = (1 - mask)[:, None] * -10000.0  # what is added to the scores of tokens that only fill up
        if network.caption_projection is not None:
            context = network.caption_projection(context)
        tokens = network.pos_embed(x)
        untold = {"resolution": None, "aspect_ratio": None}
        when, embedded = network.adaln_single(t, untold, batch_size=x.shape[0], hidden_dtype=x.dtype)
        for block in network.transformer_blocks:
            tokens = block(tokens, encoder_hidden_states=context, encoder_attention_mask=hidden, timestep=when)
        shift, scale = (network.scale_shift_table[None] + embedded[:, None]).chunk(2, dim=1)
        out = network.proj_out(network.norm_out(tokens) * (1 + scale) + shift)
        rows, columns = x.shape[2] // patch, x.shape[3] // patch
        whole = out.reshape(-1, rows, columns, patch, patch, x.shape[1]).permute(0, 5, 1, 3, 2, 4)
        return cast(Tensor, whole.reshape(-1, *x.shape[1:]))


def load(folder: Folder, path: Path, config: Path | None) -> DiffusionModel:
    """Build the network that config.json describes and load the weights strictly.

    Raises:
        AccuQuantError: settings that diffusers refuses or that are missing, weights missing, left over or not finite,
            or too many for this machine's memory.
    """
    part = folder.of(KIND)
    options(config, Choice)
    size, patch, channels, told = settings_of(part, "sample_size", "patch_size", "in_channels", "cross_attention_dim")
    out = part.config.get("out_channels") or channels
    if out not in (channels, 2 * channels):
        raise AccuQuantError(
            f"{part.path / 'config.json'}: {channels} channels in and {out} out; as many or, with a learned variance, "
            "twice as many are expected"
        )
    network: Any = build_empty(KIND, part, out_channels=channels)
    weights = dict(part.weights())
    for name in {"proj_out.weight", "proj_out.bias"} & weights.keys():
        weights[name] = without_variance(weights[name], channels, out, patch)
    place(network, size // patch)
    fill(network, part, weights)
    constants: dict[str, tuple[float, ...]] = {}
    if network.use_additional_conditions:
        side = float(pixels(folder, size))
        constants = {"resolution": (side, side), "aspect_ratio": (1.0,)}
        _tell_size(network, constants)
    width = part.config.get("caption_channels") or told
    conditioning = ByRows(shapes={"context": (None, width), "mask": (None,)}, guidance=GUIDANCE)
    return assemble(
        folder, Told(network), sampling(folder, USUAL), PLACES, conditioning,
        family="pixart", name=NAME, sample_shape=(channels, size, size), steps=STEPS, constants=constants,
    )  # fmt: skip


def place(network: Any, side: int) -> None:
    """Compute the positions of a square of that many patches, which diffusers does as it builds the network."""
    scale = network.pos_embed.interpolation_scale
    network.pos_embed.pos_embed = positions(network.inner_dim, side, scale).float()[None]


@torch.no_grad()
def _tell_size(network: Any, constants: Mapping[str, tuple[float, ...]]) -> None:
    """Put what the network is told of resolution and aspect into the bias that it is added to."""
    embedding = network.adaln_single.emb
    told = [
        embedder(embedding.additional_condition_proj(torch.tensor(constants[name]))).flatten()
        for name, embedder in (
            ("resolution", embedding.resolution_embedder),
            ("aspect_ratio", embedding.aspect_ratio_embedder),
        )
    ]
    embedding.timestep_embedder.linear_2.bias += torch.cat(told)
    del embedding.resolution_embedder, embedding.aspect_ratio_embedder
    network.use_additional_conditions = embedding.use_additional_conditions = False
