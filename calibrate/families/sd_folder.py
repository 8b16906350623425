"""Stable Diffusion 1 and 2 as folders of diffusers: weights under CompVis's names, settings from config.json.

One set of networks serves both layouts. What the settings may ask for beyond Stable Diffusion's own network is refused
by the setting's name; a YAML named with --config may hold `prompts`, what to calibrate with.
"""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from tokenizers import Tokenizer as Library
from torch import Tensor

from ...runtime.bundle import ByText
from ...runtime.errors import AccuQuantError
from ..checkpoint import load_weights
from ..folder import Folder, Part
from ..model import DiffusionModel, TextEncoder
from . import clip_text, clip_tokenizer
from .adm_unet import AdmConfig, AdmUNet
from .autoencoder_kl import find_decoder
from .diffusers_names import renamed, unet_names
from .from_diffusers import Sampling, check_settings, options, sampling, settings_of
from .ldm import ByContext, adaptable, block_of, check_channels, role_of
from .ldm_facts import PROMPTS

NAME = "Stable Diffusion folder of diffusers"
UNET, TEXT = "UNet2DConditionModel", "CLIPTextModel"
# Settings that change the network, and the only value that ours has.
SAME: Mapping[str, object] = {
    "act_fn": "silu", "norm_num_groups": 32, "norm_eps": 1e-5, "center_input_sample": False, "flip_sin_to_cos": True,
    "freq_shift": 0, "downsample_padding": 1, "mid_block_type": "UNetMidBlock2DCrossAttn", "class_embed_type": None,
    "num_class_embeds": None, "dual_cross_attention": False, "only_cross_attention": False, "encoder_hid_dim": None,
    "resnet_time_scale_shift": "default", "time_embedding_type": "positional", "attention_type": "default",
    "conv_in_kernel": 3, "conv_out_kernel": 3, "mid_block_scale_factor": 1, "addition_embed_type": None,
}  # fmt: skip
BLOCKS = {"CrossAttnDownBlock2D": True, "DownBlock2D": False, "CrossAttnUpBlock2D": True, "UpBlock2D": False}
APPROXIMATE = {"quick_gelu": True, "gelu": False}
USUAL = Sampling(
    {
        "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "prediction_type": "epsilon", "timestep_spacing": "leading", "steps_offset": 1,
    },
    "ddim",
)  # fmt: skip


