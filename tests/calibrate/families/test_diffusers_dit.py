"""diffusers' DiT folders: what diffusers computes, the traps on the way, the decoder, and words for what is wrong."""

import json

import pytest
import torch
from accuquant.calibrate import folder as folders
from accuquant.calibrate.families import dit, load_model
from accuquant.calibrate.families.diffusers_dit import KIND, NAME
from accuquant.runtime.bundle import ByClass
from accuquant.runtime.errors import AccuQuantError
from diffusers import AutoencoderKL, DDIMScheduler, DiTTransformer2DModel

EMBEDDER = ".norm1.emb."


def transformer(formula, **changes):
    """Two blocks whose embeddings of timestep and class are the same, as in every published folder."""
    settings = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 8,
                "num_layers": 2, "sample_size": 8, "num_embeds_ada_norm": 5}  # fmt: skip
    network = DiTTransformer2DModel(**{**settings, **changes}).eval()
    weights = formula.formula_weights(network.state_dict())
    shared = {
        k.partition(EMBEDDER)[2]: v for k, v in weights.items() if k.startswith("transformer_blocks.0" + EMBEDDER)
    }
    network.load_state_dict({k: shared.get(k.partition(EMBEDDER)[2], v) for k, v in weights.items()})
    return network


def pipeline(path, formula, network):
    """The folder that DiTPipeline.save_pretrained writes, without what nobody reads."""
    network.save_pretrained(path / "transformer", max_shard_size="20KB")
    DDIMScheduler(beta_end=0.03, clip_sample=False).save_pretrained(path / "scheduler")
    autoencoder = vae(formula)
    autoencoder.save_pretrained(path / "vae")
    index = {"_class_name": "DiTPipeline", "_diffusers_version": "0.35.0", "id2label": {"0": "tench"}}
    index |= {
        "scheduler": ["diffusers", "DDIMScheduler"],
        "transformer": ["diffusers", KIND],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (path / "model_index.json").write_text(json.dumps(index))
    return path, autoencoder


def vae(formula, **changes):
    settings = {
        "latent_channels": 4, "block_out_channels": (32, 64), "layers_per_block": 1, "scaling_factor": 0.3,
        "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
    }  # fmt: skip
    network = AutoencoderKL(**{**settings, **changes}).eval()
    network.load_state_dict(formula.formula_weights(network.state_dict()))
    return network


def both(network, model, formula):
    """Noise predictions of diffusers' network, called as its pipeline calls it, and of the model."""
    x, t, y = formula.formula_input((2, 4, 8, 8)), torch.tensor([617, 40]), torch.tensor([1, 5])
    with torch.no_grad():
        theirs = network(x, timestep=t, class_labels=y).sample[:, :4]
        return theirs, model.network(x, t.float(), y)


@pytest.mark.parametrize("changes", [{}, {"out_channels": 4, "norm_eps": 1e-2, "patch_size": 4}], ids=str)
def test_a_transformer_alone_is_diffusers_network(changes, formula, tmp_path):
    network = transformer(formula, **changes)
    network.save_pretrained(tmp_path / "t")
    model = load_model(tmp_path / "t")
    torch.testing.assert_close(*both(network, model, formula), rtol=0, atol=1e-4)
    assert model.conditioning == ByClass(classes=5, null=5, guidance=4.0)
    assert "no decoder" in model.found
    assert model.decoder is None


def test_a_whole_pipeline_brings_schedule_and_decoder_and_reads_shards(formula, tmp_path):
    network = transformer(formula)
    path, autoencoder = pipeline(tmp_path, formula, network)
    assert len(list((path / "transformer").glob("*.safetensors"))) > 1
    model = load_model(path)
    torch.testing.assert_close(*both(network, model, formula), rtol=0, atol=1e-4)
    assert model.noise_schedule["beta_end"] == 0.03
    assert model.default_sampler == "ddim"
    z = formula.formula_input((2, 4, 8, 8))
    with torch.no_grad():
        torch.testing.assert_close(model.decoder(z), autoencoder.decode(z / 0.3).sample, rtol=0, atol=1e-4)


def test_the_spacing_of_frequencies_is_diffusers_and_the_authors_on_request(formula, tmp_path):
    """The trap: with the same weights the two disagree, so a wrong one would be seen."""
    network = transformer(formula)
    network.save_pretrained(tmp_path / "t")
    (tmp_path / "c.yml").write_text("downscale_freq_shift: 0")
    asked = load_model(tmp_path / "t", tmp_path / "c.yml")
    theirs, ours = both(network, asked, formula)
    assert (theirs - ours).abs().max() > 1e-2
    for block in network.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    torch.testing.assert_close(*both(network, asked, formula), rtol=0, atol=1e-4)


def test_a_shifted_decoder_is_diffusers_too(formula, tmp_path):
    """As SD3's and Flux's are: a shift factor, and no convolution before the decoder."""
    path, autoencoder = pipeline(tmp_path, formula, transformer(formula))
    autoencoder = vae(formula, shift_factor=0.2, use_post_quant_conv=False, use_quant_conv=False)
    autoencoder.save_pretrained(path / "vae")
    z = formula.formula_input((1, 4, 8, 8))
    with torch.no_grad():
        expected = autoencoder.decode(z / 0.3 + 0.2).sample
        torch.testing.assert_close(load_model(path).decoder(z), expected, rtol=0, atol=1e-4)


def test_the_published_size(formula):
    """749.83 M numbers as diffusers has them; shared and without the variance about the authors' 675 M."""
    with torch.device("meta"):
        network = DiTTransformer2DModel(out_channels=8)
        own = dit.DiT(dit.DitConfig(32, 2, 4, 1152, 28, 16, 4608, 1000))
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(749.83, abs=0.01)
    assert sum(p.numel() for p in own.parameters()) / 1e6 == pytest.approx(675.1, abs=0.5)


def edit(path, **changes):
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(settings | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"activation_fn": "geglu"}, "activation_fn is 'geglu'"),
        ({"num_layers": 3}, "does not fit the network"),
        ({"sample_size": None}, "sample_size is None"),
        ({"_class_name": "UNet3DConditionModel"}, r"folder of no known family \(it holds UNet3DConditionModel\)"),
    ],
)
def test_settings_that_do_not_fit_are_named(changes, words, formula, tmp_path):
    transformer(formula).save_pretrained(tmp_path / "t")
    edit(tmp_path / "t", **changes)
    with pytest.raises(AccuQuantError, match=words):
        load_model(tmp_path / "t")


