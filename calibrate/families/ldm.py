"""Latent diffusion in CompVis's layout, Stable Diffusion's too: `.ckpt` or `.safetensors` in, DiffusionModel out.

One file holds the denoiser (`model.diffusion_model.*`, its EMA copy as `model_ema.*` with the dots removed), the first
stage and, of conditional models, the embedding of classes or the text encoder; EMA weights are taken where they are.
What the keys do not say (ldm_facts.py) is known for published models, and is read from the repository's own YAML beside
the checkpoint (or `--config`) for others:

    model:
      params:
        linear_start: 0.0015
        linear_end: 0.0195
        parameterization: eps                                # or v, x0
        image_size: 64
        scale_factor: 1.0
        unet_config: {params: {num_head_channels: 32}}       # or num_heads
    prompts: [a red apple, a blue heart]     # entries of our own, for models of text: what to calibrate with,
    guidance: 3.0                            # and how much they are guided
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...runtime.bundle import ByClass, ByText, Conditioning
from ...runtime.errors import AccuQuantError
from ..checkpoint import load_weights
from ..model import DiffusionModel, TextEncoder
from . import adm, bert_text, clip_text
from .adm_unet import AdmConfig, AdmUNet
from .diffusers_names import renamed, unet_names
from .first_stage import load_decoder
from .ldm_facts import PREDICTIONS, PROMPTS, Facts, check_facts, read_facts, returned_noise

NAME = "CompVis latent diffusion"
UNET, EMA, FIRST_STAGE = "model.diffusion_model.", "model_ema.", "first_stage_model."
CLASSES = "cond_stage_model.embedding.weight"
GUIDANCE = 3.0  # of the original's notebook for ImageNet


# Input channels of U-Nets that are given more than a latent, and what they are.
GIVEN_MORE: Mapping[int, str] = {
    5: "a depth-to-image model", 7: "an upscaler", 8: "InstructPix2Pix", 9: "an inpainting model",
}  # fmt: skip
PROBED = 32  # positions a side of the latent that tells what a network predicts
TEXTS = (bert_text, clip_text)


def recognise(stored: Any) -> dict[str, Tensor] | None:
    """The state dict, if `stored` is of this layout."""
    if isinstance(stored, Mapping) and isinstance(stored.get("state_dict"), Mapping):
        stored = stored["state_dict"]
    if not isinstance(stored, Mapping):
        return None
    state = {str(k): v for k, v in stored.items() if isinstance(v, Tensor)}
    return state if f"{UNET}input_blocks.0.0.weight" in state and f"{UNET}out.2.weight" in state else None


class ByContext(nn.Module):
    """A U-Net under a context (B, T, width), such as a text's."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return cast(Tensor, self.unet(x, t, context=context))


class ByClassContext(nn.Module):
    """A U-Net whose context is the embedding of a class: y (B,) int64 becomes one token."""

    def __init__(self, unet: nn.Module, classes: int, width: int) -> None:
        super().__init__()
        self.unet, self.embedding = unet, nn.Embedding(classes, width)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return cast(Tensor, self.unet(x, t, context=self.embedding(y)[:, None]))


def load(state: Mapping[str, Tensor], path: Path, config: Path | None) -> DiffusionModel:
    """Build the networks that the keys describe and load them strictly.

    Raises:
        AccuQuantError: no configuration, one that contradicts the keys, a condition that nothing in the file makes, a
            text encoder without its tokenizer, or weights missing, left over or not finite.
    """
    unet, averaged = unet_weights(state)
    _refuse_others(state, unet, path)
    shape = adm.shape_from_keys(unet, path)
    context = next((v.shape[1] for k, v in unet.items() if k.endswith("transformer_blocks.0.attn2.to_k.weight")), None)
    facts, source, otherwise = read_facts(path, config, shape, context)
    channels = unet["input_blocks.0.0.weight"].shape[1]
    depth = {int(m[1]) for k in unet if (m := re.search(r"\.transformer_blocks\.(\d+)\.", k))}
    made = AdmConfig(
        **shape,
        in_channels=channels,
        out_channels=channels,
        head_channels=facts.num_head_channels,
        heads=facts.num_heads if facts.num_head_channels == -1 else None,
        context=context,
        depth=len(depth) or 1,
        linear_projection=next((v.ndim == 2 for k, v in unet.items() if k.endswith(".proj_in.weight")), False),
    )
    check_facts(made, facts, source)
    with torch.device("meta"):
        empty = AdmUNet(made)
    network, weights, conditioning, text = _conditioned(empty, _sorted(unet, made), state, facts, path)
    load_weights(network, weights, path)
    network.eval().requires_grad_(False)
    told = ""
    if otherwise is not None and text is not None:
        facts, told = _told_by_weights(network, text, facts, otherwise, channels)
    first_stage = {k.removeprefix(FIRST_STAGE): v for k, v in state.items() if k.startswith(FIRST_STAGE)}
    scale = float(state["scale_factor"]) if "scale_factor" in state else facts.scale_factor
    millions, size = sum(p.numel() for p in network.parameters()) / 1e6, facts.image_size
    ema = " (EMA)" if averaged else ""
    kinds = f", {conditioning.classes} classes" if isinstance(conditioning, ByClass) else ", of text" if text else ""
    return DiffusionModel(
        family="ldm",
        found=f"{NAME}, {millions:.2f} M parameters{ema}, latent {channels}x{size}x{size}{kinds}, "
        f"configuration from {source}{told}",
        network=network,
        sample_shape=(channels, size, size),
        noise_schedule={
            "num_train_timesteps": facts.timesteps,
            "beta_start": facts.linear_start,
            "beta_end": facts.linear_end,
            "beta_schedule": "scaled_linear",
            "prediction_type": PREDICTIONS[facts.parameterization],
            "timestep_spacing": "leading",
            "steps_offset": 1,
        },
        role_of=role_of,
        block_of=block_of,
        default_sampler="ddim",
        default_steps=50,
        conditioning=conditioning,
        text=text,
        decoder=load_decoder(first_stage, scale, path) if first_stage else None,
        adaptable=partial(adaptable, network, text),
    )


