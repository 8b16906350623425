"""The stages of tools/verify_on_gpu.py on a real GPU, and what they claim; run with -m gpu."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from accuquant.runtime.engines import EXTRAS, has_library
from accuquant.runtime.engines.cuda import gpu

TOOLS = Path(__file__).parents[2] / "tools"
pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def stages():
    spec = importlib.util.spec_from_file_location("gpu_stages", TOOLS / "gpu_stages.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", autouse=True)
def _a_gpu():
    if gpu() is None:
        pytest.skip("no NVIDIA GPU that CUDA can use (accuquant-doctor says what is missing)")


@pytest.fixture(scope="module")
def bundles(stages, tiny, tmp_path_factory):
    """The tiny U-Net at every precision that a GPU may have."""
    folder = tmp_path_factory.mktemp("gpu")
    checkpoint = tiny.save_checkpoint(folder, tiny.unet())
    made = {}
    for bits in ("fp16", "8/8", "4/8"):
        made[bits] = str(folder / bits.replace("/", "-"))
        stages.export(str(checkpoint), bits, 6, made[bits])
    return made


@pytest.fixture(params=["tensorrt", "tensorrt-rtx"])
def engine(request):
    if not has_library(request.param):
        pytest.skip(f"{request.param} is not installed (pip install 'accuquant[{EXTRAS[request.param]}]')")
    return request.param


def held(findings):
    return [claim for claim, was in findings.claims.items() if not was] == [], json.dumps(findings.facts)[:2000]


@pytest.mark.parametrize("bits", ["fp16", "8/8", "4/8"])
@pytest.mark.parametrize("stage", ["build", "precision", "numerics", "layers"])
def test_what_a_stage_claims_holds(stages, engine, bundles, stage, bits):
    more = {"build": {"batch": 4}, "precision": {}, "numerics": {"n": 4}, "layers": {"n": 4}}[stage]
    right, facts = held(stages.STAGES[stage](bundles[bits], engine, **more))
    assert right, facts


def test_both_sides_are_measured_in_one_run(stages, engine, bundles):
    """Which is faster depends on the GPU, and is no matter for so small a network."""
    found = stages.benchmark(list(bundles.values()), engine, 8, 20, 2)
    assert list(found.facts["sides"]) == ["FP16", "W8A8", "W4A8"]
    assert all(side["step_seconds"]["n"] == 20 for side in found.facts["sides"].values())
