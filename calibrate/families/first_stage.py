"""The first stage of latent diffusion: from latents back to pictures, in CompVis's parameter layout.

    picture = decoder( post_quant_conv( z / scale + shift ) ),     with a codebook: to its nearest entries first

of AutoencoderKL and of VQModelInterface; CompVis's models have no shift. Only what decodes is built; the encoder is
not needed to sample.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...runtime.errors import AccuQuantError
from ..checkpoint import load_weights

GROUPS, EPSILON = 32, 1e-6


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, channels, eps=EPSILON)


class Residual(nn.Module):
    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(channels_in), nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2, self.conv2 = norm(channels_out), nn.Conv2d(channels_out, channels_out, 3, padding=1)
        if channels_in != channels_out:
            self.nin_shortcut = nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return cast(Tensor, h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x))


class Attention(nn.Module):
    """One head over all positions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))
        weight = torch.softmax(q @ k.transpose(1, 2) * q.shape[2] ** -0.5, dim=-1)
        return cast(Tensor, x + self.proj_out((weight @ v).transpose(1, 2).reshape(x.shape)))


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest")))


class Level(nn.Module):
    """A resolution of the way up: residual blocks, attention behind each where there is any, twice the size at last."""

    def __init__(self, channels_in: int, channels_out: int, blocks: int, attends: bool, upsamples: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(Residual(channels_out if i else channels_in, channels_out) for i in range(blocks))
        self.attn = nn.ModuleList(Attention(channels_out) for _ in range(blocks if attends else 0))
        if upsamples:
            self.upsample = Upsample(channels_out)

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            x = self.attn[i](x) if len(self.attn) else x
        return cast(Tensor, self.upsample(x)) if hasattr(self, "upsample") else x


class Network(nn.Module):
    """The original's Decoder; `up` holds levels from full resolution to the latent's, run from the last."""

    def __init__(self, channels: int, widths: list[int], blocks: int, attention: set[int], out: int) -> None:
        super().__init__()
        deepest = widths[-1]
        self.conv_in = nn.Conv2d(channels, deepest, 3, padding=1)
        self.mid = nn.ModuleDict(
            {"block_1": Residual(deepest, deepest), "attn_1": Attention(deepest), "block_2": Residual(deepest, deepest)}
        )
        self.up = nn.ModuleList(
            Level(widths[min(i + 1, len(widths) - 1)], widths[i], blocks, i in attention, i > 0)
            for i in range(len(widths))
        )
        self.norm_out, self.conv_out = norm(widths[0]), nn.Conv2d(widths[0], out, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.conv_in(z)
        for part in self.mid.values():
            h = part(h)
        for level in reversed(self.up):
            h = level(h)
        return cast(Tensor, self.conv_out(F.silu(self.norm_out(h))))


class Decoder(nn.Module):
    """Latents (B, C, H, W) as the denoiser makes them to pictures (B, 1 or 3, fH, fW), about in [-1, 1]."""

    def __init__(
        self, network: Network, post_quant_conv: nn.Conv2d, codebook: nn.Embedding | None, scale: float, shift: float
    ) -> None:
        super().__init__()
        self.decoder, self.post_quant_conv, self.scale, self.shift = network, post_quant_conv, scale, shift
        if codebook is not None:
            self.quantize = nn.ModuleDict({"embedding": codebook})

    def forward(self, z: Tensor) -> Tensor:
        z = z / self.scale + self.shift
        if hasattr(self, "quantize"):
            entries = cast(nn.Embedding, self.quantize["embedding"]).weight
            flat = z.permute(0, 2, 3, 1)
            # |z - e|^2 without |z|^2, which is the same for all entries
            index = (entries.square().sum(1) - 2 * (flat @ entries.T)).argmin(-1)
            z = F.embedding(index, entries).permute(0, 3, 1, 2)
        return cast(Tensor, self.decoder(self.post_quant_conv(z)))


def load_decoder(state: Mapping[str, Tensor], scale: float, path: Path, shift: float = 0.0) -> Decoder:
    """Build the decoder that the keys (without `first_stage_model.`) describe and load it strictly.

    Raises:
        AccuQuantError: keys of another layout, or weights missing, left over or not finite.
    """
    kept = {k: v for k, v in state.items() if re.match(r"(decoder|post_quant_conv|quantize\.embedding)\.", k)}
    try:
        channels_out, channels = kept["post_quant_conv.weight"].shape[:2]
        levels = 1 + max(int(m[1]) for k in kept if (m := re.match(r"decoder\.up\.(\d+)\.", k)))
        blocks = 1 + max(int(m[1]) for k in kept if (m := re.match(r"decoder\.up\.0\.block\.(\d+)\.", k)))
        widths = [len(kept[f"decoder.up.{i}.block.0.conv1.weight"]) for i in range(levels)]
        out = len(kept["decoder.conv_out.weight"])
    except (KeyError, ValueError) as error:
        raise AccuQuantError(f"{path}: its first stage is no AutoencoderKL or VQModelInterface ({error})") from None
    attention = {i for i in range(levels) if f"decoder.up.{i}.attn.0.norm.weight" in kept}
    entries = kept.get("quantize.embedding.weight")
    decoder = Decoder(
        Network(channels_out, widths, blocks, attention, out),
        nn.Conv2d(channels, channels_out, 1),
        None if entries is None else nn.Embedding(*entries.shape),
        scale,
        shift,
    )
    load_weights(decoder, kept, path)
    return decoder.eval().requires_grad_(False)
