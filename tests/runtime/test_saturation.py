"""Products of 8-bit codes come out right on every CPU, in integers where it adds them in 32 bits, else in float."""

import numpy as np
import onnx
import pytest
from accuquant.export.layer_parity import reference
from accuquant.runtime.engines import open_engine, saturation
from accuquant.runtime.engines.base import EngineOptions
from accuquant.runtime.inspection import LOW_BIT, operator_precisions
from onnx import TensorProto, helper, numpy_helper

CHANNELS = 32


def quantized(folder, largest):
    """x -> Q/DQ -> conv of codes up to `largest` -> Q/DQ -> product with itself, at the ends of their ranges."""
    rng = np.random.default_rng(0)

    def q(x, y):
        return [
            helper.make_node("QuantizeLinear", [x, f"{y} s", f"{y} z"], [f"{y} q"]),
            helper.make_node("DequantizeLinear", [f"{y} q", f"{y} s", f"{y} z"], [y]),
        ]

    nodes = [
        *q("x", "a"),
        helper.make_node("DequantizeLinear", ["codes", "scale"], ["w"], axis=0),
        helper.make_node("Conv", ["a", "w", "bias"], ["made"], "conv"),
        *q("made", "b"),
        helper.make_node("MatMul", ["b", "b"], ["squared"], "product"),
        helper.make_node("Relu", ["squared"], ["y"]),
    ]
    constants = {
        "codes": rng.choice(np.array([-largest, largest], np.int8), (CHANNELS, CHANNELS, 1, 1), p=(0.2, 0.8)),
        "bias": np.zeros(CHANNELS, np.float32),
        "scale": np.full(CHANNELS, 0.01, np.float32),
        "a z": np.array(0, np.uint8),
        "b z": np.array(0, np.int8),
        "a s": np.array(1 / 255, np.float32),
        "b s": np.array(0.01 * largest * CHANNELS / 127, np.float32),
    }
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", CHANNELS, 16, 16]) for name in ("x", "y")]
    graph = helper.make_graph(
        nodes, "g", ports[:1], ports[1:], [numpy_helper.from_array(v, k) for k, v in constants.items()]
    )
    path = folder / f"{largest}.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def run(path, name):
    x = np.random.default_rng(1).uniform(0.8, 1.0, (1, CHANNELS, 16, 16)).astype(np.float32)
    engine = open_engine(path, EngineOptions(batch=1, threads=1), name)
    made = engine.run({"x": x}).astype(np.float64)
    return made, operator_precisions(engine, ["conv", "product"]), dict(engine.kept_in_float)


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("largest", [7, 64, 127])
def test_engines_do_not_saturate_on_this_machine(tmp_path, largest, name):
    """Inputs near their largest codes, so that every pair of products passes what 16 bits hold."""
    path = quantized(tmp_path, largest)
    x = np.random.default_rng(1).uniform(0.8, 1.0, (1, CHANNELS, 16, 16)).astype(np.float32)
    wanted = reference(path, EngineOptions(batch=1)).run({"x": x}).astype(np.float64)
    made, _, _ = run(path, name)
    assert 10 * np.log10(np.square(wanted).sum() / max(np.square(made - wanted).sum(), 1e-30)) > 50


@pytest.mark.parametrize("largest", [7, 64, 127])
def test_only_what_may_saturate_leaves_the_integers(tmp_path, monkeypatch, largest):
    """On a CPU that saturates; the engine says which operators, and why. What is left runs in integers."""
    path = quantized(tmp_path, largest)
    monkeypatch.setattr(saturation, "saturates", lambda: True)
    _, got, kept = run(path, "openvino")
    assert kept.keys() == ({"conv", "product"} if largest == 127 else {"product"})
    assert {name for name, precision in got.items() if precision not in LOW_BIT} == kept.keys()
    assert all("no VNNI" in why for why in kept.values())


@pytest.mark.skipif(not saturation.saturates(), reason="this CPU's integer kernels do not saturate")
def test_left_in_integers_what_may_saturate_is_wrong_here(tmp_path, monkeypatch):
    """Which is why it is not left there."""
    path = quantized(tmp_path, 127)
    wanted, _, _ = run(path, "openvino")
    monkeypatch.setattr(saturation, "saturates", lambda: False)
    made, _, _ = run(path, "openvino")
    assert 10 * np.log10(np.square(wanted).sum() / np.square(made - wanted).sum()) < 20


def test_where_nothing_saturates_all_is_integer(tmp_path, monkeypatch):
    path = quantized(tmp_path, 127)
    monkeypatch.setattr(saturation, "saturates", lambda: False)
    _, got, kept = run(path, "openvino")
    assert not kept
    assert {"conv", "product"} == {name for name, precision in got.items() if precision in LOW_BIT}


def test_the_probe_agrees_with_the_processor_where_that_is_known():
    from accuquant.runtime.console import machine_facts
    from accuquant.runtime.doctor import INTEGER_INSTRUCTIONS

    known = set(machine_facts()["instructions"].split())
    if not known:
        pytest.skip("this system does not tell its processor's instructions")
    assert saturation.saturates() == (not known & INTEGER_INSTRUCTIONS)