class Options(BaseModel):
    """What a folder does not say."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompts: tuple[str, ...] = ()


def recognise(stored: Any) -> Folder | None:
    """The folder, if its denoiser is a U-Net under a context."""
    return stored if isinstance(stored, Folder) and stored.part(UNET) is not None else None


def load(folder: Folder, path: Path, config: Path | None) -> DiffusionModel:
    """Build the networks that the settings describe and load them strictly.

    Raises:
        AccuQuantError: a setting that is not supported, a part that is missing, or weights missing, left over or not
            finite.
    """
    part, text_part = folder.part(UNET), folder.part(TEXT)
    assert part is not None
    made = unet_config(part)
    chosen = options(config, Options)
    if text_part is None:
        raise AccuQuantError(f"{path} holds no text encoder ({TEXT}); the whole pipeline's folder is expected")
    with torch.device("meta"):
        network = ByContext(AdmUNet(made))
    load_weights(network, unet_weights(part, made), part.path)
    text = TextEncoder(text_network(text_part), read_tokenizer(path / "tokenizer", text_length(text_part)))
    schedule = sampling(folder, USUAL)
    decoder, remark = find_decoder(folder)
    (size,) = settings_of(part, "sample_size")
    millions = sum(p.numel() for p in network.parameters()) / 1e6
    return DiffusionModel(
        family="ldm",
        found=f"{NAME}, {millions:.2f} M parameters, latent {made.in_channels}x{size}x{size}, of text, predicts "
        f"{schedule.noise_schedule.get('prediction_type', 'epsilon')}, {remark}",
        network=network.eval().requires_grad_(False),
        sample_shape=(made.in_channels, size, size),
        noise_schedule=schedule.noise_schedule,
        role_of=role_of,
        block_of=block_of,
        default_sampler=schedule.sampler,
        default_steps=50,
        conditioning=ByText(examples=chosen.prompts or PROMPTS, guidance=clip_text.GUIDANCE),
        text=text,
        decoder=decoder,
        adaptable=partial(adaptable, network, text),
    )


def unet_weights(part: Part, made: AdmConfig) -> dict[str, Tensor]:
    """Under the names of a network that keeps its U-Net as `unet`."""
    ours = {v: k for k, v in unet_names(len(made.channel_mult), made.num_res_blocks, made.attention).items()}
    stored = part.weights()
    return {f"unet.{renamed(key, ours) or key}": stored[key] for key in stored}


def unet_config(part: Part, same: Mapping[str, object] = SAME) -> AdmConfig:
    """The network that config.json describes; `same` has settings of which one value is supported."""
    where = part.path / "config.json"
    check_settings(part, same)
    channels, out, blocks, context = settings_of(
        part, "in_channels", "out_channels", "layers_per_block", "cross_attention_dim"
    )
    check_channels(channels, out, where)
    widths = part.config["block_out_channels"]
    down, up = part.config["down_block_types"], part.config["up_block_types"]
    unknown = [kind for kind in (*down, *up) if kind not in BLOCKS]
    attention = tuple(level for level, kind in enumerate(down) if BLOCKS.get(kind))
    if unknown or attention != tuple(level for level, kind in enumerate(reversed(up)) if BLOCKS[kind]):
        raise AccuQuantError(
            f"{where}: its blocks are {', '.join((*down, *up))}; known: {', '.join(BLOCKS)}, the same up as down"
        )
    heads = part.config.get("num_attention_heads") or part.config.get("attention_head_dim", 8)  # a number of heads
    per_level = heads if isinstance(heads, list) else [heads] * len(widths)
    fits = len(per_level) == len(widths) and not any(
        width % count for width, count in zip(widths, per_level, strict=False)
    )
    wide = {width // count for width, count in zip(widths, per_level, strict=False)}
    if not fits or (len(set(per_level)) > 1 and len(wide) > 1):
        raise AccuQuantError(f"{where}: {per_level} heads of levels {widths} wide; as many or as wide ones are known")
    depth = part.config.get("transformer_layers_per_block", 1)
    if not isinstance(depth, int) and [type(blocks) for blocks in depth] != [int] * len(widths):
        raise AccuQuantError(
            f"{where}: transformer_layers_per_block is {depth}; a number is expected, or one for each of "
            f"{len(widths)} levels"
        )
    return AdmConfig(
        in_channels=channels,
        out_channels=channels,
        model_channels=widths[0],
        channel_mult=tuple(width / widths[0] for width in widths),
        num_res_blocks=blocks,
        attention=attention,
        head_channels=wide.pop() if len(set(per_level)) > 1 else -1,
        heads=per_level[0] if len(set(per_level)) == 1 else None,
        resblock_updown=False,
        scale_shift_norm=False,
        context=context,
        depth=depth if isinstance(depth, int) else tuple(depth),
        linear_projection=part.config.get("use_linear_projection", False),
    )


def text_length(part: Part) -> int:
    return settings_of(part, "max_position_embeddings")[0]


def text_network(part: Part) -> clip_text.ClipText:
    """The text encoder of config.json and the weights beside it."""
    activation = part.config.get("hidden_act", "quick_gelu")
    if activation not in APPROXIMATE:
        raise AccuQuantError(
            f"{part.path / 'config.json'}: hidden_act is {activation!r}; known: {', '.join(APPROXIMATE)}"
        )
    stored = part.weights()
    return clip_text.build_network(
        clip_text.own_names({key: stored[key] for key in stored}),
        part.path,
        approximate=APPROXIMATE[activation],
        heads=settings_of(part, "num_attention_heads")[0],
        epsilon=part.config.get("layer_norm_eps", 1e-5),
    )


def read_tokenizer(folder: Path, length: int) -> str:
    """As transformers saved it, made to pad and truncate to `length`."""
    try:
        said: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if (folder / name).exists():
                said |= json.loads((folder / name).read_text())
        padding = said.get("pad_token") or clip_tokenizer.END
        padding = padding["content"] if isinstance(padding, dict) else str(padding)
        if (folder / "merges.txt").exists():
            lines = [line.split() for line in (folder / "merges.txt").read_text().splitlines()]
            merges = [(pair[0], pair[1]) for pair in lines if len(pair) == 2 and pair[0] != "#version:"]
            tokens = json.loads((folder / "vocab.json").read_text())
            return clip_tokenizer.tokenizer_json(merges, tokens, length, padding)
        library = Library.from_file(str(folder / "tokenizer.json"))
        library.enable_truncation(length)
        library.enable_padding(length=length, pad_id=library.get_vocab()[padding], pad_token=padding)
        return str(library.to_str())
    except Exception as error:  # the library raises nothing narrower
        raise AccuQuantError(f"{folder} is no CLIP tokenizer as transformers saves it ({error})") from error
