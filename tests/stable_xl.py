"""A small Stable Diffusion XL, as diffusers and transformers themselves save it and as one file, weights by formula."""

import json
import re

import torch
from accuquant.calibrate.families import clip_tokenizer, sdxl
from accuquant.calibrate.scheme import QuantScheme
from accuquant.calibrate.spec import PRESETS, CalibrationSpec
from accuquant.export.build import build, prepare
from accuquant.export.request import Request
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

LENGTH = 8
WORDS = {"!": 0, "a</w>": 1, "b</w>": 2, "c</w>": 3, "d</w>": 4, clip_tokenizer.START: 5, clip_tokenizer.END: 6}
# Heads of 64 channels; transformers of another depth at each level, the shallowest with none.
UNET = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "block_out_channels": (64, 64, 128),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": [1, 1, 2],
    "transformer_layers_per_block": [1, 1, 2], "cross_attention_dim": 64 + 128, "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 16,
    "projection_class_embeddings_input_dim": 96 + 6 * 16,
}  # fmt: skip
SCHEDULE = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading", "steps_offset": 1,
}  # fmt: skip
INDEX = {
    "_class_name": "StableDiffusionXLPipeline", "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"], "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"], "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "image_encoder": [None, None], "feature_extractor": [None, None],
}  # fmt: skip


def part(folder, network, formula):
    """A network with weights by formula, saved."""
    weights = formula.formula_weights(network.state_dict())
    network.load_state_dict(weights)
    network.eval().save_pretrained(folder)
    return network


def encoder(kind, width, depth, activation):
    config = CLIPTextConfig(
        vocab_size=len(WORDS), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=depth,
        num_attention_heads=width // 64, max_position_embeddings=LENGTH, hidden_act=activation, projection_dim=96,
        bos_token_id=WORDS[clip_tokenizer.START], eos_token_id=WORDS[clip_tokenizer.END], pad_token_id=0,
    )  # fmt: skip
    return kind(config)


def tokenizer(folder, padding):
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(WORDS))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    said = {"pad_token": padding, "unk_token": clip_tokenizer.END, "model_max_length": LENGTH}
    said |= {"bos_token": clip_tokenizer.START, "eos_token": clip_tokenizer.END, "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))


def save_folder(folder, formula, **index):
    """A pipeline's folder, and its networks by their names there."""
    stage = AutoencoderKL(
        block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=32,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, scaling_factor=0.13025,
    )  # fmt: skip
    made = {
        "unet": UNet2DConditionModel(**UNET),
        "vae": stage,
        "text_encoder": encoder(CLIPTextModel, 64, 3, "quick_gelu"),
        "text_encoder_2": encoder(CLIPTextModelWithProjection, 128, 3, "gelu"),
    }
    for name, network in made.items():
        part(folder / name, network, formula)
    tokenizer(folder / "tokenizer", clip_tokenizer.END)
    tokenizer(folder / "tokenizer_2", "!")
    EulerDiscreteScheduler(**SCHEDULE).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(INDEX | index))
    return made


def tokens(padding, *texts):
    """What transformers' tokenizer makes of single letters."""
    rows = []
    for text in texts:
        row = [WORDS[clip_tokenizer.START], *(WORDS[f"{word}</w>"] for word in text.split())]
        row.append(WORDS[clip_tokenizer.END])
        rows.append(row + [padding] * (LENGTH - len(row)))
    return torch.tensor(rows)


def open_clip(weights):
    """transformers' second encoder under OpenCLIP's names."""
    names = [
        (r"^text_model\.", ""), (r"embeddings\.token_embedding\.", "token_embedding."),
        (r"embeddings\.position_embedding\.weight", "positional_embedding"), (r"final_layer_norm\.", "ln_final."),
        (r"encoder\.layers\.", "transformer.resblocks."), (r"\.layer_norm([12])\.", r".ln_\1."),
        (r"\.mlp\.fc1\.", ".mlp.c_fc."), (r"\.mlp\.fc2\.", ".mlp.c_proj."),
        (r"\.self_attn\.out_proj\.", ".attn.out_proj."), (r"\.self_attn\.q_proj\.", ".attn.in_proj_"),
    ]  # fmt: skip
    made = {"logit_scale": torch.ones(())}
    for key, value in weights.items():
        if ".k_proj." in key or ".v_proj." in key or key.endswith("position_ids"):
            continue
        name = key
        for pattern, other in names:
            name = re.sub(pattern, other, name)
        if ".q_proj." in key:
            value = torch.cat([weights[key.replace(".q_proj.", f".{c}_proj.")] for c in "qkv"])
        if key == "text_projection.weight":
            name, value = "text_projection", value.T
        made[name] = value
    return made


def single(model, networks):
    """The weights of a loaded folder as the original keeps them."""
    first = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in networks["text_encoder"].state_dict().items()}
    parts = {
        "model.diffusion_model.": model.network.unet.state_dict(),
        "first_stage_model.": model.decoder.state_dict(),
        sdxl.FIRST: first,
        sdxl.SECOND: open_clip(networks["text_encoder_2"].state_dict()),
    }
    return {prefix + k: v.detach().clone().contiguous() for prefix, state in parts.items() for k, v in state.items()}


def save_single(folder, state, **choices):
    """One file with its tokenizer and choices (the latent is 8 wide) beside it."""
    folder.mkdir(exist_ok=True)
    path = folder / "xl.safetensors"
    save_file(state, path)
    text = clip_tokenizer.tokenizer_json([], WORDS, LENGTH, clip_tokenizer.END)
    path.with_suffix(".tokenizer.json").write_text(text)
    path.with_suffix(".yaml").write_text(json.dumps({"size": 8, **choices}))  # JSON is YAML
    return path


def export(folder, formula):
    """The folder as a W8A8 bundle."""
    save_folder(folder / "sdxl", formula)
    request = Request(
        checkpoint=folder / "sdxl", out=folder / "bundle", scheme=QuantScheme(weight_bits=8, activation_bits=8),
        spec=CalibrationSpec(**PRESETS["smoke"] | {"iterations": 0, "trajectories": 2, "held_out": 1}), steps=2,
        pictures=2,
    )  # fmt: skip
    return build(request, prepare(request), lambda *_: None).bundle
