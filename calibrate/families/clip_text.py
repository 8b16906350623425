"""CLIP's text transformer: of transformers' layout in Stable Diffusion 1, of OpenCLIP's in Stable Diffusion 2.

    h = token[i] + position;   h + attn(norm h);   h + fc2(act(fc1(norm h)));   ...;   norm h

Attention is causal, in heads of 64 channels. What no key tells: Stable Diffusion 1 has GELU's sigmoid approximation
and every layer; Stable Diffusion 2 has GELU itself, and the last of its layers is never run. Files of version 2 that
came back from diffusers hold OpenCLIP's encoder in transformers' layout, with or without that layer: it is known by its
width, which no encoder of version 1 has. Modules are named as in transformers.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...runtime.errors import AccuQuantError
from ..checkpoint import load_weights
from ..model import TextEncoder
from . import clip_tokenizer, tokenizer_file

HUGGING_FACE, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
HEAD_CHANNELS = 64
OPEN_CLIP_WIDTH, OPEN_CLIP_LAYERS = 1024, 24  # of Stable Diffusion 2's ViT-H/14
GUIDANCE = 7.5  # of the original's text-to-image script
# Known and not needed: what compares texts with pictures, and constants that some versions kept as weights.
LEFT_OUT = ("text_projection", "text_projection.weight", "logit_scale", "embeddings.position_ids", "attn_mask")
FROM_OPEN_CLIP = (
    (r"^token_embedding\.", "embeddings.token_embedding."),
    (r"^positional_embedding$", "embeddings.position_embedding.weight"),
    (r"^ln_final\.", "final_layer_norm."),
    (r"^transformer\.resblocks\.", "encoder.layers."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"\.attn\.", ".self_attn."),
)


@dataclass(frozen=True)
class ClipTextConfig:
    """`approximate` chooses x sigmoid(1.702 x) in the place of GELU; `hidden` is the width between fc1 and fc2."""

    tokens: int
    length: int
    width: int
    hidden: int
    depth: int
    heads: int
    approximate: bool
    epsilon: float = 1e-5


class Attention(nn.Module):
    """Of tokens (B, T, width) to themselves and those before."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(config.width, config.width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        made = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return cast(Tensor, self.out_proj(made.transpose(1, 2).flatten(2)))


