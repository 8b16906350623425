"""A latent text-to-image model all the way: text encoder, guided denoiser and decoder as engines of one bundle."""

import shutil
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accuquant.calibrate.families.adm_unet import timestep_embedding
from accuquant.calibrate.model import DiffusionModel, TextEncoder
from accuquant.calibrate.scheme import QuantScheme
from accuquant.calibrate.spec import PRESETS, CalibrationSpec
from accuquant.calibrate.trajectory import simulate
from accuquant.export import build as building
from accuquant.export import companions
from accuquant.runtime import cli_sample
from accuquant.runtime.bundle import Bundle, ByText
from accuquant.runtime.errors import AccuQuantError
from accuquant.runtime.pictures import to_uint8
from accuquant.runtime.pipeline import Pipeline
from tokenizers import Tokenizer as Library
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn

EXAMPLES = ("red apple", "blue heart", "red heart")


class Network(nn.Module):
    """A denoiser that adds what it was told, by a sequence and as a whole, and when, to every position."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 32, 3, padding=1)
        self.time, self.text, self.whole = nn.Linear(32, 32), nn.Linear(8, 32), nn.Linear(4, 32)
        self.middle = nn.Conv2d(32, 32, 3, padding=1)
        self.last = nn.Conv2d(32, 2, 3, padding=1)

    def forward(self, x, t, context, pooled):
        told = self.time(timestep_embedding(t, 32)) + self.text(context.flatten(1).reshape(-1, 4, 8)).mean(1)
        told = told + self.whole(pooled)
        h = F.silu(self.first(x) + told[:, :, None, None])
        return self.last(F.silu(self.middle(h)))


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.mix, self.pool = nn.Embedding(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, tokens):
        sequence = torch.tanh(self.mix(self.embedding(tokens)))
        return sequence, self.pool(sequence.mean(1))


class Upscale(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1)

    def forward(self, z):
        return torch.tanh(self.conv(F.interpolate(z, scale_factor=2.0, mode="nearest")))


def tokenizer():
    names = ["<pad>", "<unk>", "red", "blue", "apple", "heart"]
    library = Library(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    library.pre_tokenizer = Whitespace()
    library.enable_padding(length=4, pad_id=0, pad_token="<pad>")
    library.enable_truncation(4)
    return library.to_str()


def model(*_):
    torch.manual_seed(0)
    network, words, upscale = Network(), Words(), Upscale()
    return DiffusionModel(
        family="toy", found="a toy", network=network.eval().requires_grad_(False), sample_shape=(2, 8, 8),
        noise_schedule={
            "num_train_timesteps": 100, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear",
            "prediction_type": "epsilon", "timestep_spacing": "leading", "steps_offset": 0,
        },
        role_of=lambda name: {"first": "first", "last": "last", "time": "time"}.get(name, "body"),
        block_of=lambda name: name, default_sampler="ddim", default_steps=4,
        conditioning=ByText(inputs=("context", "pooled"), examples=EXAMPLES, guidance=3.0),
        text=TextEncoder(words.eval(), tokenizer()),
        decoder=upscale.eval(),
    )  # fmt: skip


@pytest.fixture(scope="module")
def request_(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "toy.ckpt").write_bytes(b"toy")
    return building.Request(
        checkpoint=folder / "toy.ckpt",
        out=folder / "bundle",
        scheme=QuantScheme(weight_bits=8, activation_bits=8),
        spec=CalibrationSpec(**PRESETS["smoke"]),
        pictures=6,
    )


@pytest.fixture(scope="module")
def bundle(request_):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "load_model", model)
        return building.build(request_, building.prepare(request_), lambda *_: None).bundle


def test_the_bundle_holds_every_network_and_the_tokenizer(bundle):
    assert set(bundle.manifest.networks) == {"denoiser", "twin", "text_encoder", "decoder"}
    assert "tokenizer.json" in bundle.manifest.networks["text_encoder"].files


def test_the_twin_paints_what_torch_paints(bundle):
    """Latents to 1e-3, as in other tests of whole chains; pixels to one level of 255."""
    toy, prompts = model(), ["blue apple", "red heart", "blue apple"]
    network = toy.guided(3.0)
    condition = dict(zip(("context", "pooled"), toy.text(prompts), strict=True))
    run = simulate(network, bundle.plan, [5, 6, 7], toy.sample_shape, condition)
    with torch.no_grad():
        expected = to_uint8(toy.decoder(run.states[-1]).numpy())
    with Pipeline(bundle, network="twin", batch=2) as pipeline:
        latents = pipeline.generate([5, 6, 7], prompts=prompts)
        np.testing.assert_allclose(latents, run.states[-1].numpy(), rtol=0, atol=1e-3)
        assert np.abs(pipeline.pictures(latents).astype(int) - expected).max() <= 1


def test_a_picture_depends_on_its_seed_and_prompt_alone(bundle):
    with Pipeline(bundle, batch=4) as pipeline:
        alone = pipeline.generate([9], prompts=["blue heart"])
        among = pipeline.generate([1, 9, 9], prompts=["red apple", "blue heart", "red apple"])
    np.testing.assert_array_equal(among[1], alone[0])
    assert np.abs(among[2] - alone[0]).max() > 0.01


def test_a_negative_prompt_takes_the_place_of_none(bundle):
    with Pipeline(bundle, batch=1) as pipeline:
        plain, empty = pipeline.generate([3]), pipeline.generate([3], unwanted="")
        away = pipeline.generate([3], unwanted="blue")
    np.testing.assert_array_equal(plain, empty)
    assert np.abs(away - plain).max() > 0.01
    with Pipeline(bundle, batch=1, guidance=1.0) as pipeline, pytest.raises(AccuQuantError, match="through guidance"):
        pipeline.generate([3], unwanted="blue")


def test_conditions_of_the_other_kind_are_refused(bundle, tiny_bundle):
    with Pipeline(bundle, batch=1) as pipeline, pytest.raises(AccuQuantError, match="the network takes prompts"):
        pipeline.generate([0], classes=[1])
    with Pipeline(tiny_bundle, batch=1) as pipeline, pytest.raises(AccuQuantError, match="takes no condition"):
        pipeline.generate([0], prompts=["red"])


def test_a_changed_tokenizer_is_found(bundle, tmp_path):
    shutil.copytree(bundle.folder, tmp_path / "b")
    (tmp_path / "b" / "tokenizer.json").write_text("{}")
    with pytest.raises(AccuQuantError, match=r"tokenizer\.json is not the file the manifest describes"):
        Bundle(tmp_path / "b")


def test_a_decoder_that_exports_wrongly_leaves_no_bundle(request_, tmp_path, monkeypatch):
    wrong = building.Request(**{**vars(request_), "out": tmp_path / "wrong"})
    traced = companions._trace

    def off(network, name, example, outputs):
        graph = traced(network, name, example, outputs)
        for value in graph.graph.initializers.values():
            if value.const_value is not None and value.const_value.shape.rank() == 4:
                value.const_value = companions.ir.tensor(value.const_value.numpy() * 1.1)
        return graph

    monkeypatch.setattr(building, "load_model", model)
    monkeypatch.setattr(companions, "_trace", off)
    with pytest.raises(AccuQuantError, match="the exported decoder differs from the model"):
        building.build(wrong, building.prepare(wrong), lambda *_: None)
    assert not (tmp_path / "wrong").exists()


def test_the_command_paints_prompts(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys, "argv",
        ["accuquant-sample", str(bundle.folder), "-n", "2", "--prompt", "red apple", "--prompt", "blue heart",
         "--negative-prompt", "red", "--guidance", "4", "--out", str(tmp_path / "folder")],
    )  # fmt: skip
    with pytest.raises(SystemExit) as done:
        cli_sample.main()
    assert done.value.code == 0
    assert len(list((tmp_path / "folder").glob("*.png"))) == 2
