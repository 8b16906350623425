"""A linear layer that holds a value and its gate, taken apart: the same numbers, and no copies of halves."""

from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from accuquant.export.graph import operator_nodes, operator_parts, save_graph
from accuquant.export.passes.split_gates import split_gates
from accuquant.runtime.engines import open_engine
from accuquant.runtime.engines.base import EngineOptions
from accuquant.runtime.errors import AccuQuantError

ONE = SimpleNamespace(facts=SimpleNamespace(operators={"proj": SimpleNamespace(kind="linear")}))
CODES = np.random.default_rng(0).integers(-127, 128, (8, 12)).astype(np.int8)
STORED = """q = QuantizeLinear (x, fine, zero) d = DequantizeLinear (q, fine, zero)
    f = DequantizeLinear <axis = 1> (codes, scales) [proj] n = MatMul (d, f)"""
PLAIN = "[proj] n = MatMul (x, w)"
GATE = "g = Gelu (b) y = Mul (a, g)"


def made(linear, cut, gate=GATE, sides="float[b,5,8] x"):
    """x (b, 5, 8) -> y, through a layer of 12 columns with a bias."""
    text = f"""<ir_version: 10, opset_import: ["" : 21]> g ({sides}) => (float y)
        {{ {linear} l = Add (n, bias) {cut} {gate} }}"""
    model = onnx.parser.parse_model(text)
    held = {
        "codes": CODES, "scales": np.linspace(0.01, 0.1, 12, dtype=np.float32), "w": CODES.astype(np.float32) / 64,
        "bias": np.linspace(-1, 1, 12, dtype=np.float32), "fine": np.array(0.02, np.float32),
        "zero": np.array(0, np.int8), "halves": np.array([6, 6]), "uneven": np.array([4, 8]),
    }  # fmt: skip
    read = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(v, k) for k, v in held.items() if k in read)
    del model.graph.output[0].type.tensor_type.shape.dim[:]
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    return ir.from_proto(inferred)


def run(model, folder, name):
    save_graph(ir.from_proto(ir.to_proto(model)), folder / "graph.onnx")
    engine = open_engine(folder / "graph.onnx", EngineOptions(batch=2, threads=1, target="cpu"), name)
    (port,) = engine.inputs
    out = engine.run({"x": np.random.default_rng(1).standard_normal(port.shape).astype(np.float32)}).copy()
    engine.close()
    return out


@pytest.mark.parametrize("linear", [PLAIN, STORED], ids=["float", "stored"])
@pytest.mark.parametrize(
    "cut",
    ["a, b = Split <axis = 2, num_outputs = 2> (l)", "a, b = Split <axis = -1> (l, halves)"],
    ids=["in-two", "by-sizes"],
)
def test_each_piece_is_a_layer_of_its_own(linear, cut, tmp_path):
    model = made(linear, cut)
    before = {name: run(model, tmp_path, name) for name in ("onnxruntime", "openvino")}
    assert split_gates(model, ONE) == 1
    assert operator_parts(operator_nodes(model), "proj") == ["proj", "proj/1"]
    assert not [node for node in model.graph if node.op_type == "Split"]
    for name, out in before.items():
        np.testing.assert_allclose(run(model, tmp_path, name), out, rtol=1e-5, atol=5e-5)  # values to 120


@pytest.mark.parametrize(
    ("cut", "given"),
    [
        ("a, b = Split <axis = -1> (l, uneven)", {"gate": "g = Gelu (b) y = Concat <axis = -1> (a, g)"}),
        ("a, b = Split <axis = 1, num_outputs = 2> (l)", {"gate": "g = Gelu (b) y = Concat <axis = 1> (a, g)"}),
        (
            "a, b = Split <axis = 2, num_outputs = 2> (l) r = ReduceMax <keepdims = 0> (l)",
            {"gate": "g = Gelu (b) m = Mul (a, g) y = Add (m, r)"},
        ),
        ("a, b = Split <axis = 1, num_outputs = 2> (l)", {"sides": "float[b,8] x"}),  # no tokens
    ],
    ids=["uneven", "of-tokens", "read-whole", "of-vectors"],
)
def test_what_is_cut_otherwise_is_left_as_it_is(cut, given):
    model = made(PLAIN, cut, **given)
    before = ir.to_proto(model)
    assert split_gates(model, ONE) == 0
    assert ir.to_proto(model) == before


def test_a_weight_that_is_computed_is_refused_by_name():
    model = made("f = Cast <to = 1> (codes) [proj] n = MatMul (x, f)", "a, b = Split <axis = 2, num_outputs = 2> (l)")
    with pytest.raises(AccuQuantError, match=r"layer proj: its weight .* run store_weights first"):
        split_gates(model, ONE)
