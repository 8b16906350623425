"""Fixtures: the tiny U-Net, its checkpoint, and a toy network for float64."""

import importlib.util
import os
import sys
from hashlib import sha256
from pathlib import Path
from types import ModuleType

import onnx_ir as ir
import pytest
import torch
from accuquant.calibrate.trajectory import NOTHING
from accuquant.export import build as building
from accuquant.runtime.bundle import Bundle
from accuquant.runtime.engines.compile_plan import installed
from filelock import FileLock
from hypothesis import settings

HERE = Path(__file__).parent

# Begun last, one of them would keep one worker busy while the others have nothing left to do.
LONGEST = (
    "test_reference.py",
    "test_rtx.py",
    "test_compare.py",
    "test_passes.py",
    "test_commands.py",
    "test_emoji.py",
    "test_pixart.py",
    "test_tune.py",
    "test_split_projections.py",
)

# A busy machine is no failure.
settings.register_profile("accuquant", deadline=None)
settings.load_profile("accuquant")


def load_module(name: str) -> ModuleType:
    """tests/<name>.py, through a fixture, because tests are no package to import from."""
    spec = importlib.util.spec_from_file_location(f"accuquant_tests_{Path(name).name}", HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Full-size and GPU tests run only where they are asked for, and say so; the longest files run first."""
    items.sort(key=lambda item: item.path.name not in LONGEST)
    asked = config.getoption("-m")
    for item in items:
        for marker, reason in {
            "slow": "full-size; run with -m slow",
            "gpu": "needs an NVIDIA GPU; run with -m gpu",
        }.items():
            if item.get_closest_marker(marker) and marker not in asked:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """What a test draws without a generator of its own does not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """Networks and runs small enough for a test."""
    return load_module("tiny")


@pytest.fixture(scope="session")
def handmade() -> ModuleType:
    """A bundle written by hand in a moment, and mutations of it."""
    return load_module("../tools/mutate_bundles")


@pytest.fixture(scope="session")
def formula() -> ModuleType:
    """Weights and inputs by formula, for golden numbers."""
    return load_module("formula")


@pytest.fixture(scope="session")
def stable() -> ModuleType:
    """A small Stable Diffusion in one file."""
    return load_module("stable")


@pytest.fixture(scope="session")
def folders() -> ModuleType:
    """diffusers' transformers in small, as folders."""
    return load_module("folders")


@pytest.fixture(scope="session")
def stable_xl() -> ModuleType:
    """A small Stable Diffusion XL, as a folder and in one file."""
    return load_module("stable_xl")


@pytest.fixture(scope="session")
def stand_in() -> ModuleType:
    """CUDA and TensorRT's classes for machines without a GPU."""
    return load_module("stand_in_gpu")


@pytest.fixture(scope="session", autouse=True)
def _cache_of_its_own(tmp_path_factory):
    """Neither the user's cache is read nor written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCUQUANT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _networks_are_traced_once():
    """The exporter takes most of a small export's time, and the same network becomes the same graph."""
    trace, known = building.trace_float, {}

    def trace_once(network, operators, sample_shape, condition=NOTHING):
        inputs = [(name, value.shape[1:], value.dtype) for name, value in condition.items()]
        digest = sha256(repr((str(network), list(operators), sample_shape, inputs)).encode())
        for name, value in network.state_dict().items():
            if ".inputs." not in name and ".weight_quantizer." not in name:  # what is learned is no part of the graph
                digest.update(name.encode() + value.numpy(force=True).tobytes())
        key = digest.digest()
        if key not in known:
            known[key] = ir.to_proto(trace(network, operators, sample_shape, condition))
        return ir.from_proto(known[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "trace_float", trace_once)
        yield


@pytest.fixture
def tiny_unet(tiny):
    """A U-Net of the ermongroup layout, 8x8, with seeded weights."""
    return tiny.unet()


@pytest.fixture
def tiny_checkpoint(tiny, tmp_path):
    """Path of the tiny U-Net's checkpoint, with its YAML beside it."""
    return tiny.save_checkpoint(tmp_path, tiny.unet())


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """`once(name, make)`: the bundle that make(folder) leaves in folder/bundle, made by the first worker to need it."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def made(name, make):
        folder = shared / name
        with FileLock(shared / f"{name}.lock"):
            if not (folder / "bundle").exists():
                folder.mkdir(exist_ok=True)
                make(folder)
        return Bundle(folder / "bundle")

    return made


@pytest.fixture(scope="session")
def tiny_bundle(tiny, once):
    """The tiny U-Net as a W4A8 bundle, made the way a user makes one (smoke preset)."""
    return once("tiny", tiny.export)


@pytest.fixture(scope="session")
def text_model() -> ModuleType:
    """A latent text-to-image model small enough for a test."""
    return load_module("text_model")


@pytest.fixture(scope="session")
def class_bundle(tiny, once):
    """A guided, class-conditional DiT as a bundle; its checkpoint lies beside it."""
    return once("classes", tiny.export_classes)


@pytest.fixture(scope="session")
def text_bundle(text_model, once):
    """A guided, latent text-to-image model as a bundle."""
    return once("text", text_model.export)


@pytest.fixture(scope="session")
def folder_bundle(folders, stable_xl, formula, once):
    """`folder_bundle(name)`: a folder of diffusers' as a W8A8 bundle of two steps."""

    def export(name, folder):
        return stable_xl.export(folder, formula) if name == "sdxl" else folders.export(name, folder, formula)

    return lambda name: once(f"folder-{name}", lambda folder: export(name, folder))


@pytest.fixture(scope="session")
def rtx() -> None:
    """Skips where the compiler is missing; where everything is expected to be installed, its absence is a failure."""
    if not installed():
        reason = "TensorRT-RTX is not installed (pip install 'accuquant[rtx]')"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
