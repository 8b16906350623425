"""A latent text-to-image model small enough for a test: text encoder with tokenizer, guided denoiser, decoder."""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accuquant.calibrate.families.adm_unet import timestep_embedding
from accuquant.calibrate.model import DiffusionModel, TextEncoder
from accuquant.calibrate.scheme import QuantScheme
from accuquant.calibrate.spec import PRESETS, CalibrationSpec
from accuquant.export import build as building
from accuquant.runtime.bundle import Bundle, ByText
from tokenizers import Tokenizer as Library
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn

EXAMPLES = ("red apple", "blue heart", "red heart")


class Network(nn.Module):
    """A denoiser that adds what it was told, by a sequence and, if `pooled`, as a whole, and when."""

    def __init__(self, pooled):
        super().__init__()
        self.first = nn.Conv2d(2, 32, 3, padding=1)
        self.time, self.text = nn.Linear(32, 32), nn.Linear(8, 32)
        self.middle = nn.Conv2d(32, 32, 3, padding=1)
        self.last = nn.Conv2d(32, 2, 3, padding=1)
        self.whole = nn.Linear(4, 32) if pooled else None

    def forward(self, x, t, context, pooled=None):
        told = self.time(timestep_embedding(t, 32)) + self.text(context.flatten(1).reshape(-1, 4, 8)).mean(1)
        told = told if self.whole is None else told + self.whole(pooled)
        h = F.silu(self.first(x) + told[:, :, None, None])
        return self.last(F.silu(self.middle(h)))


class Words(nn.Module):
    def __init__(self, pooled):
        super().__init__()
        self.embedding, self.mix = nn.Embedding(8, 8), nn.Linear(8, 8)
        self.pool = nn.Linear(8, 4) if pooled else None

    def forward(self, tokens):
        sequence = torch.tanh(self.mix(self.embedding(tokens)))
        return sequence if self.pool is None else (sequence, self.pool(sequence.mean(1)))


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


def model(*_, pooled=False):
    torch.manual_seed(0)
    network, words, upscale = Network(pooled), Words(pooled), Upscale()
    inputs = ("context", "pooled") if pooled else ("context",)
    return DiffusionModel(
        family="toy", found="a toy", network=network.eval().requires_grad_(False), sample_shape=(2, 8, 8),
        noise_schedule={
            "num_train_timesteps": 100, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear",
            "prediction_type": "epsilon", "timestep_spacing": "leading", "steps_offset": 0,
        },
        role_of=lambda name: {"first": "first", "last": "last", "time": "time"}.get(name, "body"),
        block_of=lambda name: name, default_sampler="ddim", default_steps=4,
        conditioning=ByText(inputs=inputs, examples=EXAMPLES, guidance=3.0),
        text=TextEncoder(words.eval(), tokenizer()), decoder=upscale.eval(),
    )  # fmt: skip


def request(folder: Path) -> building.Request:
    """An export of it; while it runs, `building.load_model` has to be `model`."""
    (folder / "toy.ckpt").write_bytes(b"toy")
    return building.Request(
        checkpoint=folder / "toy.ckpt",
        out=folder / "bundle",
        scheme=QuantScheme(weight_bits=8, activation_bits=8),
        spec=CalibrationSpec(**PRESETS["smoke"]),
        pictures=6,
    )


def export(folder: Path, pooled: bool = False) -> Bundle:
    """It as a W8A8 bundle of four steps and guidance 3."""
    asked = request(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "load_model", partial(model, pooled=pooled))
        return building.build(asked, building.prepare(asked), lambda *_: None).bundle
