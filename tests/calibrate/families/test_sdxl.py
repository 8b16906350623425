"""Stable Diffusion XL: what diffusers and transformers compute, from a folder and from one file; what is refused."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from accuquant.calibrate.families import ldm, load_model, sd_folder, sdxl
from accuquant.calibrate.families.adm_unet import AdmUNet
from accuquant.calibrate.folder import Part
from accuquant.calibrate.lora import Lora, with_loras
from accuquant.calibrate.scheme import QuantScheme
from accuquant.calibrate.spec import PRESETS, CalibrationSpec
from accuquant.calibrate.trace import trace
from accuquant.calibrate.trajectory import simulate
from accuquant.export.build import Request, build, prepare
from accuquant.runtime import cli_sample
from accuquant.runtime.errors import AccuQuantError
from accuquant.runtime.noise import batch
from accuquant.runtime.pipeline import Pipeline
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import save_file

GOLDEN = json.loads((Path(__file__).parent / "golden_sdxl.json").read_text())
UNET, FIRST, SECOND = ldm.UNET, sdxl.FIRST, sdxl.SECOND
TOLD = {"original_size": [24, 40], "crop": [3, 7], "target_size": [16, 32]}  # no two alike
TEXTS = ("a b", "", "d c a b d c a b a a")  # one of them too long


@pytest.fixture(scope="module")
def saved(formula, stable_xl, tmp_path_factory):
    """The folder and its networks; tests that change something work on a copy of what they change."""
    folder = tmp_path_factory.mktemp("xl") / "folder"
    return folder, stable_xl.save_folder(folder, formula)


@pytest.fixture(scope="module")
def model(saved):
    return load_model(saved[0])


@pytest.fixture(scope="module")
def state(model, saved, stable_xl):
    return stable_xl.single(model, saved[1])


@pytest.fixture(scope="module")
def alone(state, stable_xl, tmp_path_factory):
    """The same weights in one file."""
    return load_model(stable_xl.save_single(tmp_path_factory.mktemp("xl"), state))


def expected_rows(networks, stable_xl, layer=-2, paddings=(6, 0)):
    """What transformers makes of TEXTS: both encoders' hidden states side by side, and the second's projection."""
    texts = [" ".join(text.split()[: stable_xl.LENGTH - 2]) for text in TEXTS]
    with torch.no_grad():
        near, far = (
            networks[name](stable_xl.tokens(padding, *texts), output_hidden_states=True)
            for name, padding in zip(("text_encoder", "text_encoder_2"), paddings, strict=True)
        )
    return torch.cat([near.hidden_states[layer], far.hidden_states[layer]], dim=2), far.text_embeds


def test_both_encoders_are_read_as_transformers_reads_them(model, alone, saved, stable_xl):
    """1e-4 on outputs of order 1: only the order of float32 sums may differ."""
    expected = expected_rows(saved[1], stable_xl)
    for made in (model.text(TEXTS), alone.text(TEXTS)):
        for mine, theirs in zip(made, expected, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("wrong", [{"layer": -1}, {"layer": -3}, {"paddings": (6, 6)}, {"paddings": (0, 0)}])
def test_another_layer_or_padding_would_be_seen(wrong, saved, stable_xl):
    right, other = expected_rows(saved[1], stable_xl), expected_rows(saved[1], stable_xl, **wrong)
    assert (right[0] - other[0]).abs().max() > 1e-2


def network_output(model, formula):
    x, t = formula.formula_input((2, 4, 8, 8)), torch.tensor([0.0, 617.0])
    context, pooled = formula.formula_input((2, 5, 192)), formula.formula_input((2, 96))
    with torch.no_grad():
        return model.network(x, t, context, pooled)


def diffusers_output(unet, formula, sizes):
    x, t = formula.formula_input((2, 4, 8, 8)), torch.tensor([0.0, 617.0])
    context, pooled = formula.formula_input((2, 5, 192)), formula.formula_input((2, 96))
    told = {"text_embeds": pooled, "time_ids": torch.tensor([sizes] * 2, dtype=torch.float32)}
    with torch.no_grad():
        return unet(x, t, context, added_cond_kwargs=told).sample


def test_the_network_is_diffusers_own_told_six_sizes_in_their_order(saved, formula, tmp_path):
    folder, networks = saved
    (tmp_path / "told.yaml").write_text(json.dumps(TOLD))
    made = network_output(load_model(folder, tmp_path / "told.yaml"), formula)
    sizes = [24, 40, 3, 7, 16, 32]
    np.testing.assert_allclose(made, diffusers_output(networks["unet"], formula, sizes), rtol=0, atol=1e-4)
    for swapped in ([40, 24, 3, 7, 16, 32], [24, 40, 7, 3, 16, 32], [16, 32, 3, 7, 24, 40]):
        assert (made - diffusers_output(networks["unet"], formula, swapped)).abs().max() > 1e-3


def test_agrees_with_the_authors_code(state, formula, stable_xl, tmp_path):
    """Of the original's own names and order of sizes; the first encoder is transformers' there too."""
    unet, text = (
        formula.formula_weights({name: torch.empty(shape) for name, shape in GOLDEN[part]["state"].items()})
        for part in ("unet", "text")
    )
    text = {key: 20 * value if key.endswith("c_fc.bias") else value for key, value in text.items()}
    rest = {key: value for key, value in state.items() if not key.startswith((UNET, SECOND))}
    model = load_model(stable_xl.save_single(tmp_path, rest | unet | text, **GOLDEN["sizes"]))
    made = network_output(model, formula).flatten()[::3]
    np.testing.assert_allclose(made, GOLDEN["unet"]["output"], rtol=0, atol=1e-4)
    with torch.no_grad():
        context, pooled = model.text.network(torch.tensor(GOLDEN["text"]["tokens"]))
    np.testing.assert_allclose(context[..., 64:].flatten()[::7], GOLDEN["text"]["context"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(pooled.flatten(), GOLDEN["text"]["pooled"], rtol=0, atol=1e-4)


def sample(model, steps, prompt="a b"):
    condition = dict(zip(("context", "pooled"), model.text([prompt]), strict=True))
    plan = trace("euler", model.noise_schedule, steps)
    return simulate(model.guided(5.0), plan, [3], model.sample_shape, condition)


def test_one_file_is_the_folder(model, alone, formula):
    assert alone.sample_shape == model.sample_shape == (4, 8, 8)
    assert alone.conditioning == model.conditioning
    assert (alone.default_sampler, alone.decoder.scale) == (model.default_sampler, 0.13025) == ("euler", 0.13025)
    plans = [trace("euler", m.noise_schedule, 2) for m in (model, alone)]
    assert plans[0] == plans[1]
    runs = [
        simulate(
            m.guided(5.0), plans[0], [3], (4, 8, 8), dict(zip(("context", "pooled"), m.text(["a b"]), strict=True))
        )
        for m in (model, alone)
    ]
    torch.testing.assert_close(runs[0].states, runs[1].states, rtol=0, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(model.decoder(runs[0].states[-1]), alone.decoder(runs[0].states[-1]))


@pytest.mark.parametrize("zeros", [True, False])
def test_samples_are_those_of_diffusers_pipeline(zeros, saved, model, tmp_path):
    """Text to latent, with what its model_index says of the absent prompt; 1e-3 of latents of order 10, guided."""
    folder, _ = saved
    pipe = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False, force_zeros_for_empty_prompt=zeros)
    pipe.set_progress_bar_config(disable=True)
    (tmp_path / "zeros.yaml").write_text(json.dumps({"force_zeros_for_empty_prompt": zeros}))
    ours = model if zeros else load_model(folder, tmp_path / "zeros.yaml")
    assert ours.conditioning.zeros_for_none is zeros
    start = torch.from_numpy(batch([3], -1, (4, 8, 8)))
    theirs = pipe(
        "a b", num_inference_steps=3, guidance_scale=5.0, latents=start, height=16, width=16, output_type="latent"
    ).images
    size = theirs.abs().max()
    assert (sample(ours, 3).states[-1] - theirs).abs().max() / size < 1e-3
    assert zeros or (sample(model, 3).states[-1] - theirs).abs().max() / size > 3e-3


def test_what_the_folder_says_of_the_absent_prompt_holds(saved, model):
    folder, _ = saved
    index = folder / "model_index.json"
    before = index.read_text()
    assert model.conditioning.zeros_for_none
    try:
        index.write_text(json.dumps(json.loads(before) | {"force_zeros_for_empty_prompt": False}))
        other = load_model(folder)
    finally:
        index.write_text(before)
    assert not other.conditioning.zeros_for_none
    assert "guided against the empty text" in other.found


def test_the_published_network_has_its_size(tmp_path):
    """Built without memory: 2,567,463,684 parameters, in heads of 64 channels."""
    settings = {
        "in_channels": 4, "out_channels": 4, "layers_per_block": 2, "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "attention_head_dim": [5, 10, 20],
        "transformer_layers_per_block": [1, 2, 10], "cross_attention_dim": 2048, "use_linear_projection": True,
    }  # fmt: skip
    made = sd_folder.unet_config(Part(tmp_path, "UNet2DConditionModel", settings))
    with torch.device("meta"):
        network = AdmUNet(replace(made, vector=2816))
    assert made.head_channels == 64
    assert sum(p.numel() for p in network.parameters()) == 2_567_463_684


# -- LoRA ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("lora_unet_output_blocks_1_1_transformer_blocks_1_attn2_to_v",
         "unet.output_blocks.1.1.transformer_blocks.1.attn2.to_v"),
        ("unet.add_embedding.linear_1", "unet.label_emb.0.0"),
        ("lora_te1_text_model_encoder_layers_2_mlp_fc1", "first.encoder.layers.2.mlp.fc1"),
        ("lora_te2_text_model_encoder_layers_2_mlp_fc1", "second.encoder.layers.2.mlp.fc1"),
        ("text_encoder.text_model.encoder.layers.0.mlp.fc2", "first.encoder.layers.0.mlp.fc2"),
        ("text_encoder_2.text_model.encoder.layers.0.mlp.fc2", "second.encoder.layers.0.mlp.fc2"),
    ],
)  # fmt: skip
def test_loras_reach_every_part(name, place, model, tmp_path):
    module = (model.network if place.startswith("unet") else model.text.network).get_submodule(place)
    before = module.weight.clone()
    down, up = ("lora_down", "lora_up") if name.startswith("lora_") else ("lora_A", "lora_B")
    made = {f"{name}.{down}.weight": torch.ones(2, before.shape[1]), f"{name}.{up}.weight": torch.ones(len(before), 2)}
    save_file(made, tmp_path / "style.safetensors")
    lora = Lora(tmp_path / "style.safetensors", 0.5)
    with_loras(model, [lora])
    torch.testing.assert_close(module.weight, before + 1)
    with torch.no_grad():
        module.weight.copy_(before)


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        (f"{UNET}input_blocks.0.0.weight", torch.zeros(64, 9, 3, 3), "an inpainting model"),
        (f"{UNET}label_emb.0.0.weight", torch.zeros(256, 93), "a vector of 93"),
        ("v_pred", torch.zeros(1), "it predicts v; save it as a folder with diffusers"),
        ("edm_mean", torch.zeros(1), "of the EDM kind (Playground 2.5)"),
        ("conditioner.embedders.0.model.x", torch.zeros(1), "XL's refiner"),
        (f"{SECOND}token_embedding.weight", None, f"it has no {SECOND}token_embedding.weight"),
        (f"{SECOND}text_projection", None, f"{SECOND}text_projection is missing"),
        (f"{FIRST}text_model.final_layer_norm.bias", None, "final_layer_norm.bias is missing"),
    ],
)
def test_other_files_are_refused_by_name(name, value, words, state, stable_xl, tmp_path):
    """`value` stands in the place of a tensor, or none does."""
    changed = {key: tensor for key, tensor in (state | {name: value}).items() if tensor is not None}
    with pytest.raises(AccuQuantError) as error:
        load_model(stable_xl.save_single(tmp_path, changed))
    assert words in str(error.value)


def test_a_yaml_has_the_choices_of_distilled_models(state, stable_xl, tmp_path):
    model = load_model(stable_xl.save_single(tmp_path, state, timestep_spacing="trailing", guidance=1.0))
    assert trace("euler", model.noise_schedule, 4).timesteps == {999.0, 749.0, 499.0, 249.0}
    assert model.conditioning.guidance == 1.0


def test_a_latent_that_cannot_be_halved_is_refused(state, stable_xl, tmp_path):
    with pytest.raises(AccuQuantError, match="a latent of 6x6 cannot be halved 2 times"):
        load_model(stable_xl.save_single(tmp_path, state, size=6))


@pytest.mark.parametrize(
    ("where", "changed", "words"),
    [
        ("model_index.json", {"requires_aesthetics_score": True}, "XL's refiner"),
        ("model_index.json", {"text_encoder_2": [None, None]}, "holds no text_encoder_2 (CLIPTextModelWithProjection)"),
        ("unet/config.json", {"in_channels": 9}, "an inpainting model"),
        ("unet/config.json", {"projection_class_embeddings_input_dim": 100}, "a vector of 100"),
        ("scheduler/scheduler_config.json", {"_class_name": "EDMEulerScheduler"}, "its scheduler is EDMEulerScheduler"),
        ("tokenizer_2/vocab.json", {"a</w>": 2, "b</w>": 1}, "tokenizer and tokenizer_2 have other words"),
    ],
)
def test_other_folders_are_refused_by_name(where, changed, words, saved):
    file = saved[0] / where
    before = file.read_text()
    try:
        file.write_text(json.dumps(json.loads(before) | changed))
        with pytest.raises(AccuQuantError) as error:
            load_model(saved[0])
    finally:
        file.write_text(before)
    assert words in str(error.value)


# -- the whole way ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_prompts_become_pictures_on_the_engine(state, stable_xl, tmp_path, monkeypatch):
    """One file to a bundle, whose twin samples what torch does, and the command that paints prompts."""
    path = stable_xl.save_single(tmp_path, state, prompts=["a b", "c d"])
    asked = Request(
        checkpoint=path, out=tmp_path / "bundle", scheme=QuantScheme(weight_bits=8, activation_bits=8),
        spec=CalibrationSpec(**PRESETS["smoke"]), steps=4, pictures=4,
    )  # fmt: skip
    bundle = build(asked, prepare(asked), lambda *_: None).bundle
    assert bundle.manifest.conditioning.zeros_for_none
    weights = [math.prod(tensor.dims) for tensor in onnx.load(bundle.graph("text_encoder")).graph.initializer]
    model = load_model(path)
    expected = sample(model, 4, "d a").states[-1].numpy()
    with Pipeline(bundle, network="twin", batch=1) as pipeline:
        made = pipeline.generate([3], prompts=["d a"])
        assert np.abs(made - expected).max() / np.abs(expected).max() < 1e-3
        away = pipeline.generate([3], prompts=["d a"], unwanted="c")
    assert np.abs(away - made).max() > 1e-2
    never = [model.text.network.first.encoder["layers"][-1], model.text.network.first.final_layer_norm]
    unused = sum(p.numel() for part in never for p in part.parameters())
    assert sum(weights) < sum(p.numel() for p in model.text.network.parameters()) - unused / 2
    monkeypatch.setattr(
        sys,
        "argv",
        ["accuquant-sample", str(bundle.folder), "-n", "2", "--prompt", "a d", "--out", str(tmp_path / "p")],
    )
    with pytest.raises(SystemExit) as done:
        cli_sample.main()
    assert done.value.code == 0
    assert len(list((tmp_path / "p").glob("*.png"))) == 2
