"""The bundled text-to-image model, the whole way: prompts in, pictures of them out, on integer kernels."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from accuquant.calibrate.families import load_model
from accuquant.calibrate.scheme import QuantScheme
from accuquant.calibrate.spec import PRESETS, CalibrationSpec
from accuquant.export.build import Request, build, prepare
from accuquant.runtime.bundle import ByText
from PIL import Image

CHECKPOINT = Path(__file__).parents[2] / "tools" / "reference" / "emoji-ldm.ckpt"
COLOURS = {"red heart": 0, "green heart": 1, "blue heart": 2}  # and which channel is the brightest


def test_checkpoint_is_recognised_and_small():
    model = load_model(CHECKPOINT)
    assert model.family == "ldm"
    assert model.sample_shape == (4, 16, 16)
    assert isinstance(model.conditioning, ByText)
    beside = sum(p.stat().st_size for p in CHECKPOINT.parent.glob("emoji-ldm.*"))
    assert beside < 25e6


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    asked = Request(
        checkpoint=CHECKPOINT,
        out=tmp_path_factory.mktemp("emoji") / "bundle",
        scheme=QuantScheme(weight_bits=4, activation_bits=8),
        spec=CalibrationSpec(**PRESETS["smoke"], compensate="always", initialisation="mse"),
        steps=10,
        pictures=8,
    )
    return build(asked, prepare(asked), lambda *_: None)


@pytest.mark.slow
def test_pictures_stay_the_same(result):
    assert result.comparison.psnr.mean() > 20.0
    assert result.comparison.ssim.mean() > 0.8


@pytest.mark.slow
def test_every_operator_runs_in_integers(result):
    ran = result.comparison.runs_as
    assert len(ran) > 40
    assert {name for name, p in ran.items() if p not in {"i8", "u8"}} == result.comparison.kept_in_float.keys()


@pytest.mark.slow
def test_hearts_have_the_colour_that_was_asked_for(result, tmp_path):
    """Without torch: the command runs where importing it fails."""
    prompts = [word for prompt in COLOURS for word in ("--prompt", prompt)]
    command = (
        "import sys; sys.modules['torch'] = None; sys.argv[0] = 'accuquant-sample';"
        "from accuquant.runtime.cli_sample import main; main()"
    )
    subprocess.run(
        [sys.executable, "-c", command, str(result.bundle.folder), "-n", "6", "--batch", "3", *prompts,
         "--out", str(tmp_path / "hearts")], check=True, capture_output=True,
    )  # fmt: skip
    pictures = [np.asarray(Image.open(path)).astype(int) for path in sorted((tmp_path / "hearts").glob("*.png"))]
    for picture, channel in zip(pictures, list(COLOURS.values()) * 2, strict=True):
        middle = picture[24:40, 24:40].reshape(-1, 3).mean(axis=0)
        assert middle.argmax() == channel, middle
        assert middle[channel] - np.delete(middle, channel).max() > 20
        assert picture[:4].mean() > 230  # on white
