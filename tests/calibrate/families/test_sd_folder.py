"""Stable Diffusion as a folder of diffusers: what diffusers itself computes, a sentence for each setting we lack."""

import json

import numpy as np
import pytest
import torch
from accuquant.calibrate.families import clip_text, load_model
from accuquant.calibrate.lora import Lora, with_loras
from accuquant.calibrate.model import quantize
from accuquant.calibrate.scheme import QuantScheme
from accuquant.runtime.errors import AccuQuantError
from accuquant.runtime.tokenizer import Tokenizer
from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from tokenizers import Tokenizer as Library
from tokenizers.models import BPE

UNET = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 128,
}  # fmt: skip
TWO = {"attention_head_dim": [4, 8], "use_linear_projection": True}  # heads of 8 channels at each level
SCHEDULE = {"num_train_timesteps": 100, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def part(folder, network, formula):
    """A network of diffusers with weights by formula, saved."""
    network.load_state_dict(formula.formula_weights(network.state_dict()))
    network.eval().save_pretrained(folder)
    return network


def text_encoder(folder, formula, stable, version):
    """The golden encoder as transformers saves it."""
    golden = stable.GOLDEN["texts"][version]
    state = formula.formula_weights({k: torch.empty(v) for k, v in golden["state"].items()})
    state = {k: 20 * v if k.endswith(("fc1.bias", "c_fc.bias")) else v for k, v in state.items()}
    if version == "2":
        inside = {k.removeprefix(clip_text.OPEN_CLIP): v for k, v in state.items()}
        state = {f"text_model.{k}": v for k, v in clip_text.own_names(clip_text.from_open_clip(inside, folder)).items()}
    else:
        state = {k.removeprefix(clip_text.HUGGING_FACE): v for k, v in state.items()}
        state["text_model.embeddings.position_ids"] = torch.arange(8)[None]
    folder.mkdir()
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors")
    config = {
        "architectures": ["CLIPTextModel"], "hidden_act": "quick_gelu" if version == "1" else "gelu",
        "num_attention_heads": 2, "max_position_embeddings": 8, "layer_norm_eps": 1e-5,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def tokenizer(folder, version):
    """A vocabulary of single letters, as transformers 4 saves it and as transformers 5 does."""
    tokens = {"!": 0, "a</w>": 1, "b</w>": 2, "<|startoftext|>": 3, "<|endoftext|>": 4}
    folder.mkdir()
    padding = {"content": "!", "lstrip": False} if version == "2" else "<|endoftext|>"
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": padding}))
    if version == "2":
        Library(BPE(tokens, [], end_of_word_suffix="</w>", unk_token="!")).save(str(folder / "tokenizer.json"))
    else:
        (folder / "vocab.json").write_text(json.dumps(tokens))
        (folder / "merges.txt").write_text("#version: 0.2\n")


@pytest.fixture
def make(formula, stable, tmp_path):
    """A pipeline's folder, and the two networks as diffusers has them."""

    def made(version="1", **changed):
        unet = UNet2DConditionModel(**{**UNET, **(TWO if version == "2" else {}), **changed})
        stage = AutoencoderKL(
            block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=32,
            up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, scaling_factor=0.5,
        )  # fmt: skip
        part(tmp_path / "unet", unet, formula)
        part(tmp_path / "vae", stage, formula)
        text_encoder(tmp_path / "text_encoder", formula, stable, version)
        tokenizer(tmp_path / "tokenizer", version)
        chosen = DDIMScheduler if version == "2" else PNDMScheduler
        settings = {"prediction_type": "v_prediction"} if version == "2" else {"skip_prk_steps": True}
        chosen(**SCHEDULE, steps_offset=1, **settings).save_pretrained(tmp_path / "scheduler")
        index = {
            "_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"], "scheduler": ["diffusers", chosen.__name__],
            "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
            "safety_checker": [None, None],
        }  # fmt: skip
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        return tmp_path, unet, stage

    return made


@pytest.mark.parametrize("version", ["1", "2"])
def test_computes_what_diffusers_does(version, make, formula, stable):
    """1e-4 on outputs of order 1: only the order of float32 sums may differ."""
    path, unet, stage = make(version)
    model = load_model(path)
    x, context, t = formula.formula_input((2, 4, 8, 8)), formula.formula_input((2, 5, 128)), torch.tensor([0.0, 61.0])
    golden = stable.GOLDEN["texts"][version]
    with torch.no_grad():
        expected, made = unet(x, t, context).sample, model.network(x, t, context=context)
        np.testing.assert_allclose(made, expected, rtol=0, atol=1e-4)
        np.testing.assert_allclose(model.decoder(x), stage.decode(x / 0.5).sample, rtol=0, atol=1e-4)
        text = model.text.network(torch.tensor(golden["tokens"])).flatten()[::7]
    np.testing.assert_allclose(text, golden["output"], rtol=0, atol=1e-4)
    assert model.sample_shape == (4, 8, 8)
    assert model.noise_schedule["num_train_timesteps"] == 100
    prediction, sampler, padding = {"1": ("epsilon", "plms", 4), "2": ("v_prediction", "ddim", 0)}[version]
    assert (model.noise_schedule["prediction_type"], model.default_sampler) == (prediction, sampler)
    row = Tokenizer(model.text.tokenizer, "")(["a"])[0]
    assert len(row) == 8
    assert row[-1] == padding


def test_loras_find_their_layers(make, tmp_path):
    model = load_model(make()[0])
    state = {}
    for name in ("down_blocks.0.attentions.0.proj_in", "up_blocks.1.attentions.1.proj_out"):
        state[f"unet.{name}.lora_A.weight"] = torch.ones(2, 32, 1, 1)
        state[f"unet.{name}.lora_B.weight"] = torch.ones(32, 2)
    save_file(state, tmp_path / "style.safetensors")
    assert "in 2 layers" in with_loras(model, [Lora(tmp_path / "style.safetensors")]).found


def test_prompts_come_from_a_yaml(make, tmp_path):
    path, *_ = make()
    (tmp_path / "said.yaml").write_text("prompts: [a, b]")
    assert load_model(path, tmp_path / "said.yaml").conditioning.examples == ("a", "b")


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "changed", "words"),
    [
        ("unet", {"in_channels": 9}, "9 channels in and 4 out: an inpainting model"),
        ("unet", {"addition_embed_type": "image"}, "addition_embed_type is 'image'; only None is supported"),
        ("unet", {"transformer_layers_per_block": [1, [2]]}, "transformer_layers_per_block is [1, [2]]"),
        ("unet", {"resnet_time_scale_shift": "scale_shift"}, "scale_shift is 'scale_shift'; only 'default'"),
        ("unet", {"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]}, "its blocks are AttnDownBlock2D"),
        ("unet", {"attention_head_dim": [4, 4, 4]}, "[4, 4, 4] heads of levels [32, 64] wide"),
        ("unet", {"attention_head_dim": 5}, "[5, 5] heads of levels [32, 64] wide"),
        ("unet", {"attention_head_dim": [4, 16]}, "[4, 16] heads of levels [32, 64] wide"),
        ("text_encoder", {"hidden_act": "relu"}, "hidden_act is 'relu'; known: quick_gelu, gelu"),
    ],
)
def test_settings_of_other_networks_are_refused(where, changed, words, make):
    path, *_ = make()
    config = path / where / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changed))
    with pytest.raises(AccuQuantError) as error:
        load_model(path)
    assert words in str(error.value)


def test_a_folder_without_its_text_encoder_is_refused(make):
    path, *_ = make()
    (path / "text_encoder" / "config.json").unlink()
    with pytest.raises(AccuQuantError, match="holds no text encoder"):
        load_model(path)


def test_a_folder_without_its_tokenizer_is_refused(make):
    path, *_ = make()
    (path / "tokenizer" / "merges.txt").unlink()
    with pytest.raises(AccuQuantError, match="is no CLIP tokenizer as transformers saves it"):
        load_model(path)


@pytest.mark.parametrize("version", ["1", "2"])
def test_every_pattern_of_roles_has_an_operator(version, make):
    model = load_model(make(version)[0])
    operators = quantize(model, QuantScheme(weight_bits=8, activation_bits=8, policy="integer"))
    assert model.role_of.unmatched(operators) == {}
