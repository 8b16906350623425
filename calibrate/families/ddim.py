"""DDPM and DDIM checkpoints in the layout of ermongroup/ddim: `.ckpt` in, DiffusionModel out.

Two forms exist: the flat EMA state dict that people pass around, and the five-item list [model, optimizer, epoch, step,
ema] that training writes, of which the EMA weights are taken. The keys give the network's shape, all but the picture's
size; that and the noise schedule come from the YAML file beside the checkpoint, from `--config`, or, for the published
models, from a table.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from ...runtime.errors import AccuQuantError
from ..checkpoint import load_weights
from ..model import DiffusionModel
from ..roles import Roles
from .ddim_unet import UNet, UNetConfig

NAME = "ermongroup/ddim U-Net"

# ch, ch_mult, in_channels -> picture size, for the models their authors published; linear betas 1e-4..0.02, T = 1000.
PUBLISHED: Mapping[tuple[int, tuple[int, ...], int], tuple[str, int]] = {
    (128, (1, 2, 2, 2), 3): ("CIFAR-10", 32),
    (128, (1, 2, 2, 2, 4), 3): ("CelebA", 64),
    (128, (1, 1, 2, 2, 4, 4), 3): ("LSUN", 256),
}


def recognise(stored: Any) -> dict[str, Tensor] | None:
    """The EMA state dict, if `stored` is of this layout."""
    if isinstance(stored, list) and len(stored) == 5 and isinstance(stored[4], Mapping):
        stored = stored[4]
    if not isinstance(stored, Mapping):
        return None
    state = {str(k).removeprefix("module."): v for k, v in stored.items() if isinstance(v, Tensor)}
    signature = ("temb.dense.0.weight", "conv_in.weight", "down.0.block.0.temb_proj.weight", "conv_out.weight")
    return state if all(key in state for key in signature) else None


def load(state: Mapping[str, Tensor], path: Path, config: Path | None) -> DiffusionModel:
    """Build the network that the keys describe and load them strictly.

    Raises:
        AccuQuantError: no configuration, one that contradicts the keys, or weights missing, left over or not finite.
    """
    ch, ch_mult, blocks, attention_levels = shape_from_keys(state)
    in_channels, out_channels = state["conv_in.weight"].shape[1], state["conv_out.weight"].shape[0]
    if out_channels != in_channels:
        raise AccuQuantError(
            f"{path}: the network has {in_channels} channels in and {out_channels} out; "
            "a learned variance is not supported for this family"
        )
    facts, source = _configuration(path, config, (ch, ch_mult, in_channels))
    size = _positive_integer(facts, "data", "image_size", source)
    diffusion = _diffusion(facts, source)
    if diffusion.get("beta_schedule", "linear") != "linear":
        raise AccuQuantError(f"{source}: beta_schedule {diffusion['beta_schedule']!r}; this family uses 'linear'")
    if size % 2 ** (len(ch_mult) - 1):
        raise AccuQuantError(f"{source}: image_size {size} cannot be halved {len(ch_mult) - 1} times")
    network = UNet(
        UNetConfig(
            resolution=size,
            in_channels=in_channels,
            out_ch=out_channels,
            ch=ch,
            ch_mult=ch_mult,
            num_res_blocks=blocks,
            attn_resolutions=tuple(size >> level for level in attention_levels),
            resamp_with_conv="down.0.downsample.conv.weight" in state or len(ch_mult) == 1,
        )
    )
    load_weights(network, state, path)
    millions = sum(p.numel() for p in network.parameters()) / 1e6
    return DiffusionModel(
        family="ddim",
        found=f"{NAME}, {millions:.2f} M parameters, {in_channels}x{size}x{size}, configuration from {source}",
        network=network.eval().requires_grad_(False),
        sample_shape=(in_channels, size, size),
        noise_schedule={
            "num_train_timesteps": diffusion["num_diffusion_timesteps"],
            "beta_start": diffusion["beta_start"],
            "beta_end": diffusion["beta_end"],
            "beta_schedule": "linear",
            "prediction_type": "epsilon",
            "timestep_spacing": "leading",
            "steps_offset": 0,
        },
        role_of=role_of,
        block_of=block_of,
        default_sampler="ddim",
        default_steps=50,
    )


role_of = Roles(
    first="conv_in",
    last="conv_out",
    time=(r"temb\..+", r".+\.temb_proj"),
    attention=(r".*attn(_1)?(\.\d+)?\.qk", r".*attn(_1)?(\.\d+)?\.av"),
)


def block_of(name: str) -> str:
    """The residual or attention block an operator belongs to, or the operator itself."""
    found = re.match(r"((down|up)\.\d+\.(block|attn)\.\d+|mid\.(block|attn)_\d+)\.", name)
    return found[1] if found else name


def shape_from_keys(state: Mapping[str, Tensor]) -> tuple[int, tuple[int, ...], int, tuple[int, ...]]:
    """ch, ch_mult, num_res_blocks and the levels with attention, read off names and shapes."""
    ch = state["conv_in.weight"].shape[0]
    levels = 1 + max(int(m[1]) for key in state if (m := re.match(r"down\.(\d+)\.", key)))
    blocks = 1 + max(int(m[1]) for key in state if (m := re.match(r"down\.0\.block\.(\d+)\.", key)))
    mult = tuple(
        state[f"down.{i}.block.0.conv1.weight"].shape[0] // ch if f"down.{i}.block.0.conv1.weight" in state else 0
        for i in range(levels)
    )
    attention = tuple(i for i in range(levels) if f"down.{i}.attn.0.q.weight" in state)
    if 0 in mult:
        raise AccuQuantError(f"level {mult.index(0)} of the network is missing from the checkpoint; copy it again")
    return ch, mult, blocks, attention


def _configuration(
    path: Path, config: Path | None, shape: tuple[int, tuple[int, ...], int]
) -> tuple[dict[str, Any], str]:
    beside = next((p for p in (path.with_suffix(".yml"), path.with_suffix(".yaml")) if p.exists()), None)
    chosen = config or beside
    if chosen is None:
        if shape in PUBLISHED:
            name, size = PUBLISHED[shape]
            return {"data": {"image_size": size}}, f"the published {name} model"
        raise AccuQuantError(
            f"{path}: the keys do not say how large the pictures are; put the model's YAML beside it as "
            f"{path.with_suffix('.yml').name}, or name it with --config"
        )
    try:
        facts = yaml.safe_load(chosen.read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise AccuQuantError(f"{chosen} cannot be read as YAML: {error}") from error
    if not isinstance(facts, dict) or not isinstance(facts.get("data"), dict):
        raise AccuQuantError(f"{chosen} has no `data:` section; expected the configuration form of ermongroup/ddim")
    return facts, chosen.name


def _diffusion(facts: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The `diffusion:` section over the published defaults, its numbers checked."""
    given = facts.get("diffusion") or {}
    if not isinstance(given, dict):
        raise AccuQuantError(f"{source}: `diffusion:` is {given!r}; a section with beta_start, beta_end is expected")
    values = {"num_diffusion_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02} | given
    for key, kind in (("num_diffusion_timesteps", int), ("beta_start", float), ("beta_end", float)):
        try:
            values[key] = kind(values[key])  # YAML reads 1e-4 as text
        except (TypeError, ValueError):
            values[key] = -1
        if not values[key] > 0:
            raise AccuQuantError(f"{source}: diffusion.{key} is {given.get(key)!r}; a positive number is expected")
    return values


def _positive_integer(facts: Mapping[str, Any], section: str, key: str, source: str) -> int:
    value = facts.get(section, {}).get(key)
    if not isinstance(value, int) or value < 1:
        raise AccuQuantError(f"{source}: {section}.{key} is {value!r}; a positive whole number is expected")
    return value
