"""The recipe: what calibration learned, frozen, ready to be lowered.

Two files. `recipe.safetensors` holds per weighted operator its codes (int8, or 8-bit floats) and its scales and, if
there are any, what was learned on top of its bias and what its input channels are divided by, and for the whole network
what its output is corrected by; `recipe.json` the scales and zero points of activations, the scheme, and how they came
to be. Weights are stored as the codes that will run: no later stage rounds again.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..runtime.errors import AccuQuantError
from ..runtime.files import atomic, write_text
from .correction import OutputCorrection
from .layers import ActivationQuantizer, QuantizedOperator
from .scheme import Number, OperatorKind, QuantScheme, Role

TIMESTEPS, COEFFICIENTS = "output/timesteps", "output/coefficients"


class ActivationRecipe(BaseModel):
    """One activation input: x is stored as clamp(round(x / scale) + zero_point, q_min, q_max), in codes of `number`.

    `rows` is empty, or holds the scale of every stretch of the chain, the first of which is repeated above.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    number: Number = "integer"
    bits: int
    signed: bool
    scale: float = Field(gt=0)
    zero_point: int
    rows: tuple[float, ...] = ()


class OperatorRecipe(BaseModel):
    """One operator: its inputs, its weight's bits if it has one, and its output if that is not written in float."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: OperatorKind
    role: Role
    weight_bits: int | None
    inputs: tuple[ActivationRecipe, ...]
    output: ActivationRecipe | None = None


class RecipeFacts(BaseModel):
    """The JSON half. Only a recipe whose `state` is frozen can be exported."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    state: Literal["frozen"] = "frozen"
    scheme: QuantScheme
    operators: dict[str, OperatorRecipe]
    step_bounds: tuple[float, ...] = ()  # row k of the tables ends where the timestep falls below step_bounds[k]
    provenance: dict[str, Any]


