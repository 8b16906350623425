"""Stable Diffusion XL as a folder of diffusers: settings, scheduler and tokenizers from where it keeps them.

The networks are those of the single file under other names (sdxl.py, which has also the choices of a `--config` YAML).
What the absent prompt is - zeros, or the encoded empty text - follows `force_zeros_for_empty_prompt` of the folder's
model_index.json, true where that says nothing, as in diffusers.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...runtime.errors import AccuQuantError
from ..folder import Folder, Part
from ..model import DiffusionModel, TextEncoder
from .autoencoder_kl import find_decoder
from .from_diffusers import options, sampling, settings_of
from .sd_folder import SAME, TEXT, UNET, read_tokenizer, text_length, text_network, unet_config, unet_weights
from .sdxl import USUAL, Choice, assemble
from .sdxl_text import join, marks_of

NAME = "Stable Diffusion XL folder of diffusers"
ADDED = "text_time"
TEXT_2 = "CLIPTextModelWithProjection"
PROJECTION = "text_projection.weight"


def recognise(stored: Any) -> Folder | None:
    """The folder, if its U-Net is told of a text as a whole and of sizes."""
    part = stored.part(UNET) if isinstance(stored, Folder) else None
    return stored if part is not None and part.config.get("addition_embed_type") == ADDED else None


def load(folder: Folder, path: Path, config: Path | None) -> DiffusionModel:
    """Build the networks that the settings describe and load them strictly.

    Raises:
        AccuQuantError: another model of such parts, a setting that is not supported, a part that is missing, or weights
            missing, left over or not finite, or too many for this machine's memory.
    """
    part = folder.part(UNET)
    assert part is not None
    _refuse_others(folder)
    chosen = options(config, Choice)
    vector, size = settings_of(part, "projection_class_embeddings_input_dim", "sample_size")
    made = replace(unet_config(part, {**SAME, "addition_embed_type": ADDED}), vector=vector)
    part.weights().check_memory()
    decoder, words = find_decoder(folder)
    return assemble(
        made,
        unet_weights(part, made),
        _text(folder, path),
        decoder,
        schedule=sampling(folder, USUAL),
        chosen=chosen,
        size=chosen.size or size,
        zeros=bool(folder.settings.get("force_zeros_for_empty_prompt", True)),
        found=f"{NAME}, {words}",
        path=part.path,
    )


def _refuse_others(folder: Folder) -> None:
    if folder.settings.get("requires_aesthetics_score"):
        raise AccuQuantError(
            f"{folder.path}: Stable Diffusion XL's refiner, which works on the base model's latents and paints none of "
            "its own, is not supported; export the base model's folder"
        )
    odd = next((part.kind for part in folder.parts.values() if part.kind.startswith("EDM")), None)
    if odd is not None:
        raise AccuQuantError(
            f"{folder.path}: its scheduler is {odd}; models of the EDM kind (Playground 2.5, CosXL) are not supported, "
            "use an SDXL that predicts noise or v"
        )


def _text(folder: Folder, path: Path) -> TextEncoder:
    kinds: Mapping[str, str] = {"text_encoder": TEXT, "text_encoder_2": TEXT_2}
    parts = [folder.parts.get(name) for name in kinds]
    missing = [f"{name} ({kind})" for (name, kind), part in zip(kinds.items(), parts, strict=True) if part is None]
    if missing:
        raise AccuQuantError(f"{path} holds no {missing[0]}; the whole pipeline's folder is expected")
    near, far = (part for part in parts if part is not None)
    tokenizer, other = (
        read_tokenizer(path / name, text_length(part)) for name, part in (("tokenizer", near), ("tokenizer_2", far))
    )
    if _words(tokenizer) != _words(other):
        raise AccuQuantError(f"{path}: tokenizer and tokenizer_2 have other words; the base model's have the same")
    paddings = tuple(str(json.loads(text)["padding"]["pad_token"]) for text in (tokenizer, other))
    marks = marks_of(tokenizer, (paddings[0], paddings[1]), path)
    first, second = text_network(near), text_network(far)
    return TextEncoder(join(first, second, _projection(far), marks, far.path), tokenizer)


def _words(tokenizer: str) -> Any:
    return json.loads(tokenizer)["model"]["vocab"]


def _projection(part: Part) -> Any:
    stored = part.weights()
    if PROJECTION not in stored:
        raise AccuQuantError(f"{part.path}: {PROJECTION} is missing; copy the folder again")
    return stored[PROJECTION]
