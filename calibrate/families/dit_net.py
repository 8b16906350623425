"""The diffusion transformer, in the parameter layout of facebookresearch/DiT.

    o = DiT(x_t, t, y),     x_t in R^{B,C,H,W},  t in {0..T-1}^B,  y in {0..classes}^B

Patches as tokens with fixed positions; blocks of self-attention and a GELU network whose norms are scaled, shifted and
gated by the sum of the timestep's and the class's embedding (adaLN-Zero). The class behind the last stands for none.
Peebles and Xie, "Scalable Diffusion Models with Transformers", 2023. The attention's products are modules, so that they
quantize like all others; the variance that the originals learn as well is left out (dit.py).
"""

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import MatMul
from .adm_unet import timestep_embedding

FREQUENCIES = 256  # numbers that a timestep is embedded in


@dataclass(frozen=True)
class DitConfig:
    """Shape of the network; `size` is the latent's height and width, `classes` counts without the one for none.

    `frequency_shift` and `mlp_eps` are where diffusers' network is another than the authors'.
    """

    size: int
    patch: int
    channels: int
    width: int
    depth: int
    heads: int
    hidden: int
    classes: int
    frequency_shift: int = 0
    mlp_eps: float = 1e-6


class Attention(nn.Module):
    """Multi-head self-attention over tokens (B, N, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.qk, self.av = MatMul(), MatMul()

    def forward(self, x: Tensor) -> Tensor:
        batch, count, width = x.shape
        depth = width // self.heads
        q, k, v = self.qkv(x).reshape(batch, count, 3, self.heads, depth).permute(2, 0, 3, 1, 4).unbind(0)
        weight = torch.softmax(self.qk(q, k.transpose(2, 3)) * depth**-0.5, dim=-1)
        return cast(Tensor, self.proj(self.av(weight, v).transpose(1, 2).reshape(batch, count, width)))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.fc2(F.gelu(self.fc1(x), approximate="tanh")))


def modulated(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """Layer norm of tokens (B, N, width) without parameters, then shift and scale (B, width)."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    def __init__(self, config: DitConfig) -> None:
        super().__init__()
        self.eps = config.mlp_eps
        self.attn, self.mlp = Attention(config.width, config.heads), Mlp(config.width, config.hidden)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 6 * config.width))

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(told).chunk(6, dim=1)
        x = x + gate[:, None] * self.attn(modulated(x, shift, scale))
        return cast(Tensor, x + gate_mlp[:, None] * self.mlp(modulated(x, shift_mlp, scale_mlp, self.eps)))


class Final(nn.Module):
    def __init__(self, config: DitConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.width, config.patch**2 * config.channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 2 * config.width))

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(told).chunk(2, dim=1)
        return cast(Tensor, self.linear(modulated(x, shift, scale)))


class DiT(nn.Module):
    """The denoiser: x (B, channels, size, size), t (B,) float32 and y (B,) int64 to a prediction of x's shape."""

    def __init__(self, config: DitConfig) -> None:
        super().__init__()
        self.config, width = config, config.width
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(config.channels, width, config.patch, stride=config.patch)})
        self.t_embedder = nn.ModuleDict(
            {"mlp": nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))}
        )
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(config.classes + 1, width)})
        self.pos_embed = nn.Parameter(torch.zeros(1, (config.size // config.patch) ** 2, width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = Final(config)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        side, patch, channels = self.config.size // self.config.patch, self.config.patch, self.config.channels
        tokens = self.x_embedder["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed
        when = timestep_embedding(t, FREQUENCIES, self.config.frequency_shift)
        told = self.t_embedder["mlp"](when) + self.y_embedder["embedding_table"](y)
        for block in self.blocks:
            tokens = block(tokens, told)
        out = self.final_layer(tokens, told).reshape(-1, side, side, patch, patch, channels)
        return cast(Tensor, out.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, side * patch, side * patch))
