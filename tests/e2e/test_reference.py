"""The bundled, trained model, the whole way: the numbers a newcomer is promised.

Quick presets, few steps and few seeds: what is asserted here are floors well below what the default preset reaches, on
pictures that no calibration saw. The full measurement is `tools/compare_methods.py`.
"""

from pathlib import Path

import pytest
from accuquant.calibrate.cache import TrajectoryCache
from accuquant.calibrate.families import load_model
from accuquant.calibrate.scheme import QuantScheme
from accuquant.calibrate.spec import PRESETS, CalibrationSpec
from accuquant.export.build import Request, build, prepare

CHECKPOINT = Path(__file__).parents[2] / "tools" / "reference" / "fashion-ddim.ckpt"


def test_checkpoint_is_recognised_and_small():
    model = load_model(CHECKPOINT)
    assert model.family == "ddim"
    assert model.sample_shape == (1, 28, 28)
    assert 2e6 < sum(p.numel() for p in model.network.parameters()) < 4e6
    assert CHECKPOINT.stat().st_size < 10e6


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return TrajectoryCache(tmp_path_factory.mktemp("teacher"), 1 << 30)


@pytest.fixture(scope="module", params=[(8, 8), (4, 8)], ids=["w8a8", "w4a8"])
def result(request, teacher, tmp_path_factory):
    weight_bits, activation_bits = request.param
    asked = Request(
        checkpoint=CHECKPOINT,
        out=tmp_path_factory.mktemp("reference") / "bundle",
        scheme=QuantScheme(weight_bits=weight_bits, activation_bits=activation_bits),
        spec=CalibrationSpec(**PRESETS["smoke"]),
        steps=20,
        pictures=8,
        cache=teacher,
    )
    return build(asked, prepare(asked), lambda *_: None)


def test_pictures_stay_the_same(result):
    floor = {"W8A8": 42.0, "W4A8": 36.0}[result.bundle.manifest.scheme]
    assert result.comparison.psnr.mean() > floor


def test_every_operator_runs_in_integers(result):
    ran = result.comparison.runs_as
    operators = result.bundle.manifest.operators
    assert ran.keys() == {name for name, facts in operators.items() if not facts.in_table}
    assert {name for name, p in ran.items() if p not in {"i8", "u8"}} == result.comparison.kept_in_float.keys()


def test_the_bundle_is_as_small_as_its_bits(result):
    bundle = result.bundle
    share = bundle.weight_bytes("denoiser") / bundle.weight_bytes("twin")
    assert share < {"W8A8": 0.33, "W4A8": 0.20}[bundle.manifest.scheme]


def test_calibration_never_ends_worse_than_it_began(result):
    assert result.outcome.best <= result.outcome.initial
