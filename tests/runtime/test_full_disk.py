"""A disk that ends in the middle of a file: one sentence, the old file kept, nothing half-written left.

The kernel itself refuses the bytes (RLIMIT_FSIZE), whoever writes them: Python, Pillow, safetensors or numpy.
"""

import resource
import signal
from contextlib import contextmanager

import numpy as np
import onnx
import pytest
import torch
from accuquant.calibrate.recipe import OperatorRecipe, Recipe, RecipeFacts
from accuquant.calibrate.scheme import QuantScheme
from accuquant.export.graph import save_graph
from accuquant.runtime.cli_sample import _save
from accuquant.runtime.engine_cache import EngineCache, EngineKey
from accuquant.runtime.errors import AccuQuantError
from accuquant.runtime.files import atomic_folder, write_text
from accuquant.runtime.rows import Rows, save_rows

KIB = 64  # what still fits into a file


@contextmanager
def full_after(kib):
    """No file of this process grows beyond that."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (kib * 2**10, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def large(shape=(9, 64, 64, 3)):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def grown(path):
    """A graph with weights of a megabyte."""
    import onnx_ir as ir

    weight = onnx.numpy_helper.from_array(np.zeros(2**18, np.float32), "weight")
    graph = onnx.helper.make_graph([], "large", [], [], [weight])
    save_graph(ir.from_proto(onnx.helper.make_model(graph)), path)


def recipe(folder):
    large = OperatorRecipe(kind="linear", role="body", weight_bits=8, inputs=())
    facts = RecipeFacts(scheme=QuantScheme(weight_bits=8, activation_bits=8), operators={"a": large}, provenance={})
    Recipe(facts, {"a": torch.zeros(2**18)}, {"a": torch.ones(1)}).save(folder)


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: _save(iter([large()]), folder / "grid.png", 0),
        lambda folder: _save(iter([large().astype(np.float32)]), folder / "latents.npy", 0),
        lambda folder: _save(iter([large((2, 256, 256, 3))]), folder / "pictures", 0),
        lambda folder: write_text(folder / "plan.json", "x" * 2**20),
        lambda folder: save_rows(folder / "c.safetensors", Rows({"context": np.zeros((9, 9999), np.float32)}, {})),
        lambda folder: grown(folder / "denoiser.onnx"),
        recipe,
    ],
    ids=["grid", "latents", "folder of pictures", "text", "rows", "graph", "recipe"],
)
def test_what_does_not_fit_is_one_sentence_and_leaves_nothing(tmp_path, write):
    with full_after(KIB), pytest.raises(AccuQuantError, match=r"cannot write .*(File too large|written).*MiB free"):
        write(tmp_path)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_the_pictures_before_the_one_that_does_not_fit_are_whole(tmp_path):
    from PIL import Image

    small, too_large = np.zeros((1, 8, 8, 3), np.uint8), large((1, 256, 256, 3))
    with full_after(KIB), pytest.raises(AccuQuantError, match=r"cannot write .*00000008\.png"):
        _save(iter([small, too_large]), tmp_path / "pictures", 7)
    assert [p.name for p in (tmp_path / "pictures").iterdir()] == ["00000007.png"]
    assert np.asarray(Image.open(tmp_path / "pictures" / "00000007.png")).shape == (8, 8, 3)


def test_a_bundle_that_does_not_fit_leaves_the_older_one(tmp_path):
    with atomic_folder(tmp_path / "bundle") as part:
        write_text(part / "manifest.json", "old")

    def again():
        with atomic_folder(tmp_path / "bundle") as part:
            write_text(part / "manifest.json", "new")
            grown(part / "denoiser.onnx")

    with full_after(KIB), pytest.raises(AccuQuantError, match=r"cannot write .*denoiser\.onnx.*free some space"):
        again()
    assert {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")} == {"bundle", "bundle/manifest.json"}
    assert (tmp_path / "bundle" / "manifest.json").read_text() == "old"


def test_an_engine_that_does_not_fit_is_in_no_cache_and_is_built_when_there_is_room(tmp_path):
    cache, key = EngineCache(tmp_path), EngineKey("graph", "library 1", "sm89", "batch 1")

    def build(path):
        path.write_bytes(bytes(2**20))
        return {}

    with full_after(KIB), pytest.raises(AccuQuantError, match=r"cannot write .*File too large"):
        cache.get(key, build)
    assert not cache.holds(key)
    assert [p.name for p in cache.folder.iterdir()] == [f"{key.digest}.lock"]
    assert cache.get(key, build).built
    assert cache.holds(key)