def adaptable(network: nn.Module, text: TextEncoder | None) -> dict[str, nn.Module]:
    """The layers that a LoRA may change, under their names here and in diffusers."""
    if text is None:
        return {}
    layers = adaptable_unet(cast(AdmUNet, network.unet))
    return layers | (adaptable_text(text.network) if isinstance(text.network, clip_text.ClipText) else {})


def adaptable_unet(unet: AdmUNet) -> dict[str, nn.Module]:
    config = unet.config
    names = unet_names(len(config.channel_mult), config.num_res_blocks, config.attention)
    layers: dict[str, nn.Module] = {
        f"unet.{k}": m for k, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)
    }
    return layers | {f"unet.{renamed(k.removeprefix('unet.'), names)}": m for k, m in layers.items()}


def adaptable_text(encoder: nn.Module, called: str = "text_encoder") -> dict[str, nn.Module]:
    layers = {name: module for name, module in encoder.named_modules() if isinstance(module, nn.Linear)}
    return {f"{called}.{inside}{name}": m for name, m in layers.items() for inside in ("", "text_model.")}


def _refuse_others(state: Mapping[str, Tensor], unet: Mapping[str, Tensor], path: Path) -> None:
    """Models of these keys that this family does not know, by their names."""
    if "label_emb.0.0.weight" in unet:
        raise AccuQuantError(
            f"{path}: a U-Net with pooled embeddings (label_emb): of pictures, as unCLIP's, is not supported; Stable "
            "Diffusion XL is, in a whole file that holds its text encoders (conditioner.embedders)"
        )
    check_channels(unet["input_blocks.0.0.weight"].shape[1], len(unet["out.2.weight"]), path)


def check_channels(channels: int, out: int, where: Path) -> None:
    """Raises AccuQuantError if a U-Net is given more than the latent that it predicts."""
    if out != channels:
        what = f": {GIVEN_MORE[channels]}" if channels in GIVEN_MORE else ""
        raise AccuQuantError(
            f"{where}: {channels} channels in and {out} out{what}; models given a picture besides are not supported"
        )


def _told_by_weights(
    network: nn.Module, text: TextEncoder, noise: Facts, otherwise: Facts, channels: int
) -> tuple[Facts, str]:
    """Which of two models with the same keys this is, and a remark for the person who gave the file."""
    share = returned_noise(network, channels, PROBED, noise.timesteps - 1, {"context": text([""])[0]})
    facts = noise if share > 0.5 else otherwise
    return facts, (
        f"; predicts {facts.parameterization} at {facts.image_size}x{facts.image_size}, judged by its weights: at the "
        f"last timestep it gives back {share:.2f} of the noise it is given (a YAML would overrule that)"
    )


role_of = replace(adm.role_of, inside=r"(unet\.)?")  # a coat holds the network where there is a condition


def block_of(name: str) -> str:
    """The block an operator belongs to, under the name that the network has for it."""
    prefix = "unet." if name.startswith("unet.") else ""
    return prefix + adm.block_of(name.removeprefix(prefix))


def _conditioned(
    unet: AdmUNet, weights: Mapping[str, Tensor], state: Mapping[str, Tensor], facts: Facts, path: Path
) -> tuple[nn.Module, Mapping[str, Tensor], Conditioning | None, TextEncoder | None]:
    """The denoiser with its condition as an input, its weights, and what it is sampled under."""
    width = unet.config.context
    if width is None:
        return unet, weights, None, None
    inside = {f"unet.{k}": v for k, v in weights.items()}
    if CLASSES in state:
        table = state[CLASSES]
        # The last one was put in the place of classes that were dropped in training.
        known = ByClass(classes=len(table) - 1, null=len(table) - 1, guidance=GUIDANCE)
        return ByClassContext(unet, len(table), width), inside | {"embedding.weight": table}, known, None
    for family in TEXTS:
        if family.recognise(state):
            usual = family.GUIDANCE if facts.guidance is None else facts.guidance
            told = ByText(examples=facts.prompts or PROMPTS, guidance=usual)
            return ByContext(unet), inside, told, family.load(state, path)
    raise AccuQuantError(
        f"{path}: the U-Net reads a context of width {width} and the file holds neither an embedding of classes nor a "
        "text encoder that is known (CLIP's of transformers or OpenCLIP, CompVis's BERTEmbedder)"
    )


def unet_weights(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
    """The denoiser's weights under its own names, and whether they are the averaged ones."""
    plain = {k.removeprefix(UNET): v for k, v in state.items() if k.startswith(UNET)}
    averaged = {k: EMA + f"diffusion_model.{k}".replace(".", "") for k in plain}
    if all(key in state for key in averaged.values()):
        return {k: state[key] for k, key in averaged.items()}, True
    return plain, False


def _sorted(unet: Mapping[str, Tensor], config: AdmConfig) -> dict[str, Tensor]:
    """With attention's 1x1 convolutions as ours are, and qkv in our order; theirs is the legacy one throughout."""
    weights = dict(unet)
    for name, value in unet.items():
        if re.search(r"\.(qkv|proj_out)\.weight$", name) and value.ndim == 3:
            weights[name] = value[..., None]
        if re.search(r"\.qkv\.(weight|bias)$", name):
            weights[name] = adm.sort_qkv(weights[name], config)
    return weights
