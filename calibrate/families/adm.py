"""OpenAI guided-diffusion checkpoints: the flat state dict of a `.pt` file in, DiffusionModel out.

The keys give the network's shape, but neither the picture's size, nor the noise schedule, nor how qkv is cut into
heads. That comes from a table of the published models, or from a YAML file beside the checkpoint (or `--config`) that
holds the flags of the repository's scripts:

    image_size: 64
    noise_schedule: linear             # or cosine
    diffusion_steps: 1000
    num_head_channels: 64              # or num_heads: 4
    use_new_attention_order: false     # qkv rows: false [per head q, k, v], true [all q, all k, all v]

Both orders have the same shapes, so a wrong one loads and samples noise; nothing in the file tells. A learned variance
is left out: its half of the last convolution is dropped, since no sampler here reads it.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from ...runtime.bundle import ByClass
from ...runtime.errors import AccuQuantError
from ..checkpoint import load_weights
from ..model import DiffusionModel
from ..roles import Roles
from .adm_unet import AdmConfig, AdmUNet

NAME = "openai/guided-diffusion U-Net"


class Facts(BaseModel):
    """What the keys do not say, in the words of the repository's flags; other flags are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    image_size: int = Field(gt=0)
    noise_schedule: Literal["linear", "cosine"] = "linear"
    diffusion_steps: int = Field(default=1000, gt=0)
    num_heads: int = 4
    num_head_channels: int = -1
    use_new_attention_order: bool = False


# model_channels, channel_mult, num_res_blocks -> the published models of that shape (their model card's flags).
PUBLISHED: Mapping[tuple[int, tuple[float, ...], int], Facts] = {
    (192, (1, 2, 3, 4), 3): Facts(
        image_size=64, noise_schedule="cosine", num_head_channels=64, use_new_attention_order=True
    ),
    (256, (1, 1, 2, 3, 4), 2): Facts(image_size=128, num_heads=4),
    (256, (1, 1, 2, 2, 4, 4), 2): Facts(image_size=256, num_head_channels=64),  # ImageNet, and LSUN
    (256, (0.5, 1, 1, 2, 2, 4, 4), 2): Facts(image_size=512, num_head_channels=64),
}


def recognise(stored: Any) -> dict[str, Tensor] | None:
    """The state dict, if `stored` is of this layout."""
    if not isinstance(stored, Mapping):
        return None
    state = {str(k): v for k, v in stored.items() if isinstance(v, Tensor)}
    signature = ("time_embed.0.weight", "input_blocks.0.0.weight", "middle_block.1.qkv.weight", "out.2.weight")
    return state if all(key in state for key in signature) else None


def load(state: Mapping[str, Tensor], path: Path, config: Path | None) -> DiffusionModel:
    """Build the network that the keys describe and load them strictly.

    Raises:
        AccuQuantError: no configuration, one that contradicts the keys, a classifier, or weights missing, left over or
            not finite.
    """
    classes = len(state["label_emb.weight"]) if "label_emb.weight" in state else None
    shape = shape_from_keys(state, path)
    facts, source = _facts(path, config, shape)
    channels = state["input_blocks.0.0.weight"].shape[1]
    if state["out.2.weight"].shape[0] not in (channels, 2 * channels):
        raise AccuQuantError(
            f"{path}: {channels} channels in and {state['out.2.weight'].shape[0]} out; as many or, with a learned "
            "variance, twice as many are expected"
        )
    network_config = AdmConfig(
        **shape,
        in_channels=channels,
        out_channels=channels,
        classes=classes,
        head_channels=facts.num_head_channels,
        heads=facts.num_heads if facts.num_head_channels == -1 else None,
    )
    _check(network_config, facts, source)
    network = AdmUNet(network_config)
    weights = dict(state)
    weights["out.2.weight"], weights["out.2.bias"] = (weights[f"out.2.{k}"][:channels] for k in ("weight", "bias"))
    for name in [k for k in weights if re.search(r"\.(qkv|proj_out)\.weight$", k) and weights[k].ndim == 3]:
        weights[name] = weights[name][..., None]  # a convolution over positions, as one over the picture
    if not facts.use_new_attention_order:
        for name in [k for k in weights if re.search(r"\.qkv\.(weight|bias)$", k)]:
            weights[name] = sort_qkv(weights[name], network_config)
    load_weights(network, weights, path)
    millions, size = sum(p.numel() for p in network.parameters()) / 1e6, facts.image_size
    kinds = f", {classes} classes" if classes else ""
    order = "new" if facts.use_new_attention_order else "legacy"
    return DiffusionModel(
        family="adm",
        found=f"{NAME}, {millions:.2f} M parameters, {channels}x{size}x{size}{kinds}, {order} qkv order, "
        f"configuration from {source}",
        network=network.eval().requires_grad_(False),
        sample_shape=(channels, size, size),
        noise_schedule={
            "num_train_timesteps": facts.diffusion_steps,
            "beta_start": 1e-4 * 1000 / facts.diffusion_steps,
            "beta_end": 0.02 * 1000 / facts.diffusion_steps,
            "beta_schedule": {"linear": "linear", "cosine": "squaredcos_cap_v2"}[facts.noise_schedule],
            "prediction_type": "epsilon",
            "timestep_spacing": "leading",
            "steps_offset": 0,
        },
        role_of=role_of,
        block_of=block_of,
        default_sampler="ddim",
        default_steps=50,
        # None of the classes stands for none: these models were guided by a classifier.
        conditioning=ByClass(classes=classes) if classes else None,
    )


