"""Stable Diffusion XL in one file of the original's layout: `.safetensors` or `.ckpt` in, DiffusionModel out.

    o = UNet( x, t; context, [ pooled | e(height) e(width) | e(top) e(left) | e(height) e(width) ] )

A U-Net as of Stable Diffusion 2, with transformers of another depth at each level, two text encoders (sdxl_text.py),
and a vector beside the time embedding: the text as a whole, and sinusoids of the original's size, of the crop's corner
and of the target's size. These six are the same for all pictures of a bundle. What the keys do not say is the published
model's, or of a YAML beside the checkpoint (or `--config`):

    size: 128                    # height and width of the latent
    original_size: [1024, 1024]  # what the network is told, height and width in pixels; the picture's own by default
    crop: [0, 0]                 # top, left
    target_size: [1024, 1024]
    force_zeros_for_empty_prompt: true    # guided against zeros, or against the encoded empty text
    guidance: 5.0
    prompts: [a red apple, a blue heart]
    timestep_spacing: trailing   # of distilled models

Distilled models with the same keys (Turbo, Lightning) are such models; what they are sampled with - few steps, spaced
from the last, and guidance 1 - stands in no key and is to be asked for.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from ...runtime.bundle import ByText
from ...runtime.errors import AccuQuantError
from ..checkpoint import load_weights
from ..model import DiffusionModel, TextEncoder
from . import adm, clip_text, clip_tokenizer, ldm
from .adm_unet import AdmConfig, AdmUNet, timestep_embedding
from .first_stage import Decoder, load_decoder
from .from_diffusers import Sampling, options
from .ldm_facts import PROMPTS
from .sdxl_text import TwoTexts, join, published_marks

NAME = "Stable Diffusion XL"
CONDITIONER = "conditioner.embedders."
FIRST, SECOND = f"{CONDITIONER}0.transformer.", f"{CONDITIONER}1.model."
PROJECTION = f"{SECOND}text_projection"
SCALE, SIZE, HEAD_CHANNELS = 0.13025, 128, 64
GUIDANCE, STEPS = 5.0, 50  # of diffusers' pipeline
USUAL = Sampling(
    {
        "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "prediction_type": "epsilon", "timestep_spacing": "leading", "steps_offset": 1,
    },
    "euler",
)  # fmt: skip
AS_FOLDER = "save it as a folder with diffusers, whose scheduler says so, and export that"
# What trainers put beside the weights of models that are not sampled as the base model is.
MARKED: Mapping[str, str] = {
    "v_pred": f"it predicts v; {AS_FOLDER}",
    "edm_mean": "it is of the EDM kind (Playground 2.5), which is not supported; use an SDXL that predicts noise",
    "edm_vpred.sigma_max": "it is of the EDM kind (CosXL), which is not supported; use an SDXL that predicts noise",
}


class Choice(BaseModel):
    """What the checkpoint does not tell."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int | None = Field(default=None, gt=0)
    original_size: tuple[int, int] | None = None
    crop: tuple[int, int] = (0, 0)
    target_size: tuple[int, int] | None = None
    force_zeros_for_empty_prompt: bool | None = None
    guidance: float = Field(default=GUIDANCE, ge=0, allow_inf_nan=False)
    prompts: tuple[str, ...] = ()
    timestep_spacing: Literal["leading", "trailing", "linspace"] | None = None

    def sizes(self, pixels: int) -> tuple[int, ...]:
        """The six numbers, in the order that the network is told them."""
        own = (pixels, pixels)
        return (*(self.original_size or own), *self.crop, *(self.target_size or own))


