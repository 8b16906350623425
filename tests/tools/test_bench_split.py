"""Three ways to quantize a convolution of a concatenation: one function of their graphs, and what each can lose."""

from pathlib import Path

import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    import bench_split

    return bench_split


@pytest.fixture
def layer():
    """Parts whose ranges differ by twenty, and a weight."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 12, 6, 6, generator=generator)
    x[:, 8:] *= 20
    return x, torch.randn(5, 12, 3, 3, generator=generator), 8


@pytest.mark.parametrize("form", ["shared", "split", "pre-scaled"])
def test_the_graph_that_is_timed_is_what_the_error_is_measured_of(tool, layer, form, tmp_path):
    x, w, width = layer
    onnx.save(tool.graph(form, x, w, width, (1, 1)), tmp_path / "form.onnx")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(tmp_path / "form.onnx", options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"a": x[:, :width].numpy(), "b": x[:, width:].numpy()})
    wanted = tool.result(form, x, w, width, 8, (1, 1))
    assert (torch.from_numpy(found) - wanted).abs().max() < 1e-3 * wanted.abs().max()  # no code flips on this data


def test_scales_of_their_own_keep_the_narrow_part_and_weights_pay_where_they_take_scales_in(tool, layer):
    x, w, width = layer
    narrow = w.clone()
    narrow[:, width:] /= 20  # so that the narrow part counts as much as the wide one
    reference = F.conv2d(x, narrow, padding=1)
    error = {
        form: float((tool.result(form, x, narrow, width, 8, (1, 1)) - reference).square().sum()) for form in tool.FORMS
    }
    assert error["split"] < error["shared"] / 10
    reference = F.conv2d(x, w, padding=1)
    four = {form: float((tool.result(form, x, w, width, 4, (1, 1)) - reference).square().sum()) for form in tool.FORMS}
    assert four["split"] <= four["pre-scaled"]
