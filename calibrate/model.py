"""What every family turns a checkpoint into."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.bundle import ByText, Conditioning
from ..runtime.conditions import check_guidance, classes_of, prompts_of
from ..runtime.tokenizer import Tokenizer
from .guidance import Guided
from .layers import QuantizedOperator, quantize_operators
from .scheme import QuantScheme, Role
from .splits import find_splits
from .trajectory import NOTHING, Condition


@dataclass(frozen=True)
class TextEncoder:
    """`network(tokens)` maps int64 (B, T) to float32 (B, T, width); `tokenizer` is the text of its tokenizer.json."""

    network: nn.Module
    tokenizer: str

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Rows (len(texts), T, width); every text is encoded by itself, as in the runtime."""
        unique = list(dict.fromkeys(texts))
        tokens = torch.from_numpy(Tokenizer(self.tokenizer, "the model's tokenizer")(unique))
        rows = {text: self.network(row[None])[0] for text, row in zip(unique, tokens, strict=True)}
        return torch.stack([rows[text] for text in texts])


@dataclass(frozen=True)
class DiffusionModel:
    """A denoiser ready to run, and what must be known to sample from it.

    `network(x, t, **condition)` maps x (B, *sample_shape) and t (B,), float32 both, to its prediction of that batch.
    `noise_schedule` holds diffusers' scheduler settings. `block_of` names the module whose output an operator is judged
    with when blocks are reconstructed one by one. `found` is one line for the person who gave the file. `conditioning`
    tells what the network takes besides, and the guidance it is used with; with ByText there is `text`. `decoder` maps
    latents (B, *sample_shape) to pictures (B, 1 or 3, H, W) in [-1, 1]; without it latents are the pictures.
    `adaptable()` gives the layers that a LoRA may change, under every name that files have for them, behind `unet.` or
    `text_encoder.`.
    """

    family: str
    found: str
    network: nn.Module
    sample_shape: tuple[int, int, int]
    noise_schedule: Mapping[str, Any]
    role_of: Callable[[str], Role]
    block_of: Callable[[str], str]
    default_sampler: str
    default_steps: int
    conditioning: Conditioning | None = None
    text: TextEncoder | None = None
    decoder: nn.Module | None = None
    adaptable: Callable[[], Mapping[str, nn.Module]] = dict

    def condition(self, seeds: Sequence[int]) -> Condition:
        """What each seed is sampled under where nobody chose, as rows by name."""
        if self.conditioning is None:
            return NOTHING
        if isinstance(self.conditioning, ByText):
            assert self.text is not None
            return {self.conditioning.input: self.text(prompts_of(seeds, self.conditioning.examples))}
        return {self.conditioning.input: torch.tensor(classes_of(seeds, self.conditioning.classes))}

    def guided(self, guidance: float) -> nn.Module:
        """The network as a sampler calls it; it shares all modules with `network`.

        Raises:
            AccuQuantError: a network that cannot be guided.
        """
        check_guidance(self.conditioning, guidance)
        if guidance == 1.0:
            return self.network
        known = self.conditioning
        assert known is not None
        if isinstance(known, ByText):
            assert self.text is not None
            return Guided(self.network, {known.input: self.text([""])}, guidance)
        return Guided(self.network, {known.input: torch.tensor([known.null])}, guidance)


def quantize(model: DiffusionModel, scheme: QuantScheme) -> dict[str, QuantizedOperator]:
    """Put the model's operators on the scheme's grids, in place, and return them by name; still to be calibrated."""
    splits = find_splits(model.network, model.sample_shape, model.condition([0])) if scheme.split else None
    return quantize_operators(model.network, scheme, model.role_of, splits)
