"""Class-conditional networks, guided or not, all the way: checkpoint, calibration, bundle, pictures, commands."""

import json
import sys

import numpy as np
import pytest
from accuquant.calibrate.families import load_model
from accuquant.calibrate.trajectory import simulate
from accuquant.export.compare import compare
from accuquant.runtime import cli_bench, cli_sample
from accuquant.runtime.bundle import ByClass
from accuquant.runtime.errors import AccuQuantError
from accuquant.runtime.pipeline import Pipeline

GUIDED = ByClass(classes=4, null=4, guidance=2.5)


@pytest.fixture
def bundle(class_bundle):
    return class_bundle


@pytest.fixture
def checkpoint(bundle):
    return bundle.folder.parent / "classes.pt"


def test_the_bundle_says_what_it_takes(bundle):
    assert bundle.manifest.conditioning == GUIDED
    assert "guidance 2.5" in bundle.manifest.sampler


@pytest.mark.parametrize("guidance", [None, 1.0, 4.0])
def test_the_twin_on_the_engine_is_torch_under_the_same_classes_and_guidance(bundle, checkpoint, guidance):
    """1e-3 on latents of order 1: float32 in another order, amplified by four steps and the guidance."""
    model = load_model(checkpoint)
    network = model.guided(GUIDED.guidance if guidance is None else guidance)
    seeds = range(5)
    expected = simulate(network, bundle.plan, seeds, model.sample_shape, model.condition(seeds)).states[-1]
    with Pipeline(bundle, network="twin", batch=2, guidance=guidance) as pipeline:
        np.testing.assert_allclose(pipeline.generate(seeds), expected.numpy(), rtol=0, atol=1e-3)


def test_a_sample_depends_on_its_seed_and_class_alone(bundle):
    with Pipeline(bundle, batch=4) as pipeline:
        alone = pipeline.generate([9], classes=[2])
        among = pipeline.generate([1, 9, 3, 4, 9], classes=[0, 2, 1, 1, 0])
    np.testing.assert_array_equal(among[1], alone[0])
    assert np.abs(among[4] - alone[0]).max() > 0.05  # another class


def test_quantized_it_stays_close_to_its_twin(bundle):
    made = {}
    for side in ("twin", "denoiser"):
        with Pipeline(bundle, network=side, batch=4) as pipeline:
            made[side] = pipeline.generate(range(4))
    error = np.linalg.norm(made["denoiser"] - made["twin"]) / np.linalg.norm(made["twin"])
    assert error < 0.1


def test_wrong_wishes_are_refused(bundle):
    with Pipeline(bundle, batch=2) as pipeline:
        with pytest.raises(AccuQuantError, match="class 4 is out of range"):
            pipeline.generate([0], classes=[4])
        with pytest.raises(AccuQuantError, match="1 classes for 2 seeds"):
            pipeline.generate([0, 1], classes=[1])


def test_the_engine_parts_from_the_standard_nowhere(bundle):
    found = compare(bundle, "onnxruntime", range(2), 2, lambda *_: None)
    assert found.first(45.0) is None


def test_commands_know_classes_and_guidance(bundle, tmp_path, monkeypatch, capsys):
    def run(main, *arguments):
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        with pytest.raises(SystemExit) as done:
            main()
        return done.value.code

    for name, chosen in (("a", "1,2"), ("b", "1")):
        assert not run(
            cli_sample.main,
            bundle.folder,
            "-n",
            3,
            "--class",
            chosen,
            "--guidance",
            2,
            "--out",
            tmp_path / f"{name}.npy",
        )
    a, b = (np.load(tmp_path / f"{name}.npy") for name in "ab")
    np.testing.assert_array_equal(a[[0, 2]], b[[0, 2]])
    assert (a[1] != b[1]).any()
    assert run(cli_sample.main, bundle.folder, "-n", 1, "--class", "cat") == 1
    assert "write whole numbers" in " ".join(capsys.readouterr().err.split())
    out = tmp_path / "bench.json"
    assert not run(cli_bench.main, bundle.folder, "--batch", 1, "--repeats", 3, "--samples", 1, "--out", out)
    assert json.loads(out.read_text())["results"][0]["batch"] == 1
