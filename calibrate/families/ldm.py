"""Latent diffusion in CompVis's layout: `.ckpt` or `.safetensors` in, DiffusionModel with its decoder out.

One file holds the denoiser (`model.diffusion_model.*`, its EMA copy as `model_ema.*` with the dots removed), the first
stage and, of conditional models, the embedding of classes or the text encoder; EMA weights are taken where they are.
What the keys do not say (the latent's size, the noise schedule, how attention is cut into heads) is known for published
models, and is read from the repository's own YAML beside the checkpoint (or `--config`) for others:

    model:
      params:
        linear_start: 0.0015
        linear_end: 0.0195
        image_size: 64
        scale_factor: 1.0
        unet_config: {params: {num_head_channels: 32}}       # or num_heads
    prompts: [a red apple, a blue heart]     # an entry of our own, for models of text: what to calibrate with
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from ...runtime.bundle import ByClass, ByText, Conditioning
from ...runtime.errors import AccuQuantError
from ..checkpoint import load_weights
from ..model import DiffusionModel, TextEncoder
from ..scheme import Role
from . import adm, bert_text
from .adm_unet import AdmConfig, AdmUNet
from .first_stage import load_decoder

NAME = "CompVis latent diffusion"
UNET, EMA, FIRST_STAGE = "model.diffusion_model.", "model_ema.", "first_stage_model."
CLASSES = "cond_stage_model.embedding.weight"
GUIDANCE = 3.0  # of the original's notebook for ImageNet
TEXT_GUIDANCE = 5.0  # of its text-to-image script


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
    prompts: tuple[str, ...] = ()


def _published(size: int, end: float, **heads: int) -> Facts:
    return Facts.model_validate({"image_size": size, "linear_start": 0.0015, "linear_end": end, **heads})


# model_channels, channel_mult, context width -> the published models of that shape.
PUBLISHED: Mapping[tuple[int, tuple[float, ...], int | None], tuple[str, Facts]] = {
    (224, (1, 2, 3, 4), None): ("LDM-4 of LSUN, FFHQ and CelebA-HQ", _published(64, 0.0195, num_head_channels=32)),
    (192, (1, 2, 2, 4, 4), None): ("LDM-8 of LSUN churches", _published(32, 0.0155, num_heads=8)),
    (192, (1, 2, 3, 5), 512): ("LDM-4 of ImageNet", _published(64, 0.0195, num_heads=1)),
}


# What a model of text is calibrated with where its YAML names nothing.
PROMPTS = (
    "a red apple on a wooden table", "a portrait of an old man with a beard", "a city street at night in the rain",
    "a small house by a lake in autumn", "an oil painting of a sailing ship", "two dogs playing on a beach",
    "a bowl of soup with vegetables", "a castle on a hill at sunrise", "a yellow car in front of a brick wall",
    "a close-up photograph of a flower", "an astronaut riding a horse", "a bookshelf full of old books",
    "a cat sleeping on a sofa", "snowy mountains under a blue sky", "a drawing of a bicycle", "people in a busy market",
)  # fmt: skip


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
    unet, averaged = _unet(state)
    shape = adm.shape_from_keys(unet, path)
    context = next((v.shape[1] for k, v in unet.items() if k.endswith("transformer_blocks.0.attn2.to_k.weight")), None)
    if "label_emb.0.0.weight" in unet:
        raise AccuQuantError(f"{path}: a U-Net with pooled text (SDXL) is not supported yet")
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
    network, weights, conditioning, text = _conditioned(AdmUNet(made), _sorted(unet, made), state, facts, path)
    load_weights(network, weights, path)
    first_stage = {k.removeprefix(FIRST_STAGE): v for k, v in state.items() if k.startswith(FIRST_STAGE)}
    scale = float(state["scale_factor"]) if "scale_factor" in state else facts.scale_factor
    millions, size = sum(p.numel() for p in network.parameters()) / 1e6, facts.image_size
    ema = " (EMA)" if averaged else ""
    kinds = f", {conditioning.classes} classes" if isinstance(conditioning, ByClass) else ", of text" if text else ""
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
        text=text,
        decoder=load_decoder(first_stage, scale, path) if first_stage else None,
    )


def role_of(name: str) -> Role:
    """Which part of the network an operator is, for the layer policy."""
    return adm.role_of(name.removeprefix("unet."))


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
    if bert_text.recognise(state):
        told = ByText(examples=facts.prompts or PROMPTS, guidance=TEXT_GUIDANCE)
        return ByContext(unet), inside, told, bert_text.load(state, path)
    raise AccuQuantError(
        f"{path}: the U-Net reads a context of width {width} and the file holds neither an embedding of classes nor a "
        "text encoder that is known (CompVis's BERTEmbedder)"
    )


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
            {
                **params,
                **{k: heads[k] for k in ("num_heads", "num_head_channels") if k in heads},
                "prompts": read.get("prompts", ()),
            }
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
