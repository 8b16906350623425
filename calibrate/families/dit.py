"""Diffusion transformers in the layout of facebookresearch/DiT: `.pt` in, DiffusionModel out.

A released file is a flat state dict; training writes {model, ema, opt, args}, of which the EMA weights are taken. The
keys tell everything but the number of heads, which is known for the published widths and read from a YAML beside the
checkpoint (or `--config`) otherwise:

    num_heads: 6

The networks work on latents; their autoencoder is not part of the file. A learned variance is left out: its rows of the
last layer are dropped, since no sampler here reads it. Guidance moves all channels; the original's own sampling script
moves three of the four, for the sake of its published numbers.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from ...runtime.bundle import ByClass
from ...runtime.errors import AccuQuantError
from ..checkpoint import load_weights
from ..model import DiffusionModel
from ..roles import Roles
from .dit_net import DiT, DitConfig

NAME = "facebookresearch/DiT"
HEADS: Mapping[int, int] = {384: 6, 768: 12, 1024: 16, 1152: 16}  # by width: DiT-S, B, L and XL
GUIDANCE = 4.0  # of the original's sampling script


def recognise(stored: Any) -> dict[str, Tensor] | None:
    """The (EMA) state dict, if `stored` is of this layout."""
    if isinstance(stored, Mapping) and isinstance(stored.get("ema"), Mapping):
        stored = stored["ema"]
    if not isinstance(stored, Mapping):
        return None
    state = {str(k).removeprefix("module."): v for k, v in stored.items() if isinstance(v, Tensor)}
    signature = (
        "pos_embed",
        "x_embedder.proj.weight",
        "y_embedder.embedding_table.weight",
        "final_layer.linear.weight",
    )
    return state if all(key in state for key in signature) else None


def load(state: Mapping[str, Tensor], path: Path, config: Path | None) -> DiffusionModel:
    """Build the network that the keys describe and load them strictly.

    Raises:
        AccuQuantError: unknown number of heads, keys that contradict each other, or weights missing, left over or not
            finite.
    """
    return assemble(state, shape_from_keys(state, path, _heads(path, config, state["pos_embed"].shape[2])), path, NAME)


def assemble(state: Mapping[str, Tensor], shape: DitConfig, path: Path, name: str) -> DiffusionModel:
    """The model of that shape with these weights, its learned variance left out; `name` is whose layout they came in.

    Raises:
        AccuQuantError: other channels out than in, or weights missing, left over or not finite.
    """
    network = DiT(shape)
    weights = dict(state)
    rows = shape.patch**2
    for kind in ("weight", "bias"):
        last = weights[f"final_layer.linear.{kind}"]
        whole = last.reshape(rows, -1, *last.shape[1:])
        if whole.shape[1] not in (shape.channels, 2 * shape.channels):
            raise AccuQuantError(
                f"{path}: {shape.channels} channels in and {whole.shape[1]} out; as many or, with a learned variance, "
                "twice as many are expected"
            )
        weights[f"final_layer.linear.{kind}"] = whole[:, : shape.channels].reshape(-1, *last.shape[1:])
    load_weights(network, weights, path)
    millions = sum(p.numel() for p in network.parameters()) / 1e6
    return DiffusionModel(
        family="dit",
        found=f"{name}, {millions:.2f} M parameters, latent {shape.channels}x{shape.size}x{shape.size}, "
        f"{shape.classes} classes, {shape.heads} heads",
        network=network.eval().requires_grad_(False),
        sample_shape=(shape.channels, shape.size, shape.size),
        noise_schedule={
            "num_train_timesteps": 1000,
            "beta_start": 1e-4,
            "beta_end": 0.02,
            "beta_schedule": "linear",
            "prediction_type": "epsilon",
            "timestep_spacing": "leading",
            "steps_offset": 0,
        },
        role_of=role_of,
        block_of=block_of,
        default_sampler="ddim",
        default_steps=50,
        conditioning=ByClass(classes=shape.classes, null=shape.classes, guidance=GUIDANCE),
    )


role_of = Roles(
    first=r"x_embedder\.proj",
    last=r"final_layer\.linear",
    time=(r"t_embedder\..+", r"(.+\.)?adaLN_modulation\..+"),
    attention=(r".+\.qk", r".+\.av"),
)


def block_of(name: str) -> str:
    """The transformer block an operator belongs to, or the operator itself."""
    found = re.match(r"blocks\.\d+", name)
    return found[0] if found else name


def shape_from_keys(state: Mapping[str, Tensor], path: Path, heads: int) -> DitConfig:
    """The network's shape, read off names and shapes."""
    tokens, width = state["pos_embed"].shape[1:]
    _, channels, patch, _ = state["x_embedder.proj.weight"].shape
    side = math.isqrt(tokens)
    depth = 1 + max((int(m[1]) for key in state if (m := re.match(r"blocks\.(\d+)\.", key))), default=-1)
    if side * side != tokens or "blocks.0.mlp.fc1.weight" not in state:
        raise AccuQuantError(f"{path}: {tokens} positions and {depth} blocks make no transformer; copy it again")
    if width % heads:
        raise AccuQuantError(f"{path}: {heads} heads do not divide the width of {width}; see num_heads in its YAML")
    return DitConfig(
        size=side * patch,
        patch=patch,
        channels=channels,
        width=width,
        depth=depth,
        heads=heads,
        hidden=len(state["blocks.0.mlp.fc1.weight"]),
        classes=len(state["y_embedder.embedding_table.weight"]) - 1,
    )


def _heads(path: Path, config: Path | None, width: int) -> int:
    beside = next((p for p in (path.with_suffix(".yml"), path.with_suffix(".yaml")) if p.exists()), None)
    chosen = config or beside
    if chosen is None:
        if width in HEADS:
            return HEADS[width]
        raise AccuQuantError(
            f"{path}: its keys do not say how many heads a block of width {width} has; write num_heads into "
            f"{path.with_suffix('.yml').name} beside it, or into a file named with --config"
        )
    try:
        found = yaml.safe_load(chosen.read_text())
        heads = found.get("num_heads", HEADS.get(width)) if isinstance(found, Mapping) else None
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise AccuQuantError(f"{chosen} cannot be read as YAML: {error}") from error
    if not isinstance(heads, int) or isinstance(heads, bool) or heads < 1:
        raise AccuQuantError(f"{chosen}: num_heads is {heads!r}; a positive whole number is expected")
    return heads
