"""The ADM U-Net, in the parameter layout of openai/guided-diffusion (and of what descends from it).

    o = UNet(x_t, t),     x_t in R^{B,C,H,W},  t in {0..T-1}^B

Residual blocks (GroupNorm, SiLU, 3x3 convolution; the time embedding scales and shifts the second norm, or is added
before it), multi-head self-attention at chosen levels, resampling by residual blocks or by convolutions, skips
concatenated on channels. Dhariwal and Nichol, "Diffusion Models Beat GANs on Image Synthesis", 2021. Parameter names
equal the checkpoint's. Two liberties: 1x1 convolutions over positions are written over pictures, so that they quantize
like all others, and qkv has one order of rows, [q | k | v] with heads inside; `adm.py` sorts checkpoints of the other.
"""

import math
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import MatMul
from .spatial_transformer import SpatialTransformer

GROUPS = 32


@dataclass(frozen=True)
class AdmConfig:
    """Shape of the network. `attention` holds levels, counted from full resolution; heads have `head_channels` each.

    `heads` fixes the number of heads instead, at every level. With a `context` of that width, attention is a spatial
    transformer of `depth` blocks (spatial_transformer.py), as latent diffusion has it: one number, or one for each
    level, the last of which is the middle's. With a `vector` of that width an MLP takes the place of classes.
    """

    in_channels: int
    out_channels: int
    model_channels: int
    channel_mult: tuple[float, ...]
    num_res_blocks: int
    attention: tuple[int, ...]
    head_channels: int = 64
    heads: int | None = None
    resblock_updown: bool = True
    scale_shift_norm: bool = True
    classes: int | None = None
    vector: int | None = None
    context: int | None = None
    depth: int | tuple[int, ...] = 1
    linear_projection: bool = False

    def width(self, level: int) -> int:
        return int(self.channel_mult[level] * self.model_channels)

    def heads_of(self, channels: int) -> int:
        return self.heads or channels // self.head_channels

    def depth_of(self, level: int) -> int:
        return self.depth if isinstance(self.depth, int) else self.depth[level]


def timestep_embedding(t: Tensor, dim: int, shift: int = 0) -> Tensor:
    """Sinusoids of t (B,) as (B, dim): first all cosines, then all sines, frequencies 10000^(-i / (dim/2 - shift))."""
    half = dim // 2
    rate = torch.exp(torch.arange(half, dtype=torch.float32, device=t.device) * (-math.log(10000) / (half - shift)))
    angle = t.float()[:, None] * rate[None, :]
    return F.pad(torch.cat([angle.cos(), angle.sin()], dim=1), (0, dim % 2))


class ResBlock(nn.Module):
    """Two convolutions around the time embedding; with `resample`, the block halves or doubles the resolution."""

    def __init__(
        self, channels_in: int, channels_out: int, temb: int, scale_shift: bool, resample: float | None = None
    ) -> None:
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        self.in_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, channels_in), nn.SiLU(), nn.Conv2d(channels_in, channels_out, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(temb, channels_out * (2 if scale_shift else 1)))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, channels_out),
            nn.SiLU(),
            nn.Identity(),  # the original's dropout
            nn.Conv2d(channels_out, channels_out, 3, padding=1),
        )
        self.skip_connection: nn.Module = (
            nn.Identity() if channels_in == channels_out else nn.Conv2d(channels_in, channels_out, 1)
        )

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, act, conv = self.in_layers
        h = act(norm(x))
        if self.resample is not None:
            h, x = resample(h, self.resample), resample(x, self.resample)
        h = conv(h)
        e = self.emb_layers(emb)[:, :, None, None]
        norm, act, _, conv = self.out_layers
        if self.scale_shift:
            scale, shift = e.chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + e)
        return cast(Tensor, self.skip_connection(x) + conv(act(h)))


def resample(x: Tensor, factor: float) -> Tensor:
    """Mean of 2x2 pixels for a factor below 1, repetition above."""
    return F.avg_pool2d(x, 2) if factor < 1 else F.interpolate(x, scale_factor=2.0, mode="nearest")


