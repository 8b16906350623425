"""Latent diffusion in CompVis's layout: `.ckpt` or `.safetensors` in, DiffusionModel with its decoder out.

One file holds the denoiser (`model.diffusion_model.*`, its EMA copy as `model_ema.*` with the dots removed), the first
stage and, of class-conditional models, the embedding of classes; EMA weights are taken where they are. What the keys do
not say (the latent's size, the noise schedule, how attention is cut into heads) is known for published models, and is
read from the repository's own YAML beside the checkpoint (or `--config`) for others:

    model:
      params:
        linear_start: 0.0015
        linear_end: 0.0195
        image_size: 64
        scale_factor: 1.0
        unet_config: {params: {num_head_channels: 32}}       # or num_heads
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from ...runtime.bundle import ByClass
from ...runtime.errors import AccuQuantError
from ..checkpoint import load_weights
from ..model import DiffusionModel
from ..scheme import Role
from . import adm
from .adm_unet import AdmConfig, AdmUNet
from .first_stage import load_decoder

NAME = "CompVis latent diffusion"
UNET, EMA, FIRST_STAGE = "model.diffusion_model.", "model_ema.", "first_stage_model."
CLASSES = "cond_stage_model.embedding.weight"
GUIDANCE = 3.0  # of the original's notebook for ImageNet


class Facts(BaseModel):
    """What the keys do not say, in the words of the repository's YAML; other entries are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    image_size: int = Field(gt=0)
    linear_start: float = Field(gt=0)
    linear_end: float = Field(gt=0)
    timesteps: int = Field(default=1000, gt=0)
    parameterization: str = "eps"
    scale_factor: float = 1.0
    num_heads: int = -1
    num_head_channels: int = -1


def _published(size: int, end: float, **heads: int) -> Facts:
    return Facts.model_validate({"image_size": size, "linear_start": 0.0015, "linear_end": end, **heads})


# model_channels, channel_mult, context width -> the published models of that shape.
PUBLISHED: Mapping[tuple[int, tuple[float, ...], int | None], tuple[str, Facts]] = {
    (224, (1, 2, 3, 4), None): ("LDM-4 of LSUN, FFHQ and CelebA-HQ", _published(64, 0.0195, num_head_channels=32)),
    (192, (1, 2, 2, 4, 4), None): ("LDM-8 of LSUN churches", _published(32, 0.0155, num_heads=8)),
    (192, (1, 2, 3, 5), 512): ("LDM-4 of ImageNet", _published(64, 0.0195, num_heads=1)),
}


def recognise(stored: Any) -> dict[str, Tensor] | None:
    """The state dict, if `stored` is of this layout."""
    if isinstance(stored, Mapping) and isinstance(stored.get("state_dict"), Mapping):
        stored = stored["state_dict"]
    if not isinstance(stored, Mapping):
        return None
    state = {str(k): v for k, v in stored.items() if isinstance(v, Tensor)}
    return state if f"{UNET}input_blocks.0.0.weight" in state and f"{UNET}out.2.weight" in state else None


class ByClassContext(nn.Module):
    """A U-Net whose context is the embedding of a class: y (B,) int64 becomes one token."""

    def __init__(self, unet: AdmUNet, classes: int, width: int) -> None:
        super().__init__()
        self.unet, self.embedding = unet, nn.Embedding(classes, width)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return cast(Tensor, self.unet(x, t, context=self.embedding(y)[:, None]))