def test_blocks_that_embed_in_different_ways_are_refused(formula, tmp_path):
    network = transformer(formula)
    with torch.no_grad():
        network.transformer_blocks[1].norm1.emb.timestep_embedder.linear_1.weight[0, 0] += 1
    network.save_pretrained(tmp_path / "t")
    with pytest.raises(AccuQuantError, match="block 1 embeds timesteps or classes in another way than block 0"):
        load_model(tmp_path / "t")


def test_what_does_not_fit_into_memory_says_so_before_it_is_read(formula, tmp_path, monkeypatch):
    network = transformer(formula)
    network.save_pretrained(tmp_path / "t")
    stored = sum(v.numel() for v in network.state_dict().values())
    monkeypatch.setattr(folders.psutil, "virtual_memory", lambda: type("", (), {"available": 4 * stored - 1}))
    monkeypatch.setattr(folders.Shards, "__getitem__", lambda *_: pytest.fail("read"))
    with pytest.raises(AccuQuantError, match=r"parameters, .* GiB in float32, and .* GiB of memory are free"):
        load_model(tmp_path / "t")


def damage_cut(path):
    shard = next((path / "transformer").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:100])


def damage_index(path):
    index = path / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: next((path / "transformer").glob("*.safetensors")).unlink(), "is missing; copy the folder again"),
        (damage_cut, "is not a readable safetensors file"),
        (lambda path: [f.unlink() for f in (path / "transformer").glob("*safetensors*")], "safe_serialization=True"),
        (lambda path: (path / "model_index.json").write_text("{"), r"model_index\.json cannot be read as JSON"),
        (lambda path: (path / "model_index.json").write_text('{"../x": ["a", "b"]}'), "not a folder of it"),
        (lambda path: (path / "model_index.json").write_text('{"..": ["a", "b"]}'), "not a folder of it"),
        (damage_index, "lists no shards of its folder"),
        (lambda path: (path / "model_index.json").write_text("{}"), "no parts with settings"),
    ],
)
def test_damaged_folders_are_named(damage, words, formula, tmp_path):
    path, _ = pipeline(tmp_path, formula, transformer(formula))
    damage(path)
    with pytest.raises(AccuQuantError, match=words):
        load_model(path)


def test_options_that_are_none_are_named(formula, tmp_path):
    transformer(formula).save_pretrained(tmp_path / "t")
    (tmp_path / "c.yml").write_text("heads: 3")
    with pytest.raises(AccuQuantError, match="may be chosen: downscale_freq_shift"):
        load_model(tmp_path / "t", tmp_path / "c.yml")


def test_the_family_is_named_among_the_known(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "Other"}')
    with pytest.raises(AccuQuantError, match=NAME):
        load_model(tmp_path)
