"""Diffusion transformers as diffusers keeps them: a DiTPipeline's folder, or its transformer/ alone.

The weights go into the network of dit_net.py under the authors' names. diffusers' network is not quite the authors':
it spaces a timestep's frequencies over (half - 1) instead of half, and its second norm has an epsilon of 1e-5. A folder
is taken for what diffusers computes of it. Weights that were trained elsewhere and only stored in this form (the
published DiT-XL/2 were) are closer to the authors' with a file named by `--config`:

    downscale_freq_shift: 0

diffusers also copies the embedding of timestep and class into every block; copies are checked and kept once.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from ...runtime.errors import AccuQuantError
from ..folder import Folder, Part
from ..model import DiffusionModel
from . import dit
from .autoencoder_kl import find_decoder
from .dit_net import DitConfig
from .from_diffusers import Sampling, check_settings, holding, options, positions, sampling, settings_of

NAME = "diffusers' DiT folder"
KIND = "DiTTransformer2DModel"
SAME: Mapping[str, Any] = {
    "activation_fn": "gelu-approximate", "attention_bias": True, "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
}  # fmt: skip
USUAL = Sampling(
    {
        "num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear",
        "prediction_type": "epsilon", "timestep_spacing": "leading", "steps_offset": 0,
    },
    "ddim",
)  # fmt: skip
EMBEDDERS = {
    "timestep_embedder.linear_1": "t_embedder.mlp.0",
    "timestep_embedder.linear_2": "t_embedder.mlp.2",
    "class_embedder.embedding_table": "y_embedder.embedding_table",
}
INSIDE = {  # of a block
    "attn1.to_out.0": "attn.proj", "ff.net.0.proj": "mlp.fc1", "ff.net.2": "mlp.fc2",
    "norm1.linear": "adaLN_modulation.1",
}  # fmt: skip
OUTSIDE = {
    "pos_embed.proj": "x_embedder.proj", "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
}  # fmt: skip
recognise = holding(KIND)


class Choice(BaseModel):
    """What the folder does not tell."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    downscale_freq_shift: Literal[0, 1] = 1


def load(folder: Folder, path: Path, config: Path | None) -> DiffusionModel:
    """Build the network that config.json describes and load the weights strictly.

    Raises:
        AccuQuantError: settings that are not supported, blocks whose copies of the embedding differ, weights missing,
            left over or not finite, or too many for this machine's memory.
    """
    part, choice = folder.of(KIND), options(config, Choice)
    shape = _shape(part, choice)
    made = dit.assemble(_renamed(part.weights(), shape, part), shape, part.path, NAME)
    schedule = sampling(folder, USUAL)
    decoder, words = find_decoder(folder)
    spaced = "" if choice.downscale_freq_shift else ", frequencies as the authors space them"
    return replace(
        made,
        found=f"{made.found}{spaced}, {words}",
        noise_schedule=schedule.noise_schedule,
        default_sampler=schedule.sampler,
        decoder=decoder,
    )


def _shape(part: Part, choice: Choice) -> DitConfig:
    check_settings(part, SAME)
    heads, depth, size, patch, channels, layers, classes = settings_of(
        part, "num_attention_heads", "attention_head_dim", "sample_size", "patch_size", "in_channels", "num_layers",
        "num_embeds_ada_norm",
    )  # fmt: skip
    return DitConfig(
        size=size,
        patch=patch,
        channels=channels,
        width=heads * depth,
        depth=layers,
        heads=heads,
        hidden=4 * heads * depth,
        classes=classes,
        frequency_shift=choice.downscale_freq_shift,
        mlp_eps=float(part.config.get("norm_eps", 1e-5)),
    )


def _renamed(stored: Mapping[str, Tensor], shape: DitConfig, part: Part) -> dict[str, Tensor]:
    """The weights under the authors' names; those of no known name keep theirs, and are then refused as left over."""
    side = shape.size // shape.patch
    made = {"pos_embed": positions(shape.width, side)[None]}
    for name, value in stored.items():
        head, _, kind = name.rpartition(".")
        _, _, inside = head.partition("transformer_blocks.")
        block, _, inside = inside.partition(".")
        if inside.startswith("norm1.emb."):
            common = f"{EMBEDDERS.get(inside.removeprefix('norm1.emb.'), inside)}.{kind}"
            if not torch.equal(made.setdefault(common, value), value):
                raise AccuQuantError(
                    f"{part.path}: block {block} embeds timesteps or classes in another way than block 0 "
                    f"({inside}); only blocks that share the embedding are supported"
                )
        elif inside.endswith(("attn1.to_q", "attn1.to_k", "attn1.to_v")):
            if inside.endswith("to_q"):
                rows = [stored.get(f"{head[:-1]}{letter}.{kind}", value.new_zeros(0)) for letter in "qkv"]
                made[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat(rows)
        elif inside:
            made[f"blocks.{block}.{INSIDE.get(inside, inside)}.{kind}"] = value
        else:
            made[f"{OUTSIDE.get(head, head)}.{kind}"] = value
    return made
