"""diffusers' transformers in small, with every kind of layer of the published ones, as folders with what they take."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from accuquant.calibrate.scheme import QuantScheme
from accuquant.calibrate.spec import CalibrationSpec
from accuquant.export.build import build, prepare
from accuquant.export.request import Request
from accuquant.runtime.bundle import Bundle
from diffusers import DiTTransformer2DModel, FluxTransformer2DModel, PixArtTransformer2DModel, SD3Transformer2DModel
from safetensors.torch import save_file

TEXTS, TOKENS = 3, 5
# What learns for one iteration, with as little as possible around it.
ONCE = CalibrationSpec(
    initialisation="min-max", compensate="never", iterations=1, group=2, batch=1, trajectories=2, held_out=1, checks=1
)


@dataclass(frozen=True)
class Small:
    """A network of 4x8x8 latents, the shapes of a text's rows, and how many operators it has by their role."""

    kind: Any
    settings: Mapping[str, Any]
    roles: Mapping[str, int]
    named: Mapping[str, str]  # some operators, and their roles
    rows: Mapping[str, tuple[int, ...]]
    last: str = "proj_out"
    config: str = ""


FOLDERS: Mapping[str, Small] = {
    "dit": Small(
        DiTTransformer2DModel,
        {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 8, "num_layers": 1,
         "sample_size": 8, "num_embeds_ada_norm": 5},
        {"first": 1, "last": 1, "time": 4, "body": 4, "attention": 2},
        {"x_embedder.proj": "first", "final_layer.linear": "last", "t_embedder.mlp.0": "time",
         "blocks.0.adaLN_modulation.1": "time", "blocks.0.attn.qkv": "body"},
        {},
        last="proj_out_2",
    ),
    "pixart": Small(  # told of sizes, which are constant and leave no operators of their own
        PixArtTransformer2DModel,
        {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 8, "num_layers": 1,
         "cross_attention_dim": 24, "caption_channels": 16, "sample_size": 8, "use_additional_conditions": True},
        {"first": 1, "last": 1, "time": 3, "body": 12},
        {"pos_embed.proj": "first", "proj_out": "last", "adaln_single.linear": "time",
         "adaln_single.emb.timestep_embedder.linear_1": "time", "caption_projection.linear_1": "body",
         "transformer_blocks.0.attn2.to_k": "body"},
        {"context": (TOKENS, 16), "mask": (TOKENS,)},
    ),
    "sd3": Small(  # as 3.5: norms of queries and keys, a block that attends twice, and the last, which drops its text
        SD3Transformer2DModel,
        {"sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 12,
         "num_attention_heads": 2, "joint_attention_dim": 16, "caption_projection_dim": 24,
         "pooled_projection_dim": 10, "pos_embed_max_size": 6, "qk_norm": "rms_norm", "dual_attention_layers": (0,)},
        {"first": 1, "last": 1, "time": 9, "body": 26},
        {"pos_embed.proj": "first", "proj_out": "last", "norm_out.linear": "time",
         "time_text_embed.text_embedder.linear_1": "time", "transformer_blocks.1.norm1_context.linear": "time",
         "transformer_blocks.0.attn.to_k": "body", "transformer_blocks.0.attn.add_k_proj": "body",
         "transformer_blocks.0.attn2.to_k": "body", "transformer_blocks.0.ff_context.net.0.proj": "body"},
        {"context": (TOKENS, 16), "pooled": (10,)},
    ),
    "flux": Small(
        FluxTransformer2DModel,
        {"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "guidance_embeds": True,
         "num_attention_heads": 2, "joint_attention_dim": 12, "pooled_projection_dim": 10, "axes_dims_rope": (4, 6, 6)},
        {"first": 1, "last": 1, "time": 10, "body": 18},
        {"x_embedder": "first", "proj_out": "last", "time_text_embed.guidance_embedder.linear_1": "time",
         "transformer_blocks.0.norm1_context.linear": "time", "single_transformer_blocks.0.norm.linear": "time",
         "transformer_blocks.0.attn.to_k": "body", "transformer_blocks.0.attn.add_k_proj": "body",
         "transformer_blocks.0.attn.to_add_out": "body", "single_transformer_blocks.0.proj_out": "body"},
        {"context": (TOKENS, 12), "pooled": (10,)},
        config="size: 8\nguidance: 2.5",
    ),
}  # fmt: skip


def texts(small: Small, formula: ModuleType) -> dict[str, torch.Tensor]:
    """Rows (TEXTS, ...) by name; of masks ones, and zeros where the first two texts end."""
    made = {name: formula.formula_input((TEXTS, *shape)) for name, shape in small.rows.items()}
    if "mask" in made:
        made["mask"] = (torch.arange(TOKENS) < torch.tensor([[2], [4], [TOKENS]])).float()
    return made


def request(name: str, folder: Path, formula: ModuleType, scheme: QuantScheme, **asked: Any) -> Request:
    """The folder in `folder`, and what exports it in two steps after one iteration of learning."""
    small = FOLDERS[name]
    network = small.kind(**small.settings).eval()
    weights = formula.formula_weights(network.state_dict())
    weights[f"{small.last}.weight"] *= 0.3  # untrained and guided, it would make latents without bound
    network.load_state_dict(weights)
    network.save_pretrained(folder / name)
    (folder / "chosen.yml").write_text(small.config)
    told = texts(small, formula)
    save_file(told | {f"empty.{k}": value[-1:].clone() for k, value in told.items()}, folder / "rows.safetensors")
    return Request(
        checkpoint=folder / name, config=folder / "chosen.yml", out=folder / "bundle", scheme=scheme,
        conditions=folder / "rows.safetensors" if told else None, spec=ONCE, steps=2, pictures=2, **asked,
    )  # fmt: skip


def export(name: str, folder: Path, formula: ModuleType) -> Bundle:
    """The folder as a W8A8 bundle, guided by 2 where it is guided by a second call."""
    scheme = QuantScheme(weight_bits=8, activation_bits=8)
    asked = request(name, folder, formula, scheme, guidance=None if name == "flux" else 2.0)
    return build(asked, prepare(asked), lambda *_: None).bundle