class FeedForward(nn.Module):
    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.approximate = config.approximate
        self.fc1, self.fc2 = nn.Linear(config.width, config.hidden), nn.Linear(config.hidden, config.width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        return cast(Tensor, self.fc2(h * torch.sigmoid(1.702 * h) if self.approximate else F.gelu(h)))


class Layer(nn.Module):
    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(config), FeedForward(config)
        self.layer_norm1, self.layer_norm2 = (nn.LayerNorm(config.width, config.epsilon) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return cast(Tensor, x + self.mlp(self.layer_norm2(x)))


class ClipText(nn.Module):
    """Tokens, int64 (B, length), to their embeddings, float32 (B, length, width)."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = nn.ModuleDict(
            {
                "token_embedding": nn.Embedding(config.tokens, config.width),
                "position_embedding": nn.Embedding(config.length, config.width),
            }
        )
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(Layer(config) for _ in range(config.depth))})
        self.final_layer_norm = nn.LayerNorm(config.width, config.epsilon)

    def forward(self, tokens: Tensor) -> Tensor:
        return cast(Tensor, self.final_layer_norm(self.hidden(tokens)[1]))

    def hidden(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What the last layer reads and what it makes of that, without the final norm."""
        position = cast(nn.Embedding, self.embeddings["position_embedding"]).weight
        x = before = self.embeddings["token_embedding"](tokens) + position
        for layer in cast(nn.ModuleList, self.encoder["layers"]):
            before, x = x, layer(x)
        return before, x


def recognise(state: Mapping[str, Tensor]) -> bool:
    """Does the checkpoint hold a text encoder of one of the two layouts?"""
    return _token_embedding(state) is not None


def load(state: Mapping[str, Tensor], path: Path) -> TextEncoder:
    """Build the encoder that the keys describe and load it strictly, with CLIP's tokenizer or the one beside the file.

    Raises:
        AccuQuantError: another vocabulary without its tokenizer, or weights missing, left over or not finite.
    """
    first = _token_embedding(state)
    if first is not None and first.startswith(OPEN_CLIP):
        weights, newer = from_open_clip(inside(state, OPEN_CLIP), path), True
    else:
        weights, newer = _told_by_width(inside(state, HUGGING_FACE), path)
    network = build_network(weights, path, approximate=not newer)
    return TextEncoder(network, find_tokenizer(path, network.config, "!" if newer else clip_tokenizer.END))


def build_network(
    weights: Mapping[str, Tensor], path: Path, *, approximate: bool, heads: int | None = None, epsilon: float = 1e-5
) -> ClipText:
    """The network of weights under transformers' names, without `text_model.`; see `load`."""
    try:
        tokens, width = weights["embeddings.token_embedding.weight"].shape
        length = len(weights["embeddings.position_embedding.weight"])
        hidden = len(weights["encoder.layers.0.mlp.fc1.weight"])
    except KeyError as error:
        raise AccuQuantError(f"{path}: its text encoder has no {error.args[0]}; copy the checkpoint again") from error
    depth = 1 + max(int(found[1]) for key in weights if (found := re.match(r"encoder\.layers\.(\d+)\.", key)))
    heads = heads or width // HEAD_CHANNELS
    if not heads or width % heads:
        raise AccuQuantError(f"{path}: its text encoder is {width} wide, which {heads} heads do not divide")
    with torch.device("meta"):
        network = ClipText(ClipTextConfig(tokens, length, width, hidden, depth, heads, approximate, epsilon))
    load_weights(network, weights, path)
    return network.eval().requires_grad_(False)


def from_open_clip(weights: Mapping[str, Tensor], path: Path, *, whole: bool = False) -> dict[str, Tensor]:
    """OpenCLIP's weights under transformers' names, without the last layer unless the `whole` is wanted."""
    layers = {int(found[1]) for key in weights if (found := re.match(r"transformer\.resblocks\.(\d+)\.", key))}
    if len(layers) < 2:
        raise AccuQuantError(f"{path}: its text encoder has {len(layers)} layers; the last but one is what is read")
    renamed: dict[str, Tensor] = {}
    for key, value in weights.items():
        if key.startswith(f"transformer.resblocks.{max(layers)}.") and not whole:
            continue
        name = key
        for pattern, replacement in FROM_OPEN_CLIP:
            name = re.sub(pattern, replacement, name)
        if found := re.match(r"(.*\.)in_proj_(weight|bias)$", name):
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                renamed[f"{found[1]}{part}_proj.{found[2]}"] = rows
        else:
            renamed[name] = value
    return renamed


def _told_by_width(weights: dict[str, Tensor], path: Path) -> tuple[dict[str, Tensor], bool]:
    """The layers of an encoder in transformers' layout that are run, and whether it is OpenCLIP's."""
    if weights["embeddings.token_embedding.weight"].shape[1] != OPEN_CLIP_WIDTH:
        return weights, False
    layers = {int(found[1]) for key in weights if (found := re.match(r"encoder\.layers\.(\d+)\.", key))}
    if len(layers) not in (OPEN_CLIP_LAYERS - 1, OPEN_CLIP_LAYERS):
        raise AccuQuantError(
            f"{path}: its text encoder is {OPEN_CLIP_WIDTH} wide, as Stable Diffusion 2's, and has {len(layers)} "
            f"layers in transformers' layout, not {OPEN_CLIP_LAYERS - 1} or {OPEN_CLIP_LAYERS}; which of them are "
            "run stands in no key: export a folder of diffusers, whose settings say it"
        )
    last = f"encoder.layers.{OPEN_CLIP_LAYERS - 1}."
    return {key: value for key, value in weights.items() if not key.startswith(last)}, True


def _token_embedding(state: Mapping[str, Tensor]) -> str | None:
    known = (
        f"{HUGGING_FACE}text_model.embeddings.token_embedding.weight",
        f"{HUGGING_FACE}embeddings.token_embedding.weight",
        f"{OPEN_CLIP}token_embedding.weight",
    )
    return next((key for key in known if key in state), None)


def own_names(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the encoder needs; some versions of transformers do without `text_model.` in their names."""
    named = {key.removeprefix("text_model."): value for key, value in stored.items()}
    return {key: value for key, value in named.items() if key not in LEFT_OUT}


def inside(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """What a file holds of an encoder behind `prefix`."""
    return own_names({key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)})


def find_tokenizer(path: Path, config: ClipTextConfig, padding: str) -> str:
    """The one beside the file, else CLIP's.

    Raises:
        AccuQuantError: another vocabulary without its tokenizer.
    """
    beside = tokenizer_file.beside(path)
    if beside.exists():
        return tokenizer_file.read_tokenizer(beside, config.length, config.tokens)
    merges = clip_tokenizer.published_merges()
    tokens = clip_tokenizer.vocabulary(merges)
    if len(tokens) != config.tokens:
        raise AccuQuantError(
            f"{path}: its text encoder knows {config.tokens} tokens, CLIP's tokenizer {len(tokens)}; put the "
            f"tokenizer.json it was trained with beside it as {beside.name}"
        )
    return clip_tokenizer.tokenizer_json(merges, tokens, config.length, padding)
