"""Engines: they run in integers, they check their inputs, and int4 storage changes no value."""

import importlib

import numpy as np
import pytest
from accuquant.runtime.engines import ALL, ENGINES, available, open_engine, rests
from accuquant.runtime.engines.base import EngineOptions
from accuquant.runtime.errors import AccuQuantError
from accuquant.runtime.inspection import operator_precisions
from accuquant.runtime.pipeline import Pipeline

INTEGER = {"i8", "u8"}


def test_every_planned_operator_runs_as_an_integer_kernel(tiny_bundle):
    """Read off OpenVINO's own execution graph, not off ours."""
    with Pipeline(tiny_bundle, engine="openvino", batch=2) as pipeline:
        precisions = operator_precisions(pipeline.engine, pipeline.bundle.manifest.operators)
        convolutions = [k for k in pipeline.engine.kernels() if k.kind == "Convolution"]
        kept = pipeline.engine.kept_in_float
    operators = pipeline.bundle.manifest.operators
    assert precisions.keys() == {name for name, facts in operators.items() if not facts.in_table}
    assert {facts.role for facts in operators.values() if facts.in_table} == {"time"}
    assert {name for name, p in precisions.items() if p not in INTEGER} == kept.keys()
    floats = [k for k in convolutions if k.precision not in INTEGER and not kept.keys() & set(k.nodes)]
    # The network's ends, which stay in float; the last one is in two parts.
    assert {k.nodes[0].partition("/")[0] for k in floats} == {"conv_in", "conv_out"}


def test_the_twin_runs_in_float(tiny_bundle):
    with Pipeline(tiny_bundle, network="twin", engine="openvino", batch=2) as pipeline:
        convolutions = [k.precision for k in pipeline.engine.kernels() if k.kind == "Convolution"]
    assert convolutions
    assert set(convolutions) == {"f32"}


@pytest.mark.parametrize("count", [1, 2, 7, 16])
def test_int4_widening_keeps_every_value(count):
    from accuquant.runtime.engines.openvino import unpack_int4

    values = np.resize(np.arange(-8, 8, dtype=np.int8), count)
    padded = np.append(values, np.int8(0)) if count % 2 else values
    packed = (padded[0::2] & 0xF).astype(np.uint8) | ((padded[1::2] & 0xF).astype(np.uint8) << 4)
    np.testing.assert_array_equal(unpack_int4(packed, [count]), values)


@pytest.mark.parametrize("name", list(ENGINES))
def test_wrong_inputs_are_named(tiny_bundle, name):
    engine = open_engine(tiny_bundle.graph("denoiser"), EngineOptions(batch=2), name)
    x, t = np.zeros((2, 1, 8, 8), np.float32), np.zeros(2, np.float32)
    assert engine.run({"x": x, "t": t}).shape == x.shape
    with pytest.raises(AccuQuantError, match="takes x, t; got x"):
        engine.run({"x": x})
    with pytest.raises(AccuQuantError, match=r"input x is float32 \(3, 1, 8, 8\).*compiled for float32 \(2, 1, 8, 8\)"):
        engine.run({"x": np.zeros((3, 1, 8, 8), np.float32), "t": t})
    with pytest.raises(AccuQuantError, match="input t is float64"):
        engine.run({"x": x, "t": np.zeros(2)})
    engine.close()


def test_engines_agree_within_the_quantization_noise(tiny_bundle):
    """Both execute one Q/DQ graph; what separates them must be smaller than what separates either from fp."""
    from accuquant.export.verify import sqnr

    rng = np.random.default_rng(0)
    feed = {"x": rng.standard_normal((4, 1, 8, 8), np.float32), "t": np.full(4, 50, np.float32)}
    out = {
        name: open_engine(tiny_bundle.graph("denoiser"), EngineOptions(batch=4), name).run(feed).copy()
        for name in ENGINES
    }
    fp = open_engine(tiny_bundle.graph("twin"), EngineOptions(batch=4), "onnxruntime").run(feed)
    assert sqnr(out["onnxruntime"], out["openvino"]) > sqnr(fp, out["onnxruntime"])
    assert sqnr(fp, out["openvino"]) == pytest.approx(sqnr(fp, out["onnxruntime"]), abs=1.0)


def test_what_is_not_integer_may_be_bfloat16_where_the_machine_has_it(tiny_bundle):
    """The output is coarser by bfloat16's eight bits and no more; where there is none, it is refused by name."""
    from accuquant.export.verify import sqnr

    rng = np.random.default_rng(0)
    feed = {"x": rng.standard_normal((4, 1, 8, 8), np.float32), "t": np.full(4, 50, np.float32)}
    path, coarse = tiny_bundle.graph("twin"), EngineOptions(batch=4, rest="bfloat16")
    with pytest.raises(AccuQuantError, match="float32 on this machine; bfloat16 was asked"):
        open_engine(path, coarse, "onnxruntime")
    assert rests("onnxruntime") == ("float32",)
    if "bfloat16" not in rests("openvino"):
        with pytest.raises(AccuQuantError, match="bfloat16 was asked"):
            open_engine(path, coarse, "openvino")
        pytest.skip("this CPU has no bfloat16")
    fp = open_engine(path, EngineOptions(batch=4), "openvino").run(feed).copy()
    assert 25 < sqnr(fp, open_engine(path, coarse, "openvino").run(feed)) < 70


def test_unknown_and_missing_engines_are_named(tiny_bundle, monkeypatch):
    with pytest.raises(AccuQuantError, match="unknown engine 'fast'; known: openvino, onnxruntime"):
        open_engine(tiny_bundle.graph("denoiser"), EngineOptions(), "fast")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert available() == []
    with pytest.raises(AccuQuantError, match=r"pip install 'accuquant\[cpu\]'"):
        open_engine(tiny_bundle.graph("denoiser"), EngineOptions())


@pytest.mark.parametrize("name", list(ENGINES))
def test_damaged_graph_is_one_sentence(tmp_path, name):
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"this is no graph")
    with pytest.raises(AccuQuantError, match=r"broken\.onnx"):
        open_engine(path, EngineOptions(), name)


@pytest.mark.parametrize("name", ["onnxruntime-cuda", "onnxruntime-tensorrt"])
def test_onnx_runtimes_gpu_providers_never_fall_back_to_the_cpu_unsaid(tiny_bundle, name, monkeypatch):
    """onnxruntime would warn, and sample on the CPU under the GPU's name."""
    assert name not in available()
    with pytest.raises(AccuQuantError, match=r"needs an NVIDIA GPU .*accuquant\[tensorrt\]"):
        open_engine(tiny_bundle.graph("denoiser"), EngineOptions(), name)
    with pytest.raises(AccuQuantError, match="does not start on this machine"):
        ALL[name]()(tiny_bundle.graph("denoiser"), EngineOptions())


def test_onnx_runtimes_gpu_providers_are_engines_where_they_are(monkeypatch):
    monkeypatch.setattr(
        "onnxruntime.get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    assert "onnxruntime-cuda" not in available()
    monkeypatch.setattr("accuquant.runtime.engines.gpu", lambda: "NVIDIA L4 (sm89)")
    assert "onnxruntime-cuda" in available()
    assert "onnxruntime-tensorrt" not in available()
