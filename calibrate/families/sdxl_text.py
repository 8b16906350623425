"""The two text encoders of Stable Diffusion XL as one network: CLIP's ViT-L and OpenCLIP's bigG, from one tokenizer.

    context = [ h_L | h_G ],     pooled = P norm(last_G)[end],     h what an encoder's last layer reads, not normalised

Both read the same words out of the same vocabulary and differ in what fills up behind the end: the end again, and "!".
So the tokens come once, and each encoder's padding is put in here: behind the first end token stands nothing else. (A
prompt that spells out `<|endoftext|>` therefore ends there.) The first encoder's last layer and norm are loaded, since
LoRAs name them, and never run.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from ...runtime.errors import AccuQuantError
from . import clip_tokenizer
from .clip_text import ClipText


@dataclass(frozen=True)
class Marks:
    """Numbers of tokens: the end, and what fills up behind it for each encoder."""

    end: int
    paddings: tuple[int, int]


class TwoTexts(nn.Module):
    """Tokens, int64 (B, length), to context (B, length, both widths) and pooled (B, projected), float32."""

    def __init__(self, first: ClipText, second: ClipText, projection: nn.Linear, marks: Marks) -> None:
        super().__init__()
        self.first, self.second, self.text_projection, self.marks = first, second, projection, marks

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        length = tokens.shape[1]
        position = torch.arange(length, device=tokens.device)
        end = torch.where(tokens == self.marks.end, position, length).amin(1, keepdim=True)
        first, second = (torch.where(position > end, padding, tokens) for padding in self.marks.paddings)
        near, (before, last) = self.first.hidden(first)[0], self.second.hidden(second)
        # The one row at the end, as a sum that every compiler knows.
        whole = (self.second.final_layer_norm(last) * (position == end)[..., None]).sum(1)
        return torch.cat([near, before], dim=2), cast(Tensor, self.text_projection(whole))


def join(first: ClipText, second: ClipText, projection: Tensor, marks: Marks, path: Path) -> TwoTexts:
    """Both encoders, and `projection` (projected, width) of the second's pooled output.

    Raises:
        AccuQuantError: encoders that do not read the same tokens, a projection of another width or not finite.
    """
    reads = [(encoder.config.tokens, encoder.config.length) for encoder in (first, second)]
    if reads[0] != reads[1]:
        raise AccuQuantError(
            f"{path}: its text encoders read {reads[0][1]} of {reads[0][0]} tokens and {reads[1][1]} of "
            f"{reads[1][0]}; Stable Diffusion XL's read the same"
        )
    if projection.ndim != 2 or projection.shape[1] != second.config.width or not torch.isfinite(projection).all():
        raise AccuQuantError(
            f"{path}: text_projection is {tuple(projection.shape)} or not finite; its columns are the "
            f"{second.config.width} channels of the second text encoder"
        )
    linear = nn.Linear(projection.shape[1], len(projection), bias=False)
    linear.weight = nn.Parameter(projection.to(torch.float32, copy=True))
    return TwoTexts(first, second, linear, marks).eval().requires_grad_(False)


def published_marks(tokenizer: str, path: Path) -> Marks:
    """Those of the base model, whose first encoder fills up with the end and whose second with "!"."""
    return marks_of(tokenizer, (clip_tokenizer.END, "!"), path)


def marks_of(tokenizer: str, paddings: tuple[str, str], path: Path) -> Marks:
    """The numbers that a tokenizer.json's text has for the end and these.

    Raises:
        AccuQuantError: one of them is not among its tokens.
    """
    stored = json.loads(tokenizer)
    known = dict(stored["model"]["vocab"]) | {token["content"]: token["id"] for token in stored["added_tokens"]}
    missing = [token for token in (clip_tokenizer.END, *paddings) if token not in known]
    if missing:
        raise AccuQuantError(f"{path}: its tokenizer has no token {missing[0]!r}, which its text encoders read")
    return Marks(known[clip_tokenizer.END], (known[paddings[0]], known[paddings[1]]))
