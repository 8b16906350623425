"""The text encoder that CompVis trains together with its latent text-to-image models (BERTEmbedder), in its layout.

    h = token[i] + position;   h + attn(norm h);   h + ff(norm h);   ...;   norm h

Attention has 8 heads of 64 channels whatever the width, and nothing is masked: padding is a token like all others. Its
tokenizer is no part of a checkpoint; a `<name>.tokenizer.json` beside it is read.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from ...runtime.errors import AccuQuantError
from ..checkpoint import load_weights
from ..model import TextEncoder
from . import tokenizer_file

PREFIX = "cond_stage_model.transformer."
HEADS, HEAD_CHANNELS = 8, 64
GUIDANCE = 5.0  # of the original's text-to-image script


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        inner = HEADS * HEAD_CHANNELS
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, inner, bias=False) for _ in range(3))
        self.to_out = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(2, (HEADS, HEAD_CHANNELS)).transpose(1, 2) for layer in (self.to_q, self.to_k, self.to_v)
        )
        return cast(Tensor, self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU()),
            nn.Identity(),  # the original's dropout
            nn.Linear(4 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.net(x))


class Layers(nn.Module):
    """Norm and branch in turns: `depth` times attention and feed-forward."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList([nn.LayerNorm(width), branch(width)])
            for _ in range(depth)
            for branch in (Attention, FeedForward)
        )

    def forward(self, x: Tensor) -> Tensor:
        for pair in self.layers:
            norm, branch = cast(nn.ModuleList, pair)
            x = x + branch(norm(x))
        return x


class Position(nn.Module):
    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.emb = nn.Embedding(length, width)


class BertText(nn.Module):
    """Tokens, int64 (B, length), to their embeddings, float32 (B, length, width)."""

    def __init__(self, tokens: int, length: int, width: int, depth: int) -> None:
        super().__init__()
        self.token_emb = nn.Embedding(tokens, width)
        self.pos_emb = Position(length, width)
        self.attn_layers = Layers(width, depth)
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        return cast(Tensor, self.norm(self.attn_layers(self.token_emb(tokens) + self.pos_emb.emb.weight)))


def recognise(state: Mapping[str, Tensor]) -> bool:
    """Does the checkpoint hold a text encoder of this layout?"""
    return f"{PREFIX}token_emb.weight" in state


def load(state: Mapping[str, Tensor], path: Path) -> TextEncoder:
    """Build the encoder that the keys describe and load it strictly.

    Raises:
        AccuQuantError: no tokenizer beside the checkpoint, one of another length or with more tokens than the encoder
            knows, or weights missing, left over or not finite.
    """
    kept = {
        key.removeprefix(PREFIX): value
        for key, value in state.items()
        if key.startswith(PREFIX) and not key.startswith(f"{PREFIX}to_logits.")  # of its pretraining only
    }
    tokens, width = kept["token_emb.weight"].shape
    if "pos_emb.emb.weight" not in kept:
        raise AccuQuantError(f"{path}: its text encoder has no pos_emb.emb.weight; copy the checkpoint again")
    layers = {int(found[1]) for key in kept if (found := re.match(r"attn_layers\.layers\.(\d+)\.", key))}
    network = BertText(tokens, len(kept["pos_emb.emb.weight"]), width, len(layers) // 2)
    load_weights(network, kept, path)
    return TextEncoder(network.eval().requires_grad_(False), _tokenizer(path, network))


def _tokenizer(path: Path, network: BertText) -> str:
    beside = tokenizer_file.beside(path)
    length, known = network.pos_emb.emb.num_embeddings, network.token_emb.num_embeddings
    if not beside.exists():
        raise AccuQuantError(
            f"{path}: a text encoder without its tokenizer; put the tokenizer.json it was trained with (of the "
            f"tokenizers library, padding and truncating to {length}) beside it as {beside.name}"
        )
    return tokenizer_file.read_tokenizer(beside, length, known)
