"""The U-Net of DDPM and DDIM, in the parameter layout of the ermongroup/ddim repository.

    eps = UNet(x_t, t),     x_t in R^{B,C,H,W},  t in {0..T-1}^B

Residual blocks (GroupNorm, SiLU, 3x3 convolution, time embedding added between the two convolutions), single-head
self-attention at chosen resolutions, strided convolutions down, nearest-neighbour up, skips concatenated on channels.
Ho et al., "Denoising Diffusion Probabilistic Models", 2020, appendix B; Song et al., "Denoising Diffusion Implicit
Models", 2021. Parameter names equal the checkpoint's, so loading is a strict `load_state_dict` and nothing more.
"""

import math
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import MatMul

GROUPS = 32
NORM_EPS = 1e-6


@dataclass(frozen=True)
class UNetConfig:
    """Shape of the network; the names are those of the repository's YAML files."""

    resolution: int
    in_channels: int
    out_ch: int
    ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    attn_resolutions: tuple[int, ...]
    dropout: float = 0.0
    resamp_with_conv: bool = True


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoids of t (B,) as (B, dim): first all sines, then all cosines, frequencies 10000^(-i / (dim/2 - 1))."""
    half = dim // 2
    rate = torch.exp(torch.arange(half, dtype=torch.float32, device=t.device) * (-math.log(10000) / (half - 1)))
    angle = t.float()[:, None] * rate[None, :]
    return F.pad(torch.cat([angle.sin(), angle.cos()], dim=1), (0, dim % 2))


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, channels, eps=NORM_EPS)


class ResBlock(nn.Module):
    """x -> shortcut(x) + conv2(drop(silu(norm2(conv1(silu(norm1(x))) + temb))))."""

    def __init__(self, channels_in: int, channels_out: int, temb_channels: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = group_norm(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.temb_proj = nn.Linear(temb_channels, channels_out)
        self.norm2 = group_norm(channels_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else None

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.temb_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return cast(Tensor, h + (x if self.nin_shortcut is None else self.nin_shortcut(x)))


class Attention(nn.Module):
    """Single-head self-attention over the H*W positions, with a residual connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)
        self.qk = MatMul()
        self.av = MatMul()

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        h = self.norm(x)
        q, k, v = (proj(h).flatten(2) for proj in (self.q, self.k, self.v))  # (B, C, HW)
        weight = torch.softmax(self.qk(q.transpose(1, 2), k) * channels**-0.5, dim=2)  # (B, HW query, HW key)
        out = self.av(weight, v.transpose(1, 2)).transpose(1, 2)
        return cast(Tensor, x + self.proj_out(out.reshape(batch, channels, height, width)))


class Downsample(nn.Module):
    """Halve the resolution; one row and column of zeros on the far side only, as the original pads."""

    def __init__(self, channels: int, with_conv: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2) if with_conv else None

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2) if self.conv is None else cast(Tensor, self.conv(F.pad(x, (0, 1, 0, 1))))


class Upsample(nn.Module):
    """Double the resolution by repetition, then smooth with a convolution."""

    def __init__(self, channels: int, with_conv: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if with_conv else None

    def forward(self, x: Tensor) -> Tensor:
        h = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return h if self.conv is None else cast(Tensor, self.conv(h))


class Level(nn.Module):
    """One resolution of the U-Net: its residual blocks, their attentions (or none) and the resampler (or none)."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleList()
        self.attn = nn.ModuleList()
        self.downsample: Downsample | None = None
        self.upsample: Upsample | None = None

    def run(self, index: int, h: Tensor, temb: Tensor) -> Tensor:
        h = self.block[index](h, temb)
        return cast(Tensor, self.attn[index](h)) if len(self.attn) else h


class UNet(nn.Module):
    """The denoiser: x (B, in_channels, H, W) float32 and t (B,) float32 to eps (B, out_ch, H, W)."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        ch, temb_ch, levels = config.ch, config.ch * 4, len(config.ch_mult)

        self.temb = nn.Module()
        self.temb.dense = nn.ModuleList([nn.Linear(ch, temb_ch), nn.Linear(temb_ch, temb_ch)])
        self.conv_in = nn.Conv2d(config.in_channels, ch, 3, padding=1)

        def level(channels: list[tuple[int, int]], resolution: int) -> Level:
            made = Level()
            for c_in, c_out in channels:
                made.block.append(ResBlock(c_in, c_out, temb_ch, config.dropout))
                if resolution in config.attn_resolutions:
                    made.attn.append(Attention(c_out))
            return made

        width = [ch * m for m in config.ch_mult]
        skips, h, resolution = [ch], ch, config.resolution
        self.down = nn.ModuleList()
        for i in range(levels):
            pairs = [(h if j == 0 else width[i], width[i]) for j in range(config.num_res_blocks)]
            down = level(pairs, resolution)
            skips += [width[i]] * config.num_res_blocks
            h = width[i]
            if i < levels - 1:
                down.downsample = Downsample(h, config.resamp_with_conv)
                skips.append(h)
                resolution //= 2
            self.down.append(down)

        self.mid = nn.Module()
        self.mid.block_1 = ResBlock(h, h, temb_ch, config.dropout)
        self.mid.attn_1 = Attention(h)
        self.mid.block_2 = ResBlock(h, h, temb_ch, config.dropout)

        ups: list[Level] = []
        for i in reversed(range(levels)):
            pairs = []
            for _ in range(config.num_res_blocks + 1):
                pairs.append((h + skips.pop(), width[i]))
                h = width[i]
            up = level(pairs, resolution)
            if i > 0:
                up.upsample = Upsample(h, config.resamp_with_conv)
                resolution *= 2
            ups.append(up)
        self.up = nn.ModuleList(reversed(ups))  # the layout counts levels from the full resolution, both ways

        self.norm_out = group_norm(h)
        self.conv_out = nn.Conv2d(h, config.out_ch, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        first, second = self.temb.dense  # type: ignore[misc]
        temb = second(F.silu(first(timestep_embedding(t, self.config.ch))))

        h = self.conv_in(x)
        skips = [h]
        for down in cast(list[Level], list(self.down)):
            for i in range(len(down.block)):
                h = down.run(i, h, temb)
                skips.append(h)
            if down.downsample is not None:
                h = down.downsample(h)
                skips.append(h)

        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h, temb)), temb)  # type: ignore[operator]
        for up in cast(list[Level], list(self.up)[::-1]):
            for i in range(len(up.block)):
                h = up.run(i, torch.cat([h, skips.pop()], dim=1), temb)
            if up.upsample is not None:
                h = up.upsample(h)
        return cast(Tensor, self.conv_out(F.silu(self.norm_out(h))))
