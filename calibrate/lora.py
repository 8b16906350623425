"""LoRA: low-rank changes of a model's weights, fused into them before anything is calibrated (Hu et al., 2021).

    W <- W + w (alpha / rank) up down

Read are safetensors files as kohya's scripts name their layers (`lora_unet_down_blocks_0_...lora_down.weight`), and as
diffusers and PEFT do (`unet.down_blocks.0....lora_A.weight`, and the older spellings). A key that finds no layer is an
error: a LoRA that is fused in part is another one.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..runtime.errors import AccuQuantError
from .model import DiffusionModel

METADATA = "lora_adapter_metadata"  # where diffusers keeps PEFT's settings
# PEFT's settings that change the sum above, and the value under which they do not.
PLAIN: Mapping[str, object] = {"alpha_pattern": {}, "rank_pattern": {}, "use_rslora": False, "use_dora": False}
OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
PARTS = ("unet", "text_encoder_2", "text_encoder")  # a longer name before its beginning
SHOWN = 5  # names in a message


@dataclass(frozen=True)
class Lora:
    """A file, and how much of its change is wanted."""

    path: Path
    weight: float = 1.0


def parse_lora(text: str) -> Lora:
    """From `FILE` or `FILE:WEIGHT`.

    Raises:
        AccuQuantError: a weight that is not finite.
    """
    path, colon, weight = text.rpartition(":")
    try:
        lora = Lora(Path(path), float(weight)) if colon else Lora(Path(text))
    except ValueError:  # the colon belongs to the file's name
        lora = Lora(Path(text))
    if not -100 <= lora.weight <= 100:
        raise AccuQuantError(f"--lora {text}: a weight of {lora.weight:g} is out of range; 0.5 to 1 is usual")
    return lora


def with_loras(model: DiffusionModel, loras: Sequence[Lora]) -> DiffusionModel:
    """The model with these fused into its weights, in place, one after another.

    Raises:
        AccuQuantError: a model that takes none, a file that is none, layers that the model lacks or of other shapes.
    """
    for lora in loras:
        layers = model.adaptable()
        if not layers:
            raise AccuQuantError(f"{lora.path}: models of the family {model.family!r} take no LoRA; leave --lora out")
        count = _fuse(lora, layers)
        model = replace(model, found=f"{model.found}; LoRA {lora.path.name} x {lora.weight:g} in {count} layers")
    return model


@torch.no_grad()
def _fuse(lora: Lora, adaptable: Mapping[str, nn.Module]) -> int:
    tensors, settings = _read(lora.path)
    weights = {_flat(name): cast(Tensor, module.weight) for name, module in adaptable.items()}
    changes: dict[str, dict[str, Tensor]] = {}
    lost: list[str] = []
    for key, value in tensors.items():
        layer, part = _layer_and_part(key)
        if part is None or _flat(layer) not in weights:
            lost.append(key)
        else:
            changes.setdefault(_flat(layer), {})[part] = value
    halves = [layer for layer, parts in changes.items() if not {"down", "up"} <= parts.keys()]
    if lost or halves or not changes:
        what = "find no layer in this model" if lost else "lack their other half" if halves else "are not there at all"
        shown = sorted(lost or halves)
        more = f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else ""
        raise AccuQuantError(
            f"{lora.path}: {len(shown)} of {len(tensors)} keys {what}: {', '.join(shown[:SHOWN])}{more}; it belongs to "
            "another kind of model, or is of a kind that is not supported (LoHa, LoKr, DoRA)"
        )
    for layer, parts in changes.items():
        weight = weights[layer]
        down, up = parts["down"].float(), parts["up"].float()
        fits = up.flatten(1).shape == (len(weight), len(down)) and down[0].numel() == weight[0].numel()
        if not fits:
            raise AccuQuantError(
                f"{lora.path}: {layer} changes {len(up)}x{down[0].numel()} weights by rank {len(down)}, the model's "
                f"are {len(weight)}x{weight[0].numel()}; it belongs to another kind of model"
            )
        scale = float(parts["alpha"]) / len(down) if "alpha" in parts else settings(layer)
        weight.add_((up.flatten(1) @ down.flatten(1)).reshape(weight.shape).to(weight), alpha=lora.weight * scale)
        if not torch.isfinite(weight).all():
            raise AccuQuantError(f"{lora.path}: {layer} is not finite; the file is damaged")
    return len(changes)


def _read(path: Path) -> tuple[dict[str, Tensor], Callable[[str], float]]:
    """Its tensors, and alpha / rank of a layer, which is 1 where nothing is said."""
    try:
        with safe_open(path, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (no mapping)
            said = json.loads((opened.metadata() or {}).get(METADATA, "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise AccuQuantError(f"{path} is not a readable LoRA; a .safetensors file is expected ({error})") from error
    scales = {}
    for part in PARTS:
        odd = [name for name, plain in PLAIN.items() if (said.get(f"{part}.{name}") or plain) != plain]
        if odd:
            raise AccuQuantError(f"{path}: its {part} was trained with {odd[0]}, which is not supported")
        alpha, rank = said.get(f"{part}.lora_alpha"), said.get(f"{part}.r")
        scales[part] = alpha / rank if alpha and rank else 1.0
    return tensors, lambda layer: scales[next(part for part in PARTS if layer.startswith(part))]


def _layer_and_part(key: str) -> tuple[str, str | None]:
    """The layer as diffusers names it (of kohya's as it stands there), and what of it the key holds."""
    name = re.sub(r"^lora_te1?_", "text_encoder_", re.sub(r"^lora_unet_", "unet_", key))
    name = re.sub(r"^lora_te2_", "text_encoder_2_", name)
    name = re.sub(r"^base_model\.model\.", "", name).replace(".processor.", ".")
    if not name.startswith(("unet", "text_encoder")):
        name = f"text_encoder.{name}" if name.startswith("text_model.") else f"unet.{name}"
    if name.endswith(".alpha"):
        return name.removesuffix(".alpha"), "alpha"
    old = re.match(r"(.*)\.(to_q|to_k|to_v|to_out)_lora\.(down|up)\.weight$", name)
    if old:
        inner = old[2] if name.startswith("unet") else OLD_TEXT[old[2]]
        return f"{old[1]}.{inner}" + (".0" if inner == "to_out" else ""), old[3]
    now = re.match(r"(.*)\.(?:lora_|lora\.|lora_linear_layer\.)(A|B|down|up)(?:\.default)?\.weight$", name)
    return (now[1], {"A": "down", "B": "up"}.get(now[2], now[2])) if now else (name, None)


def _flat(name: str) -> str:
    """kohya writes dots as underscores."""
    return name.replace(".", "_")
