"""What the keys of a latent diffusion model do not say: data for published models, a YAML for others.

How large latents are, the noise schedule, how attention is cut into heads, what is predicted. Stable Diffusion 2 was
published twice with the same keys, predicting noise (512 pixels) and v (768 pixels); the weights tell which it is.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from ...runtime.errors import AccuQuantError
from ..trajectory import Condition
from .adm_unet import AdmConfig

PREDICTIONS: Mapping[str, str] = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}


class Facts(BaseModel):
    """In the words of the repository's YAML; other entries are ignored."""

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
    guidance: float | None = Field(default=None, ge=0)


@dataclass(frozen=True)
class Published:
    """Models of one shape of keys: `facts`, and `otherwise` of those that predict no noise."""

    name: str
    facts: Facts
    otherwise: Facts | None = None


def _ldm(size: int, end: float, **heads: int) -> Facts:
    return Facts.model_validate({"image_size": size, "linear_start": 0.0015, "linear_end": end, **heads})


_SD = Facts(image_size=64, linear_start=0.00085, linear_end=0.012, scale_factor=0.18215)
_SD2 = _SD.model_copy(update={"num_head_channels": 64})

# model_channels, channel_mult, context width -> the published models of that shape.
PUBLISHED: dict[tuple[int, tuple[float, ...], int | None], Published] = {
    (224, (1, 2, 3, 4), None): Published("LDM-4 of LSUN, FFHQ and CelebA-HQ", _ldm(64, 0.0195, num_head_channels=32)),
    (192, (1, 2, 2, 4, 4), None): Published("LDM-8 of LSUN churches", _ldm(32, 0.0155, num_heads=8)),
    (192, (1, 2, 3, 5), 512): Published("LDM-4 of ImageNet", _ldm(64, 0.0195, num_heads=1)),
    (320, (1, 2, 4, 4), 768): Published("Stable Diffusion 1", _SD.model_copy(update={"num_heads": 8})),
    (320, (1, 2, 4, 4), 1024): Published(
        "Stable Diffusion 2", _SD2, _SD2.model_copy(update={"parameterization": "v", "image_size": 96})
    ),
}

# What a model of text is calibrated with where its YAML names nothing.
PROMPTS = (
    "a red apple on a wooden table", "a portrait of an old man with a beard", "a city street at night in the rain",
    "a small house by a lake in autumn", "an oil painting of a sailing ship", "two dogs playing on a beach",
    "a bowl of soup with vegetables", "a castle on a hill at sunrise", "a yellow car in front of a brick wall",
    "a close-up photograph of a flower", "an astronaut riding a horse", "a bookshelf full of old books",
    "a cat sleeping on a sofa", "snowy mountains under a blue sky", "a drawing of a bicycle", "people in a busy market",
)  # fmt: skip


def read_facts(
    path: Path, config: Path | None, shape: Mapping[str, Any], context: int | None
) -> tuple[Facts, str, Facts | None]:
    """Facts, where they come from, and those that hold instead if the network predicts no noise.

    Raises:
        AccuQuantError: neither published nor a YAML, or a YAML that cannot be read.
    """
    beside = next((p for p in (path.with_suffix(".yml"), path.with_suffix(".yaml")) if p.exists()), None)
    chosen = config or beside
    if chosen is None:
        known = PUBLISHED.get((shape["model_channels"], shape["channel_mult"], context))
        if known is None:
            raise AccuQuantError(
                f"{path}: its keys say neither how large latents are nor what the noise schedule is; put its "
                f"training's YAML beside it as {path.with_suffix('.yaml').name}, or name the file with --config"
            )
        return known.facts, f"the published {known.name}", known.otherwise
    try:
        read = yaml.safe_load(chosen.read_text())
        params = read["model"]["params"]
        heads = params["unet_config"]["params"]
        facts = Facts.model_validate(
            {
                **params,
                **{k: heads[k] for k in ("num_heads", "num_head_channels") if k in heads},
                **{k: read[k] for k in ("prompts", "guidance") if k in read},
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
    return facts, chosen.name, None


def check_facts(config: AdmConfig, facts: Facts, source: str) -> None:
    """Raises AccuQuantError if facts contradict the shape that the keys give."""
    if facts.parameterization not in PREDICTIONS:
        raise AccuQuantError(f"{source}: parameterization {facts.parameterization!r}; known: {', '.join(PREDICTIONS)}")
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


@torch.no_grad()
def returned_noise(network: nn.Module, channels: int, size: int, last: int, condition: Condition) -> float:
    """The share of its input that a trained network gives back at its last timestep, where that is all but noise.

    One that predicts noise gives it back (1). One that predicts v = a e - s x_0, with a^2 + s^2 = 1, gives at most
    a / s of it, 0.07 in Stable Diffusion's schedule, beside a picture; one that predicts the picture less still.
    """
    x = torch.randn(1, channels, size, size, generator=torch.Generator().manual_seed(0))
    made = network(x, torch.tensor([float(last)]), **condition)
    return float(((x - x.mean()) * made).mean() / x.var(correction=0))