def load(state: Mapping[str, Tensor], path: Path, config: Path | None) -> DiffusionModel:
    """Build the networks that the keys describe and load them strictly.

    Raises:
        AccuQuantError: no configuration, one that contradicts the keys, a condition that is no class, or weights
            missing, left over or not finite.
    """
    unet, averaged = _unet(state)
    shape = adm.shape_from_keys(unet, path)
    context = next((v.shape[1] for k, v in unet.items() if k.endswith("transformer_blocks.0.attn2.to_k.weight")), None)
    if "label_emb.0.0.weight" in unet:
        raise AccuQuantError(f"{path}: a U-Net with pooled text (SDXL) is not supported yet")
    if context is not None and CLASSES not in state:
        raise AccuQuantError(
            f"{path}: the U-Net reads a context of width {context} and the file embeds no classes; models of text "
            "are not supported yet"
        )
    facts, source = _facts(path, config, shape, context)
    channels = unet["input_blocks.0.0.weight"].shape[1]
    if len(unet["out.2.weight"]) != channels:
        raise AccuQuantError(f"{path}: {channels} channels in and {len(unet['out.2.weight'])} out; models given "
                             "a picture besides are not supported")  # fmt: skip
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
    _check(made, facts, source)
    own = AdmUNet(made)
    network: nn.Module = own
    weights, conditioning, kinds = _sorted(unet, made), None, ""
    if context is not None:
        table = state[CLASSES]
        network = ByClassContext(own, len(table), context)
        weights = {f"unet.{k}": v for k, v in weights.items()} | {"embedding.weight": table}
        # The last one was put in the place of classes that were dropped in training.
        conditioning = ByClass(classes=len(table) - 1, null=len(table) - 1, guidance=GUIDANCE)
        kinds = f", {len(table) - 1} classes"
    load_weights(network, weights, path)
    first_stage = {k.removeprefix(FIRST_STAGE): v for k, v in state.items() if k.startswith(FIRST_STAGE)}
    scale = float(state["scale_factor"]) if "scale_factor" in state else facts.scale_factor
    millions, size = sum(p.numel() for p in network.parameters()) / 1e6, facts.image_size
    ema = " (EMA)" if averaged else ""
    return DiffusionModel(
        family="ldm",
        found=f"{NAME}, {millions:.2f} M parameters{ema}, latent {channels}x{size}x{size}{kinds}, "
        f"configuration from {source}",
        network=network.eval().requires_grad_(False),
        sample_shape=(channels, size, size),
        noise_schedule={
            "num_train_timesteps": facts.timesteps,
            "beta_start": facts.linear_start,
            "beta_end": facts.linear_end,
            "beta_schedule": "scaled_linear",
            "prediction_type": {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}[facts.parameterization],
            "timestep_spacing": "leading",
            "steps_offset": 1,
        },
        role_of=role_of,
        block_of=block_of,
        default_sampler="ddim",
        default_steps=50,
        conditioning=conditioning,
        decoder=load_decoder(first_stage, scale, path) if first_stage else None,
    )


def role_of(name: str) -> Role:
    """Which part of the network an operator is, for the layer policy."""
    return adm.role_of(name.removeprefix("unet."))


def block_of(name: str) -> str:
    """The block an operator belongs to, under the name that the network has for it."""
    prefix = "unet." if name.startswith("unet.") else ""
    return prefix + adm.block_of(name.removeprefix(prefix))


def _unet(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
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


def _facts(path: Path, config: Path | None, shape: Mapping[str, Any], context: int | None) -> tuple[Facts, str]:
    beside = next((p for p in (path.with_suffix(".yml"), path.with_suffix(".yaml")) if p.exists()), None)
    chosen = config or beside
    if chosen is None:
        known = PUBLISHED.get((shape["model_channels"], shape["channel_mult"], context))
        if known is None:
            raise AccuQuantError(
                f"{path}: its keys say neither how large latents are nor what the noise schedule is; put its "
                f"training's YAML beside it as {path.with_suffix('.yaml').name}, or name the file with --config"
            )
        return known[1], f"the published {known[0]}"
    try:
        read = yaml.safe_load(chosen.read_text())
        params = read["model"]["params"]
        heads = params["unet_config"]["params"]
        facts = Facts.model_validate(
            {**params, **{k: heads[k] for k in ("num_heads", "num_head_channels") if k in heads}}
        )
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise AccuQuantError(f"{chosen} cannot be read as YAML: {error}") from error
    except (KeyError, TypeError) as error:
        raise AccuQuantError(
            f"{chosen} has no model.params.unet_config.params ({error}); CompVis's form expected"
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise AccuQuantError(f"{chosen}: model.params.{name}: {first['msg']}") from error
    return facts, chosen.name


def _check(config: AdmConfig, facts: Facts, source: str) -> None:
    if facts.parameterization not in ("eps", "v", "x0"):
        raise AccuQuantError(f"{source}: parameterization {facts.parameterization!r}; known: eps, v, x0")
    levels = len(config.channel_mult)
    if facts.image_size % 2 ** (levels - 1):
        raise AccuQuantError(f"{source}: image_size {facts.image_size} cannot be halved {levels - 1} times")
    flag = "num_heads" if facts.num_head_channels == -1 else "num_head_channels"
    divisor = getattr(facts, flag)
    for level in (*config.attention, levels - 1):
        if divisor < 1 or config.width(level) % divisor:
            raise AccuQuantError(
                f"{source}: {flag} {divisor} does not divide the {config.width(level)} channels of level {level}"
            )