class Recipe:
    """Facts and tensors together: `codes[name]` int8 or float8 (C, ...), `scales[name]`, `shifts[name]` float32 (C,).

    Where a linear layer's weight is quantized in blocks of its columns, `scales[name]` is (C, blocks).
    `smoothings[name]` is float32 (C_in,): the input's channels are divided by it, the weight's were multiplied.
    `correction` is that of the network's output.
    """

    def __init__(
        self,
        facts: RecipeFacts,
        codes: dict[str, Tensor],
        scales: dict[str, Tensor],
        shifts: dict[str, Tensor] | None = None,
        smoothings: dict[str, Tensor] | None = None,
        correction: OutputCorrection | None = None,
    ) -> None:
        self.facts, self.codes, self.scales = facts, codes, scales
        self.shifts, self.smoothings = shifts or {}, smoothings or {}
        self.correction = correction
        weighted = {name for name, operator in facts.operators.items() if operator.weight_bits is not None}
        for held, what in ((codes, "codes"), (scales, "scales")):
            if wrong := weighted ^ held.keys():
                name = min(wrong)
                found = f"has no {what}" if name in weighted else f"has {what}, and there is no such layer"
                raise AccuQuantError(
                    f"layer {name}: the recipe's weight {found}; every quantized weight has codes and scales, and "
                    "nothing else has: calibrate again"
                )
        for name, scale in scales.items():
            usable = (torch.isfinite(scale) & (scale > 0)).flatten()
            if not usable.all():
                first = int((~usable).nonzero()[0])
                raise AccuQuantError(
                    f"layer {name}: weight scale {first} of {usable.numel()} is {float(scale.flatten()[first]):g}; "
                    "finite ones above zero are expected: calibrate again (--set weight_scale_rate=0 learns none), or "
                    f"keep the layer in float (--in-float {name})"
                )

    def container(self, name: str) -> Literal["int4", "int8", "float8"] | None:
        """In what a weight is stored; None if the operator has none. TensorRT takes int4 tensors of even size only."""
        bits, scheme = self.facts.operators[name].weight_bits, self.facts.scheme
        if bits is None:
            return None
        if self.codes[name].dtype.is_floating_point:
            return "float8"
        fits = scheme.target != "tensorrt" or self.codes[name].numel() % 2 == 0
        return "int4" if bits <= 4 and scheme.container == "packed" and fits else "int8"

    def save(self, folder: Path) -> None:
        tensors = {f"{name}.codes": codes for name, codes in self.codes.items()}
        tensors |= {f"{name}.scale": scale for name, scale in self.scales.items()}
        tensors |= {f"{name}.shift": shift for name, shift in self.shifts.items()}
        tensors |= {f"{name}.smoothing": smoothing for name, smoothing in self.smoothings.items()}
        if self.correction is not None:
            tensors |= {TIMESTEPS: self.correction.timesteps, COEFFICIENTS: self.correction.coefficients}
        with atomic(folder / "recipe.safetensors") as part:
            save_file({k: v.contiguous() for k, v in tensors.items()}, part)
        write_text(folder / "recipe.json", self.facts.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "Recipe":
        try:
            facts = RecipeFacts.model_validate_json((folder / "recipe.json").read_text())
            tensors = load_file(folder / "recipe.safetensors")
            corrected = TIMESTEPS in tensors or COEFFICIENTS in tensors
            correction = OutputCorrection(tensors.pop(TIMESTEPS), tensors.pop(COEFFICIENTS)) if corrected else None
        except (OSError, KeyError, ValidationError, UnicodeDecodeError, SafetensorError) as error:
            raise AccuQuantError(f"{folder} holds no usable recipe: {error}") from error
        codes, scales, shifts, smoothings = (
            {k.removesuffix(end): v for k, v in tensors.items() if k.endswith(end)}
            for end in (".codes", ".scale", ".shift", ".smoothing")
        )
        try:
            return cls(facts, codes, scales, shifts, smoothings, correction)
        except AccuQuantError as error:
            raise AccuQuantError(f"{folder} holds no usable recipe: {error}") from error


@torch.no_grad()
def freeze(
    operators: dict[str, QuantizedOperator],
    scheme: QuantScheme,
    provenance: dict[str, Any],
    correction: OutputCorrection | None = None,
) -> Recipe:
    """Read the learned state off the operators; `correction` is that of the network's output.

    Raises:
        AccuQuantError: a scale that is not finite and positive; names the layer.
    """
    facts: dict[str, OperatorRecipe] = {}
    codes: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    shifts: dict[str, Tensor] = {}
    smoothings: dict[str, Tensor] = {}
    for name, operator in operators.items():
        weight = operator.weight_quantizer
        if weight is not None:
            codes[name] = weight.codes().reshape(operator.layer.weight.shape).cpu()
            scale = weight.scale.flatten() if weight.block is None else weight.scale.reshape(weight.channels, -1)
            scales[name] = scale.float().cpu()
        if operator.shift is not None:
            shifts[name] = operator.shift.float().cpu().clone()
        if operator.smoothing is not None:
            smoothings[name] = operator.smoothing.float().cpu().clone()
        facts[name] = OperatorRecipe(
            kind=operator.kind,
            role=operator.role,
            weight_bits=None if weight is None else weight.grid.bits,
            inputs=tuple(_frozen(name, quantizer) for quantizer in operator.input_quantizers),
            output=None if operator.output is None else _frozen(name, operator.output),
        )
    table = next((q.table for op in operators.values() for q in op.quantizers), None)
    bounds = () if table is None else table.bounds
    known = RecipeFacts(scheme=scheme, operators=facts, step_bounds=bounds, provenance=provenance)
    return Recipe(known, codes, scales, shifts, smoothings, correction)


def _frozen(name: str, quantizer: ActivationQuantizer) -> ActivationRecipe:
    grid = quantizer.grid
    rows = tuple(quantizer.scale.reshape(-1).tolist())
    try:
        return ActivationRecipe(
            number="float8" if grid.dtype.is_floating_point else "integer",
            bits=grid.bits,
            signed=grid.signed,
            scale=rows[0],
            zero_point=int(quantizer.zero_point.clamp(grid.q_min, grid.q_max).round()),
            rows=rows if len(rows) > 1 else (),
        )
    except (ValidationError, ValueError, OverflowError) as error:
        raise AccuQuantError(
            f"layer {name}: activation scale {quantizer.scale.tolist()}, zero point {quantizer.zero_point.item():g}; "
            "finite ones, the scale above zero, are expected: calibrate again (--set iterations=0 learns none), or "
            f"keep the layer in float (--in-float {name})"
        ) from error
