"""A serving box has no torch: the runtime must import and sample in an environment that never saw it."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SCRIPT = """
import importlib.util, sys
assert importlib.util.find_spec("torch") is None, "torch is installed here"
assert importlib.util.find_spec("onnx") is None, "onnx is installed here"
from accuquant.runtime import Pipeline
with Pipeline(sys.argv[1], batch=2) as pipeline:
    latents = pipeline.generate([0, 1])
import numpy
numpy.save(sys.argv[2], latents)
print(pipeline.engine.name)
"""


@pytest.fixture(scope="module")
def serving_box(tmp_path_factory):
    """A fresh environment with `accuquant[cpu]` and nothing else."""
    folder = tmp_path_factory.mktemp("box")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    done = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", f"{ROOT}[cpu]"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.fail(f"accuquant[cpu] does not install by itself: {done.stderr[-800:]}")
    return folder / "bin"


def test_samples_without_torch(serving_box, tiny_bundle, tmp_path):
    import numpy as np
    from accuquant.runtime import Pipeline

    out = tmp_path / "latents.npy"
    done = subprocess.run(
        [serving_box / "python", "-c", SCRIPT, tiny_bundle.folder, out],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    with Pipeline(tiny_bundle, batch=2) as pipeline:
        np.testing.assert_allclose(np.load(out), pipeline.generate([0, 1]), atol=1e-5)


def test_the_command_works_without_torch(serving_box, tiny_bundle, tmp_path):
    done = subprocess.run(
        [serving_box / "accuquant-sample", tiny_bundle.folder, "-n", "4", "--out", tmp_path / "grid.png"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "grid.png").stat().st_size > 100
    assert "4 pictures, seeds 0..3" in done.stdout
