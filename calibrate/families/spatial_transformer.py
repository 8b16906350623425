"""The spatial transformer of latent diffusion, in CompVis's parameter layout: positions attend to all and to a context.

    x + proj_out( blocks( proj_in( norm(x) ) ) ),     block: h + attn1(h);  h + attn2(h, c);  h + ff(h), on norms of h

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", 2022. Its group norm has epsilon 1e-6,
where the residual blocks around it have 1e-5. Attention's products are modules, so that they quantize like all others.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import MatMul

GROUPS = 32


class CrossAttention(nn.Module):
    """Attention of tokens (B, N, width) to a context (B, T, context), or to themselves."""

    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context, width, bias=False)
        self.to_v = nn.Linear(context, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width))  # the original's second is dropout
        self.qk, self.av = MatMul(), MatMul()

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (
            made.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for made in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        weight = torch.softmax(self.qk(q, k.transpose(2, 3)) * q.shape[3] ** -0.5, dim=-1)
        return cast(Tensor, self.to_out(self.av(weight, v).transpose(1, 2).flatten(2)))


class Gated(nn.Module):
    """GEGLU: the first half of a projection, by GELU of the second."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return cast(Tensor, value * F.gelu(gate))


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(Gated(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.net(x))


class TransformerBlock(nn.Module):
    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.attn1 = CrossAttention(width, width, heads)
        self.attn2 = CrossAttention(width, context, heads)
        self.ff = FeedForward(width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        own = self.norm1(x)
        x = x + self.attn1(own, own)
        x = x + self.attn2(self.norm2(x), context)
        return cast(Tensor, x + self.ff(self.norm3(x)))


class SpatialTransformer(nn.Module):
    """x (B, C, H, W) and a context (B, T, context) to x's shape; projections are linear layers or 1x1 convolutions."""

    def __init__(self, channels: int, context: int, heads: int, depth: int, linear: bool) -> None:
        super().__init__()
        self.linear = linear
        self.norm = nn.GroupNorm(GROUPS, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(TransformerBlock(channels, context, heads) for _ in range(depth))
        self.proj_out = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        shape = x.shape
        h = self.norm(x) if self.linear else self.proj_in(self.norm(x))
        h = h.flatten(2).transpose(1, 2)
        h = self.proj_in(h) if self.linear else h
        for block in self.transformer_blocks:
            h = block(h, context)
        h = self.proj_out(h) if self.linear else h
        h = h.transpose(1, 2).reshape(shape)
        return cast(Tensor, x + (h if self.linear else self.proj_out(h)))
