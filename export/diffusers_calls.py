"""How diffusers' pipelines call the networks of bundles: their words for a graph's inputs, and what a graph cannot do.

A graph takes latents, timesteps and rows of conditions. What else a network is told may be a constant of the graph,
such as a picture's sizes: then a pipeline may say the same, and nothing else. All other arguments are for parts that
the graph does not have.
"""

from collections.abc import Mapping
from typing import Any

import diffusers
import numpy as np
import onnx
import torch

from ..runtime.bundle import Bundle, ByClass, ByRows, ByText
from ..runtime.errors import AccuQuantError

# Of families whose networks take several rows: the graph's inputs, and diffusers' arguments for them. The first is the
# one that may also come as the third argument.
CALLED: Mapping[str, Mapping[str, str]] = {
    "sdxl": {"context": "encoder_hidden_states", "pooled": "text_embeds"},
    "pixart": {"context": "encoder_hidden_states", "mask": "encoder_attention_mask"},
    "sd3": {"context": "encoder_hidden_states", "pooled": "pooled_projections"},
    "flux": {"context": "encoder_hidden_states", "pooled": "pooled_projections"},
}
# What some of their pipelines read of a config besides.
SIZES_WIDTH = 256  # of each of the sizes' embeddings; pipelines add them up and compare, whatever they are
CONFIG: Mapping[str, Mapping[str, Any]] = {
    "sdxl": {"addition_embed_type": "text_time", "addition_time_embed_dim": SIZES_WIDTH},
    "sd3": {"patch_size": 2},
}
# Latent values in a token, of pipelines that count channels so.
PACKED = {"flux": 4}
CONTROL = "what a ControlNet or an adapter adds between layers is not in the graph"
IP_ADAPTER = "an IP-Adapter is not in the graph"
WHY: Mapping[str, str] = {
    "scale": "LoRAs are fused at export, with --lora FILE:WEIGHT",
    "image_embeds": IP_ADAPTER,
    "ip_adapter_image_embeds": IP_ADAPTER,
    "down_block_additional_residuals": CONTROL,
    "mid_block_additional_residual": CONTROL,
    "down_intrablock_additional_residuals": CONTROL,
    "block_controlnet_hidden_states": CONTROL,
    "controlnet_block_samples": CONTROL,
    "controlnet_single_block_samples": CONTROL,
    "skip_layers": "the graph runs all layers",
    "time_ids": "this bundle does not say which sizes its graph is told; export it again",
}


def rows_called(bundle: Bundle) -> Mapping[str, str]:
    """The graph's inputs for conditions, and what diffusers calls them; the one that may come third first.

    Raises:
        AccuQuantError: a family whose inputs diffusers' pipelines do not pass.
    """
    known = bundle.manifest.conditioning
    if known is None:
        return {}
    if isinstance(known, ByClass):
        return {known.input: "class_labels"}
    if isinstance(known, ByText) and len(known.inputs) == 1:
        return {known.inputs[0]: "encoder_hidden_states"}
    called = CALLED.get(bundle.manifest.family, {})
    if called.keys() != set(known.names):
        raise AccuQuantError(
            f"the network of {bundle.folder} takes {', '.join(known.names)}, which diffusers pipelines do not pass; "
            f"those of {', '.join(CALLED)} are known. Sample it with accuquant.runtime.Pipeline"
        )
    return called


def taken(bundle: Bundle, called: Mapping[str, str], given: Mapping[str, Any]) -> dict[str, Any]:
    """Of a call's named arguments, the rows by diffusers' names; dictionaries of arguments are looked into.

    Raises:
        AccuQuantError: any other argument that is not empty, or what the graph holds as a constant is given otherwise.
    """
    rows: dict[str, Any] = {}
    for name, value in given.items():
        inside = value.items() if isinstance(value, Mapping) else {name: value}.items()
        for inner, asked in inside:
            if _is_empty(inner, asked):
                continue
            if inner in called.values():
                rows[inner] = asked
            elif inner in bundle.manifest.constants:
                _check_constant(bundle, inner, asked)
            else:
                said = f"{name} was given" + (f" ({inner})" if inner != name else "")
                takes = " and ".join(called.values()) or "none"
                why = f": {WHY[inner]}" if inner in WHY else "; leave it out"
                raise AccuQuantError(f"{said} and the network of {bundle.folder} takes {takes}{why}")
    return rows


def config_of(bundle: Bundle) -> dict[str, Any]:
    """What pipelines read of a model's config."""
    manifest = bundle.manifest
    channels, height, width = manifest.sample_shape
    known, packed = manifest.conditioning, PACKED.get(manifest.family, 1)
    context = known.shapes["context"] if isinstance(known, ByRows) and "context" in known.shapes else ()
    made = {
        "_diffusers_version": diffusers.__version__,
        "_name_or_path": str(bundle.folder),
        "sample_size": height if height == width else (height, width),
        "in_channels": packed * channels,
        "out_channels": packed * channels,
        "num_class_embeds": known.classes if isinstance(known, ByClass) else None,
        "time_cond_proj_dim": None,
        "addition_embed_type": None,
        "class_embed_type": None,
        "encoder_hid_dim_type": None,
        "joint_attention_dim": context[-1] if context else None,
        "guidance_embeds": "guidance" in manifest.constants,
    }
    return made | dict(CONFIG.get(manifest.family, {}))


def width_of(bundle: Bundle, name: str) -> int:
    """The last dimension of an input of the bundle's graph."""
    graph = onnx.load(bundle.graph("denoiser"), load_external_data=False).graph
    found = next(port for port in graph.input if port.name == name)
    return int(found.type.tensor_type.shape.dim[-1].dim_value)


def _check_constant(bundle: Bundle, name: str, asked: Any) -> None:
    held = bundle.manifest.constants[name]
    rows = torch.as_tensor(asked).detach().cpu().double().reshape(-1, len(held)).numpy()
    other = ~np.isclose(rows, held, rtol=1e-3).all(axis=1)  # pipelines may have made them in 16 bits
    if other.any():
        found, told = (", ".join(f"{number:g}" for number in row) for row in (rows[other][0], held))
        raise AccuQuantError(
            f"{name} is {found} and the graph of {bundle.folder} holds {told}; call the pipeline so that it says the "
            "same, or export with another in the YAML of --config"
        )


def _is_empty(name: str, value: Any) -> bool:
    """Pipelines pass arguments for features that are off as None or {}, and the scale of LoRAs that are not there."""
    return value is None or (isinstance(value, Mapping) and not value) or (name == "scale" and value == 1)
