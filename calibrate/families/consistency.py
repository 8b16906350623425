"""Consistency models on the ADM U-Net, from the ONNX file they were deployed as.

A consistency model's network F stands inside EDM's preconditioning (Karras et al. 2022; Song et al. 2023):

    D(x, sigma) = c_skip x + c_out F(c_in x, 250 ln sigma),
    c_skip = d^2 / ((sigma - sigma_min)^2 + d^2),   c_out = d (sigma - sigma_min) / sqrt(sigma^2 + d^2),
    c_in = 1 / sqrt(sigma^2 + d^2),                 d = sigma_data.

All three are numbers of a step, so the sampling plan takes them and F alone is quantized. Parameters keep their names
in such a file, except the affine part of norms, which is found by the path of the node that uses it.
A final clipping of D to [-1, 1] is left out, since no row of a plan can hold it.

A continuous label goes through an MLP and is added to the time embedding. It is fixed for a bundle (`label` in a YAML
file beside the checkpoint or given by `--config`), and then it is a part of the embedding's bias.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import torch
import torch.nn.functional as F
import yaml
from onnx import numpy_helper
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from ...runtime.errors import AccuQuantError
from ..checkpoint import load_weights
from ..model import DiffusionModel
from .adm import block_of, role_of, shape_from_keys
from .adm_unet import AdmConfig, AdmUNet

NAME = "consistency model on the ADM U-Net (.onnx)"
PREFIX = "model."
SIZE = "__size__"  # the picture's height, which an ONNX input tells and no weight does


class Facts(BaseModel):
    """What the weights do not say; `label` in [0, 1] is the condition of every picture."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_head_channels: int = Field(default=32, gt=0)
    sigma_min: float = Field(default=0.002, gt=0)
    sigma_max: float = Field(default=80.0, gt=0)
    sigma_data: float = Field(default=0.5, gt=0)
    num_scales: int = Field(default=40, gt=1)  # discretisation steps of training, from which few-step sigmas are drawn
    label: float = Field(default=0.5, ge=0, le=1)


def recognise(stored: Any) -> dict[str, Tensor] | None:
    """The state dict of F, if `stored` is such a graph."""
    if not isinstance(stored, onnx.ModelProto):
        return None
    graph = stored.graph
    initialisers = {t.name: t for t in graph.initializer}
    if f"{PREFIX}time_embed.0.weight" not in initialisers or f"{PREFIX}label_emb.0.weight" not in initialisers:
        return None
    state = {k.removeprefix(PREFIX): _tensor(t) for k, t in initialisers.items() if k.startswith(PREFIX)}
    for node in graph.node:
        kind = {"Mul": "weight", "Add": "bias"}.get(node.op_type)
        for name in node.input:
            if kind and name in initialisers and not name.startswith(PREFIX):
                state[f"{_module_of(node.name)}.{kind}"] = _tensor(initialisers[name]).flatten()
    picture = next((i for i in graph.input if len(i.type.tensor_type.shape.dim) == 4), None)
    if picture is not None:
        state[SIZE] = torch.tensor(picture.type.tensor_type.shape.dim[2].dim_value)
    return state


def load(state: Mapping[str, Tensor], path: Path, config: Path | None) -> DiffusionModel:
    """Build F from the keys, with its label folded into the time embedding.

    Raises:
        AccuQuantError: a configuration that does not fit, or weights missing, left over or not finite.
    """
    facts = _facts(path, config)
    size = int(state.get(SIZE, torch.tensor(0)))
    if size <= 0:
        raise AccuQuantError(f"{path}: its input does not say how large the pictures are; export it with a fixed size")
    shape = shape_from_keys(state, path)
    channels = state["input_blocks.0.0.weight"].shape[1]
    network = AdmUNet(
        AdmConfig(**shape, in_channels=channels, out_channels=channels, head_channels=facts.num_head_channels)
    )
    weights = {k: v for k, v in state.items() if k != SIZE and not k.startswith("label_emb.")}
    weights["time_embed.2.bias"] = weights["time_embed.2.bias"] + _label_embedding(state, facts.label, path)
    load_weights(network, weights, path)
    millions = sum(p.numel() for p in network.parameters()) / 1e6
    return DiffusionModel(
        family="consistency",
        found=f"{NAME}, {millions:.2f} M parameters, {channels}x{size}x{size}, label {facts.label:g}",
        network=network.eval().requires_grad_(False),
        sample_shape=(channels, size, size),
        noise_schedule={
            "num_train_timesteps": facts.num_scales,
            "sigma_min": facts.sigma_min,
            "sigma_max": facts.sigma_max,
            "sigma_data": facts.sigma_data,
        },
        role_of=role_of,
        block_of=block_of,
        default_sampler="consistency",
        default_steps=8,
    )


def _label_embedding(state: Mapping[str, Tensor], label: float, path: Path) -> Tensor:
    """What the label adds to the time embedding, (4 * model_channels,)."""
    try:
        first, second = ([state[f"label_emb.{i}.{k}"] for k in ("weight", "bias")] for i in (0, 2))
        return F.linear(F.silu(F.linear(torch.tensor([label]), *first)), *second)
    except (KeyError, RuntimeError) as error:
        raise AccuQuantError(f"{path}: its label_emb is no MLP of one number ({error})") from error


def _tensor(proto: onnx.TensorProto) -> Tensor:
    if proto.data_location == onnx.TensorProto.EXTERNAL:
        raise AccuQuantError(f"{proto.name} is kept in a file beside the ONNX graph; save it with its weights inside")
    return torch.from_numpy(numpy_helper.to_array(proto).copy())


def _module_of(node: str) -> str:
    """The module a node was exported from: `/model/a.1/a.1.0/norm/norm.0/Mul` is a.1.0.norm.0's."""
    names: list[str] = []
    for part in node.strip("/").split("/")[1:-1]:
        if names and part.startswith(f"{names[-1]}."):
            names[-1] = part
        else:
            names.append(part)
    return ".".join(names)


def _facts(path: Path, config: Path | None) -> Facts:
    beside = next((p for p in (path.with_suffix(".yml"), path.with_suffix(".yaml")) if p.exists()), None)
    chosen = config or beside
    if chosen is None:
        return Facts()
    try:
        return Facts.model_validate(yaml.safe_load(chosen.read_text()) or {})
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise AccuQuantError(f"{chosen} cannot be read as YAML: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"])) or "the file"
        raise AccuQuantError(f"{chosen}: {name}: {first['msg']}; there is {', '.join(Facts.model_fields)}") from error