class Told(nn.Module):
    """The U-Net as a denoiser of x (B, C, H, W), t (B,), context (B, T, width) and pooled (B, width)."""

    def __init__(self, unet: AdmUNet, sizes: tuple[int, ...], channels: int) -> None:
        super().__init__()
        self.unet = unet
        told = timestep_embedding(torch.tensor(sizes), channels).flatten()
        self.sizes: Tensor
        self.register_buffer("sizes", told, persistent=False)

    def forward(self, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        vector = torch.cat([pooled, self.sizes.expand(pooled.shape[0], -1)], dim=1)
        return cast(Tensor, self.unet(x, t, vector, context))


def recognise(stored: Any) -> dict[str, Tensor] | None:
    """The state dict, if `stored` is of this layout."""
    state = ldm.recognise(stored)
    return state if state is not None and any(key.startswith(CONDITIONER) for key in state) else None


def load(state: Mapping[str, Tensor], path: Path, config: Path | None) -> DiffusionModel:
    """Build the networks that the keys describe and load them strictly.

    Raises:
        AccuQuantError: another model of this layout, a choice that does not fit, a vocabulary without its tokenizer, or
            weights missing, left over or not finite.
    """
    unet, averaged = ldm.unet_weights(state)
    _refuse_others(state, unet, path)
    beside = next((p for p in (path.with_suffix(".yml"), path.with_suffix(".yaml")) if p.exists()), None)
    chosen = options(config or beside, Choice)
    text = _text(state, path)
    stage = {k.removeprefix(ldm.FIRST_STAGE): v for k, v in state.items() if k.startswith(ldm.FIRST_STAGE)}
    decoder = load_decoder(stage, SCALE, path) if stage else None
    return assemble(
        _config(unet, path),
        {f"unet.{key}": value for key, value in unet.items()},
        text,
        decoder,
        schedule=USUAL,
        chosen=chosen,
        size=chosen.size or SIZE,
        zeros=True,
        found=NAME + (" (EMA)" if averaged else ""),
        path=path,
    )


def assemble(
    made: AdmConfig,
    weights: Mapping[str, Tensor],
    text: TextEncoder,
    decoder: Decoder | None,
    *,
    schedule: Sampling,
    chosen: Choice,
    size: int,
    zeros: bool,
    found: str,
    path: Path,
) -> DiffusionModel:
    """The model of a U-Net's shape and its weights (behind `unet.`), of latents of that size.

    `zeros` is what the checkpoint has for the absent prompt, where nobody chose.

    Raises:
        AccuQuantError: a size that does not fit, text encoders of other widths than the U-Net reads, or weights
            missing, left over or not finite.
    """
    halvings = len(made.channel_mult) - 1
    if size % 2**halvings:
        raise AccuQuantError(f"{path}: a latent of {size}x{size} cannot be halved {halvings} times")
    texts = cast(TwoTexts, text.network)
    width, pooled = texts.first.config.width + texts.second.config.width, texts.text_projection.out_features
    told, odd = divmod((made.vector or 0) - pooled, 6)
    if made.context != width or odd or told < 2:
        raise AccuQuantError(
            f"{path}: its U-Net reads a context of width {made.context} and a vector of {made.vector}; the text "
            f"encoders make {width} and {pooled}, beside which six sizes are to be told"
        )
    pixels = size * (2 ** (len(decoder.decoder.up) - 1) if decoder is not None else 8)
    with torch.device("meta"):
        empty = AdmUNet(made)
    network = Told(empty, chosen.sizes(pixels), told)
    load_weights(network, weights, path)
    zeros = zeros if chosen.force_zeros_for_empty_prompt is None else chosen.force_zeros_for_empty_prompt
    noise_schedule = dict(schedule.noise_schedule)
    if chosen.timestep_spacing is not None:
        noise_schedule["timestep_spacing"] = chosen.timestep_spacing
    millions = sum(p.numel() for p in network.parameters()) / 1e6
    against = "zeros" if zeros else "the empty text"
    return DiffusionModel(
        family="sdxl",
        found=f"{found}, {millions:.2f} M parameters, latent {made.in_channels}x{size}x{size}, of text, predicts "
        f"{noise_schedule.get('prediction_type', 'epsilon')}, guided against {against}"
        + ("" if decoder is not None else ", no decoder"),
        network=network.eval().requires_grad_(False),
        sample_shape=(made.in_channels, size, size),
        noise_schedule=noise_schedule,
        role_of=ldm.role_of,
        block_of=ldm.block_of,
        default_sampler=schedule.sampler,
        default_steps=STEPS,
        conditioning=ByText(
            inputs=("context", "pooled"),
            examples=chosen.prompts or PROMPTS,
            guidance=chosen.guidance,
            zeros_for_none=zeros,
        ),
        text=text,
        decoder=decoder,
        adaptable=partial(adaptable, network, texts),
        constants={"time_ids": tuple(map(float, chosen.sizes(pixels)))},
    )


def adaptable(network: Told, texts: TwoTexts) -> dict[str, nn.Module]:
    """The layers that a LoRA may change, under their names here and in diffusers."""
    layers = ldm.adaptable_unet(network.unet)
    layers |= ldm.adaptable_text(texts.first)
    return layers | ldm.adaptable_text(texts.second, "text_encoder_2")


def _refuse_others(state: Mapping[str, Tensor], unet: Mapping[str, Tensor], path: Path) -> None:
    """Models of these keys that this family does not know, by their names."""
    ldm.check_channels(unet["input_blocks.0.0.weight"].shape[1], len(unet["out.2.weight"]), path)
    for key, why in MARKED.items():
        if key in state:
            raise AccuQuantError(f"{path}: {why} ({key} stands beside its weights)")
    if any(key.startswith(f"{CONDITIONER}0.model.") for key in state):
        raise AccuQuantError(
            f"{path}: Stable Diffusion XL's refiner, which works on the base model's latents and paints none of its "
            "own, is not supported; export the base model"
        )
    wanted = (f"{FIRST}text_model.embeddings.token_embedding.weight", f"{SECOND}token_embedding.weight")
    missing = [key for key in wanted if key not in state]
    if missing or "label_emb.0.0.weight" not in unet:
        lacking = missing[0] if missing else f"{ldm.UNET}label_emb.0.0.weight"
        raise AccuQuantError(
            f"{path}: a model with a conditioner that is not Stable Diffusion XL's base: it has no {lacking}; a whole "
            "file, with CLIP's and OpenCLIP's text encoders, is expected"
        )


def _config(unet: Mapping[str, Tensor], path: Path) -> AdmConfig:
    shape = adm.shape_from_keys(unet, path)
    levels, stages = len(shape["channel_mult"]), shape["num_res_blocks"] + 1

    def depth(level: int) -> int:
        inside = "middle_block.1" if level == levels - 1 else f"output_blocks.{(levels - 1 - level) * stages}.1"
        inside += ".transformer_blocks."
        return len({key.removeprefix(inside).split(".")[0] for key in unet if key.startswith(inside)})

    context = next((v.shape[1] for k, v in unet.items() if k.endswith("transformer_blocks.0.attn2.to_k.weight")), None)
    made = AdmConfig(
        **shape,
        in_channels=unet["input_blocks.0.0.weight"].shape[1],
        out_channels=len(unet["out.2.weight"]),
        head_channels=HEAD_CHANNELS,
        vector=unet["label_emb.0.0.weight"].shape[1],
        context=context,
        depth=tuple(depth(level) for level in range(levels)),
        linear_projection=next((v.ndim == 2 for k, v in unet.items() if k.endswith(".proj_in.weight")), False),
    )
    for level in (*made.attention, levels - 1):
        if made.width(level) % HEAD_CHANNELS:
            raise AccuQuantError(
                f"{path}: level {level} is {made.width(level)} wide; heads of Stable Diffusion XL have {HEAD_CHANNELS}"
            )
    return made


def _text(state: Mapping[str, Tensor], path: Path) -> TextEncoder:
    first = clip_text.build_network(clip_text.inside(state, FIRST), path, approximate=True)
    newer = clip_text.from_open_clip(clip_text.inside(state, SECOND), path, whole=True)
    second = clip_text.build_network(newer, path, approximate=False)
    if PROJECTION in state:
        projection = state[PROJECTION].T  # OpenCLIP multiplies from the other side
    elif f"{PROJECTION}.weight" in state:
        projection = state[f"{PROJECTION}.weight"]
    else:
        raise AccuQuantError(f"{path}: {PROJECTION} is missing; copy the checkpoint again")
    tokenizer = clip_text.find_tokenizer(path, first.config, clip_tokenizer.END)
    return TextEncoder(join(first, second, projection, published_marks(tokenizer, path), path), tokenizer)
