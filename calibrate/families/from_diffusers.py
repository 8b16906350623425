"""What all of diffusers' transformer folders have in common: settings, scheduler, options, and loading their network.

The scheduler's settings become the noise schedule, its class the default sampler. Where a family has no network of its
own here, diffusers' class is built from config.json without memory and takes the weights one by one; its linear layers
and convolutions are quantized in place, its attention (scaled_dot_product_attention) stays in float.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from pydantic import BaseModel, ValidationError
from torch import Tensor, nn

from ...runtime.errors import AccuQuantError
from ..checkpoint import load_weights
from ..folder import Folder, Part
from ..trace import FLOW, FROM_ONE, IMAGE_TOKENS, SAMPLERS

Options = TypeVar("Options", bound=BaseModel)


@dataclass(frozen=True)
class Sampling:
    """diffusers' scheduler settings, and the sampler (a key of SAMPLERS) that its scheduler is."""

    noise_schedule: Mapping[str, Any]
    sampler: str


def holding(kind: str) -> Callable[[Any], Folder | None]:
    """A family's `recognise`: the folder, if what is stored is one with a network of that class."""
    return lambda stored: stored if isinstance(stored, Folder) and stored.part(kind) is not None else None


def sampling(folder: Folder, usual: Sampling) -> Sampling:
    """The folder's own schedule; `usual` where it holds no scheduler, and its sampler where that one is not known."""
    scheduler = next((part for part in folder.parts.values() if part.kind.endswith("Scheduler")), None)
    if scheduler is None:
        return usual
    settings = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    fitting = [
        name
        for name, sampler in SAMPLERS.items()
        if sampler.scheduler == scheduler.kind
        and all(settings.get(setting) == value for setting, value in sampler.config.items())
    ]
    # The most particular one, such as PLMS of the PNDM schedulers; of equals the first.
    chosen = max(fitting, key=lambda name: len(SAMPLERS[name].config), default=usual.sampler)
    return Sampling(settings, chosen)


def flow_sampling(folder: Folder, usual: Sampling, tokens: int, *, from_one: bool = False) -> Sampling:
    """Like `sampling`, of networks that flow matching trained, on pictures of that many tokens.

    `from_one`: the pipeline spaces the shares of noise evenly from 1 to 1 / steps, whatever the scheduler does.
    """
    found = sampling(folder, usual)
    known = {"prediction_type": FLOW, IMAGE_TOKENS: tokens, FROM_ONE: from_one}
    return Sampling({**found.noise_schedule, **known}, found.sampler)


def pixels(folder: Folder, size: int) -> int:
    """Height and width of the picture of a latent: eight times as much, unless the folder's decoder says otherwise."""
    decoder = folder.part("AutoencoderKL")
    levels = len(decoder.config.get("block_out_channels", ())) if decoder is not None else 0
    return size * (2 ** (levels - 1) if levels else 8)


def check_settings(part: Part, expected: Mapping[str, Any]) -> None:
    """Raises AccuQuantError if a setting has another value than the only one that is supported; absent is fine."""
    for name, value in expected.items():
        if part.config.get(name, value) != value:
            raise AccuQuantError(
                f"{part.path / 'config.json'}: {name} is {part.config[name]!r}; only {value!r} is supported"
            )


def settings_of(part: Part, *names: str) -> list[int]:
    """Settings that are positive whole numbers.

    Raises:
        AccuQuantError: one is missing or no such number.
    """
    found = [part.config.get(name) for name in names]
    for name, value in zip(names, found, strict=True):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise AccuQuantError(
                f"{part.path / 'config.json'}: {name} is {value!r}; a positive whole number is expected"
            )
    return [int(value) for value in found if value is not None]


def options(config: Path | None, kind: type[Options]) -> Options:
    """What a YAML named with --config chooses, where the folder leaves a choice.

    Raises:
        AccuQuantError: no such file, no YAML, or an entry that is not known.
    """
    if config is None:
        return kind()
    known = ", ".join(kind.model_fields)
    try:
        return kind.model_validate(yaml.safe_load(config.read_text()) or {})
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise AccuQuantError(f"{config} cannot be read as YAML: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise AccuQuantError(f"{config}: {name}: {first['msg']}; of such a folder may be chosen: {known}") from error


def build_empty(kind: str, part: Part, **changes: Any) -> nn.Module:
    """diffusers' network of that class as config.json has it, on the meta device; `changes` replace settings.

    Raises:
        AccuQuantError: settings that diffusers does not know, or refuses.
    """
    settings = {name: value for name, value in part.config.items() if not name.startswith("_")}
    try:
        with torch.device("meta"):
            network: nn.Module = _diffusers("diffusers", kind)(**{**settings, **changes})
    except (TypeError, ValueError, NotImplementedError, ZeroDivisionError) as error:
        raise AccuQuantError(f"{part.path / 'config.json'}: diffusers' {part.kind} refuses it ({error})") from error
    return network.eval()


def positions(width: int, side: int, scale: float = 1.0) -> Tensor:
    """diffusers' positions of a square of patches: (side^2, width), float64."""
    embed = _diffusers("diffusers.models.embeddings", "get_2d_sincos_pos_embed")
    made: Tensor = embed(width, side, base_size=side, interpolation_scale=scale)
    return made


def _diffusers(module: str, name: str) -> Any:
    """Imported when a folder is loaded: diffusers' models take seconds, which other checkpoints should not wait for."""
    return getattr(importlib.import_module(module), name)


def fill(network: nn.Module, part: Part, weights: Mapping[str, Tensor]) -> None:
    """Load the weights strictly and freeze them.

    Raises:
        AccuQuantError: weights missing, left over, of another shape or not finite.
    """
    load_weights(network, weights, part.path)
    left = [name for name, value in network.named_buffers() if value.is_meta]
    assert not left, f"{left[0]} is neither stored nor computed"
    network.requires_grad_(False)


def without_variance(last: Tensor, channels: int, out: int, patch: int) -> Tensor:
    """A last layer's rows (patch^2 out, ...) without those of a learned variance: (patch^2 channels, ...)."""
    rows = last.reshape(patch**2, out, *last.shape[1:])
    return rows[:, :channels].reshape(-1, *last.shape[1:])
