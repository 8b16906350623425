"""What every family turns a checkpoint into."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.bundle import ByClass, ByRows, ByText, Conditioning
from ..runtime.conditions import check_guidance, classes_of, prompts_of
from ..runtime.errors import AccuQuantError, near
from ..runtime.rows import Rows, described, read_rows
from ..runtime.tokenizer import Tokenizer
from .guidance import Guided
from .layers import QUANTIZABLE, QuantizedOperator, quantize_operators
from .roles import Roles
from .scheme import QuantScheme, Role
from .splits import find_splits
from .trajectory import NOTHING, Condition


@dataclass(frozen=True)
class TextEncoder:
    """`network(tokens)` maps int64 (B, T) to float32 (B, ...), one tensor or one for every input of the denoiser's.

    `tokenizer` is the text of its tokenizer.json.
    """

    network: nn.Module
    tokenizer: str

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, ...]:
        """Rows (len(texts), ...) of every output; each text is encoded by itself, as in the runtime."""
        unique = list(dict.fromkeys(texts))
        tokens = torch.from_numpy(Tokenizer(self.tokenizer, "the model's tokenizer")(unique))
        rows = {text: outputs_of(self.network, row[None]) for text, row in zip(unique, tokens, strict=True)}
        return tuple(torch.cat(outputs) for outputs in zip(*(rows[text] for text in texts), strict=True))


def outputs_of(network: nn.Module, given: Tensor) -> tuple[Tensor, ...]:
    """A network's outputs, of one as of several."""
    made = network(given)
    return (made,) if isinstance(made, Tensor) else tuple(made)


@dataclass(frozen=True)
class DiffusionModel:
    """A denoiser ready to run, and what must be known to sample from it.

    `network(x, t, **condition)` maps x (B, *sample_shape) and t (B,), float32 both, to its prediction of that batch.
    `noise_schedule` holds diffusers' scheduler settings. `block_of` names the module whose output an operator is judged
    with when blocks are reconstructed one by one. `found` is one line for the person who gave the file. `conditioning`
    tells what the network takes besides, and the guidance it is used with; with ByText there is `text`, with ByRows
    `rows` are to be supplied. `decoder` maps latents (B, *sample_shape) to pictures (B, 1 or 3, H, W) in [-1, 1];
    without it latents are the pictures. `adaptable()` gives the layers that a LoRA may change, under every name that
    files have for them, behind `unet.` or `text_encoder.`. `constants` is what the network is told besides, the
    same for every picture, by diffusers' names for it.
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
    rows: Rows | None = None
    decoder: nn.Module | None = None
    adaptable: Callable[[], Mapping[str, nn.Module]] = dict
    constants: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def condition(self, seeds: Sequence[int]) -> Condition:
        """What each seed is sampled under where nobody chose, as rows by name."""
        known = self.conditioning
        if known is None:
            return NOTHING
        if isinstance(known, ByText):
            return self._encoded(known, prompts_of(seeds, known.examples))
        if isinstance(known, ByRows):
            assert self.rows is not None
            return {name: torch.from_numpy(value) for name, value in self.rows.of(seeds).items()}
        return {known.input: torch.tensor(classes_of(seeds, known.classes))}

    def guided(self, guidance: float) -> nn.Module:
        """The network as a sampler calls it; it shares all modules with `network`.

        Raises:
            AccuQuantError: a network that cannot be guided.
        """
        check_guidance(self.conditioning, guidance)
        if guidance == 1.0:
            return self.network
        assert self.conditioning is not None
        return Guided(self.network, self._nothing(self.conditioning), guidance)

    def supplied(self, path: Path | None) -> "DiffusionModel":
        """The model with the rows of a file to calibrate and sample with, if it takes any; itself if it does not.

        Without rows that stand for none it is calibrated without guidance.

        Raises:
            AccuQuantError: no file where one is needed, one where none is, or one that does not fit.
        """
        known = self.conditioning
        if not isinstance(known, ByRows):
            if path is not None:
                raise AccuQuantError(f"{path}: the model takes no rows of a file; leave --conditions out")
            return self
        if path is None:
            raise AccuQuantError(
                f"the model ({self.found}) takes a text encoder's outputs, which it does not hold; name a safetensors "
                f"file with --conditions that holds {described(known)}"
            )
        rows = read_rows(path, known)
        shapes = {name: value.shape[1:] for name, value in rows.examples.items()}
        guidance = known.guidance if rows.empty else 1.0
        return replace(self, rows=rows, conditioning=ByRows(shapes=shapes, empty=bool(rows.empty), guidance=guidance))

    def _nothing(self, known: Conditioning) -> Condition:
        """One row (1, ...) that stands for none, by input."""
        if isinstance(known, ByClass):
            return {known.input: torch.tensor([known.null])}
        if isinstance(known, ByText):
            rows = self._encoded(known, [""])
            return {name: torch.zeros_like(row) for name, row in rows.items()} if known.zeros_for_none else rows
        assert self.rows is not None
        return {name: torch.from_numpy(value[None]) for name, value in self.rows.empty.items()}

    def _encoded(self, known: ByText, texts: Sequence[str]) -> Condition:
        assert self.text is not None
        return dict(zip(known.inputs, self.text(texts), strict=True))


def quantize(model: DiffusionModel, scheme: QuantScheme) -> dict[str, QuantizedOperator]:
    """Put the model's operators on the scheme's grids, in place, and return them by name; still to be calibrated.

    Raises:
        AccuQuantError: what `quantize_operators` refuses, a split where nothing can be split, or a pattern of the
            family's roles that matches nothing.
    """
    if scheme.policy != "uniform" and not scheme.nothing_quantized:
        _check_roles(model)
    splits = find_splits(model.network, model.sample_shape, model.condition([0])) if scheme.split else None
    if splits is not None and not splits:
        raise AccuQuantError(
            f"--split: no convolution of the model ({model.found}) reads a concatenation of two tensors directly, as "
            "shortcuts of U-Nets do; leave --split out"
        )
    return quantize_operators(model.network, scheme, model.role_of, splits)


def _check_roles(model: DiffusionModel) -> None:
    """Else a policy would pass over the layers that it is about."""
    if not isinstance(model.role_of, Roles):
        return
    names = [name for name, module in model.network.named_modules() if isinstance(module, QUANTIZABLE)]
    for pattern, role in model.role_of.unmatched(names).items():
        raise AccuQuantError(
            f"family {model.family}: its pattern {pattern} for {role} layers matches none of the {len(names)} layers "
            f"of {model.found} ({near(pattern, names)}); the family does not know this network, and no policy by roles "
            "can be kept: export with --policy uniform"
        )
