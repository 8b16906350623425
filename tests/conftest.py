"""Fixtures: the tiny U-Net, its checkpoint, and a toy network for float64."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """tests/tiny.py; a fixture, because tests are no package to import from."""
    spec = importlib.util.spec_from_file_location("accuquant_tests_tiny", HERE / "tiny.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tiny_unet(tiny):
    """A U-Net of the ermongroup layout, 8x8, with seeded weights."""
    return tiny.unet()


@pytest.fixture
def tiny_checkpoint(tiny, tmp_path):
    """Path of the tiny U-Net's checkpoint, with its YAML beside it."""
    return tiny.save_checkpoint(tmp_path, tiny.unet())