class Attention(nn.Module):
    """Multi-head self-attention over the H*W positions, with a residual connection."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)
        self.qk = MatMul()
        self.av = MatMul()

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        depth = channels // self.heads
        q, k, v = self.qkv(self.norm(x)).reshape(batch, 3, self.heads, depth, height * width).unbind(1)
        weight = torch.softmax(self.qk(q.transpose(2, 3), k) * depth**-0.5, dim=-1)  # (B, heads, HW query, HW key)
        out = self.av(weight, v.transpose(2, 3)).transpose(2, 3)
        return cast(Tensor, x + self.proj_out(out.reshape(batch, channels, height, width)))


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.op(x))


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.conv(resample(x, 2)))


class Stage(nn.ModuleList):
    """One entry of the original's input or output blocks: modules in a row, of which residual blocks see the time."""

    def run(self, h: Tensor, emb: Tensor, context: Tensor | None = None) -> Tensor:
        for module in self:
            if isinstance(module, ResBlock):
                h = module(h, emb)
            else:
                h = module(h, context) if isinstance(module, SpatialTransformer) else module(h)
        return h


class AdmUNet(nn.Module):
    """The denoiser: x (B, in_channels, H, W) float32, t (B,) float32 to (B, out_channels, H, W).

    With `classes` also y (B,) int64, with a `vector` y (B, vector) float32, whose embedding is added to the timestep's;
    with a context that, (B, T, width).
    """

    def __init__(self, config: AdmConfig) -> None:
        super().__init__()
        self.config = config
        temb, levels = 4 * config.model_channels, len(config.channel_mult)
        self.time_embed = nn.Sequential(nn.Linear(config.model_channels, temb), nn.SiLU(), nn.Linear(temb, temb))
        if config.classes is not None:
            self.label_emb: nn.Module = nn.Embedding(config.classes, temb)
        elif config.vector is not None:
            inner = nn.Sequential(nn.Linear(config.vector, temb), nn.SiLU(), nn.Linear(temb, temb))
            self.label_emb = nn.Sequential(inner)  # the original nests it

        def block(channels_in: int, channels_out: int, factor: float | None = None) -> ResBlock:
            return ResBlock(channels_in, channels_out, temb, config.scale_shift_norm, factor)

        def attend(level: int) -> nn.Module:
            channels = config.width(level)
            heads = config.heads_of(channels)
            if config.context is None:
                return Attention(channels, heads)
            depth = config.depth_of(level)
            return SpatialTransformer(channels, config.context, heads, depth, config.linear_projection)

        h = config.width(0)
        self.input_blocks = nn.ModuleList([Stage([nn.Conv2d(config.in_channels, h, 3, padding=1)])])
        skips = [h]
        for level in range(levels):
            for _ in range(config.num_res_blocks):
                stage = Stage([block(h, config.width(level))])
                h = config.width(level)
                if level in config.attention:
                    stage.append(attend(level))
                self.input_blocks.append(stage)
                skips.append(h)
            if level < levels - 1:
                self.input_blocks.append(Stage([block(h, h, 0.5) if config.resblock_updown else Downsample(h)]))
                skips.append(h)

        self.middle_block = Stage([block(h, h), attend(levels - 1), block(h, h)])

        self.output_blocks = nn.ModuleList()
        for level in reversed(range(levels)):
            for i in range(config.num_res_blocks + 1):
                stage = Stage([block(h + skips.pop(), config.width(level))])
                h = config.width(level)
                if level in config.attention:
                    stage.append(attend(level))
                if level and i == config.num_res_blocks:
                    stage.append(block(h, h, 2.0) if config.resblock_updown else Upsample(h))
                self.output_blocks.append(stage)
        self.out = nn.Sequential(nn.GroupNorm(GROUPS, h), nn.SiLU(), nn.Conv2d(h, config.out_channels, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        emb = self.time_embed(timestep_embedding(t, self.config.model_channels))
        if y is not None:
            emb = emb + self.label_emb(y)
        h, skips = x, []
        for stage in cast(list[Stage], list(self.input_blocks)):
            h = stage.run(h, emb, context)
            skips.append(h)
        h = self.middle_block.run(h, emb, context)
        for stage in cast(list[Stage], list(self.output_blocks)):
            h = stage.run(torch.cat([h, skips.pop()], dim=1), emb, context)
        return cast(Tensor, self.out(h))