def sort_qkv(rows: Tensor, config: AdmConfig) -> Tensor:
    """From [per head q, k, v] to [all q, all k, all v], on axis 0 of a weight or bias."""
    channels = len(rows) // 3
    heads = config.heads_of(channels)
    return rows.reshape(heads, 3, channels // heads, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape)


LABEL = r"label_emb\..+"  # of XL, which is told a picture's size; a class is an embedding and no operator
role_of = Roles(
    first=r"input_blocks\.0\.0",
    last=r"out\.2",
    time=(r"time_embed\..+", LABEL, r".+\.emb_layers\..+"),
    attention=(r".+\.qk", r".+\.av"),
    sometimes=frozenset({LABEL}),
)


def block_of(name: str) -> str:
    """The residual, attention or resampling block an operator belongs to, or the operator itself."""
    found = re.match(r"((input_blocks|output_blocks)\.\d+\.\d+|middle_block\.\d+)\.", name)
    return found[1] if found else name


def shape_from_keys(state: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """Channels, levels, blocks and attention, read off names and shapes; what AdmConfig calls them.

    The way up tells all: a level ends where a stage has an upsampler behind its residual block.
    """
    stages: dict[int, set[int]] = {}
    for key in state:
        if found := re.match(r"output_blocks\.(\d+)\.(\d+)\.", key):
            stages.setdefault(int(found[1]), set()).add(int(found[2]))

    def upsampler(n: int) -> str | None:
        for j in sorted(stages[n] - {0}):
            for kind, key in (("block", "in_layers.2.weight"), ("conv", "conv.weight")):
                if f"output_blocks.{n}.{j}.{key}" in state:
                    return kind
        return None

    if sorted(stages) != list(range(len(stages))) or not stages:
        raise AccuQuantError(f"{path}: stages are missing among its output_blocks; copy the checkpoint again")
    ends = [n for n in sorted(stages) if upsampler(n)]
    levels = len(ends) + 1
    per_level = ends[0] + 1 if ends else len(stages)
    if len(stages) != levels * per_level or any((n + 1) % per_level for n in ends):
        raise AccuQuantError(f"{path}: {len(stages)} output_blocks do not make {levels} levels; copy it again")
    try:
        model_channels = state["time_embed.0.weight"].shape[1]
        first = [(levels - 1 - level) * per_level for level in range(levels)]
        widths = [state[f"output_blocks.{n}.0.out_layers.3.weight"].shape[0] for n in first]
        embedding = state["middle_block.0.emb_layers.1.weight"].shape[0]
        return {
            "model_channels": model_channels,
            "channel_mult": tuple(w / model_channels for w in widths),
            "num_res_blocks": per_level - 1,
            "attention": tuple(i for i, n in enumerate(first) if f"output_blocks.{n}.1.norm.weight" in state),
            "resblock_updown": not ends or upsampler(ends[0]) == "block",
            "scale_shift_norm": embedding == 2 * state["middle_block.0.out_layers.3.weight"].shape[0],
        }
    except KeyError as error:
        raise AccuQuantError(f"{path}: {error.args[0]} is missing; copy the checkpoint again") from error


def _facts(path: Path, config: Path | None, shape: Mapping[str, Any]) -> tuple[Facts, str]:
    beside = next((p for p in (path.with_suffix(".yml"), path.with_suffix(".yaml")) if p.exists()), None)
    chosen = config or beside
    if chosen is None:
        known = PUBLISHED.get((shape["model_channels"], shape["channel_mult"], shape["num_res_blocks"]))
        if known is None:
            raise AccuQuantError(
                f"{path}: its keys say neither how large the pictures are nor how qkv is ordered; put the training "
                f"flags beside it as {path.with_suffix('.yml').name}, or name the file with --config"
            )
        return known, f"the published {known.image_size}x{known.image_size} model"
    try:
        read = yaml.safe_load(chosen.read_text())
        return Facts.model_validate(read), chosen.name
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise AccuQuantError(f"{chosen} cannot be read as YAML: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"])) or "the file"
        raise AccuQuantError(
            f"{chosen}: {name}: {first['msg']}; flags of guided-diffusion's scripts expected"
        ) from error


def _check(config: AdmConfig, facts: Facts, source: str) -> None:
    levels = len(config.channel_mult)
    if facts.image_size % 2 ** (levels - 1):
        raise AccuQuantError(f"{source}: image_size {facts.image_size} cannot be halved {levels - 1} times")
    flag = "num_heads" if facts.num_head_channels == -1 else "num_head_channels"
    divisor = getattr(facts, flag)
    for level in (*config.attention, levels - 1):
        width = config.width(level)
        if divisor < 1 or width % divisor:
            raise AccuQuantError(f"{source}: {flag} {divisor} does not divide the {width} channels of level {level}")
