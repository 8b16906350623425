"""diffusers' AutoencoderKL as the first stage of latent diffusion: its decoder's weights under CompVis's names.

    picture = decoder( z / scaling_factor + shift_factor )

The two are one network. What its settings may ask for beside that (other blocks, other norms) has no counterpart here.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ..folder import Folder, Part
from .first_stage import Decoder, load_decoder

KIND = "AutoencoderKL"
# Settings that change the network, and the only value that the first stage knows.
SAME: Mapping[str, object] = {"norm_num_groups": 32, "act_fn": "silu", "mid_block_add_attention": True}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
ATTENTION |= {"query": "q", "key": "k", "value": "v", "proj_attn": "proj_out"}  # as old files have it


def find_decoder(folder: Folder) -> tuple[Decoder | None, str]:
    """The folder's decoder, or None and why there is none, in words for the person who gave the folder.

    Raises:
        AccuQuantError: weights missing, left over or not finite.
    """
    part = folder.part(KIND)
    if part is None:
        return None, "no decoder in the folder"
    odd = [name for name, value in SAME.items() if part.config.get(name, value) != value]
    odd += [kind for kind in part.config.get("up_block_types", ()) if kind != "UpDecoderBlock2D"]
    return (None, f"its decoder left out ({odd[0]})") if odd else (_decoder(part), "KL decoder")


def _decoder(part: Part) -> Decoder:
    stored = part.weights()
    kept = {k: stored[k] for k in stored if k.startswith(("decoder.", "post_quant_conv."))}
    weights = _renamed(kept)
    if not part.config.get("use_post_quant_conv", True):
        channels = kept["decoder.conv_in.weight"].shape[1]
        weights["post_quant_conv.weight"] = torch.eye(channels)[..., None, None]
        weights["post_quant_conv.bias"] = torch.zeros(channels)
    scale, shift = part.config.get("scaling_factor") or 1.0, part.config.get("shift_factor") or 0.0
    return load_decoder(weights, float(scale), part.path, float(shift))


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Levels counted from full resolution, and attention's linear layers as 1x1 convolutions."""
    top = max((int(m[1]) for k in state if (m := re.match(r"decoder\.up_blocks\.(\d+)\.", k))), default=0)
    made: dict[str, Tensor] = {}
    for key, value in state.items():
        name = re.sub(r"\.up_blocks\.(\d+)\.resnets\.", lambda m: f".up.{top - int(m[1])}.block.", key)
        name = re.sub(r"\.up_blocks\.(\d+)\.upsamplers\.0\.", lambda m: f".up.{top - int(m[1])}.upsample.", name)
        name = re.sub(r"\.mid_block\.resnets\.(\d+)\.", lambda m: f".mid.block_{1 + int(m[1])}.", name)
        name = name.replace(".conv_norm_out.", ".norm_out.").replace(".conv_shortcut.", ".nin_shortcut.")
        if found := re.match(r"(decoder)\.mid_block\.attentions\.0\.(.+)\.(weight|bias)$", name):
            name = f"{found[1]}.mid.attn_1.{ATTENTION.get(found[2], found[2])}.{found[3]}"
            value = value[..., None, None] if value.ndim == 2 else value
        made[name] = value
    return made
