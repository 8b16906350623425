"""Queries, keys and values in one linear layer, taken apart: the same numbers, and integer kernels on TensorRT-RTX."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from accuquant.calibrate.families import load_model
from accuquant.calibrate.initialise import initialise
from accuquant.calibrate.model import quantize
from accuquant.calibrate.recipe import freeze
from accuquant.calibrate.scheme import QuantScheme
from accuquant.calibrate.sharing import tabulate
from accuquant.calibrate.trace import trace
from accuquant.calibrate.trajectory import simulate
from accuquant.export import compare
from accuquant.export.check_target import check_target, violations
from accuquant.export.graph import operator_nodes, operator_parts, save_graph, trace_float
from accuquant.export.lower import lower
from accuquant.export.passes.cast_rest import cast_rest
from accuquant.export.passes.split_projections import split_projections
from accuquant.export.passes.time_table import time_table
from accuquant.export.verify import check_graph
from accuquant.runtime import cli_inspect
from accuquant.runtime.engines.base import EngineOptions
from accuquant.runtime.engines.compile_plan import CompileRequest, compile_plan
from accuquant.runtime.engines.onnxruntime import OnnxRuntimeEngine
from accuquant.runtime.errors import AccuQuantError
from accuquant.runtime.inspection import multiplies, operator_precisions
from accuquant.runtime.timing import attribute

QKV = ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]
PARTS = [f"{name}{part}" for name in QKV for part in ("", "/1", "/2")]
FORMS = {
    "w8a8": {"weight_bits": 8, "activation_bits": 8},
    "w4a8 smoothed": {"weight_bits": 4, "activation_bits": 8, "smoothing": 0.5, "biased": True},
    "w4a6 table": {"weight_bits": 4, "activation_bits": 6, "policy": "uniform", "table": 2, "biased": True},
    "fp8": {"weight_bits": 8, "activation_bits": 8, "number": "float8"},
    "w4a16": {"weight_bits": 4, "activation_bits": 16, "reserve": 0.0},
}


@pytest.fixture(scope="module")
def lowered(tiny, tmp_path_factory):
    """`lowered(form)`: the tiny DiT for TensorRT, its recipe and plan, in some form; whole."""
    checkpoint = tiny.save_class_checkpoint(tmp_path_factory.mktemp("dit"), 4)

    def made(form):
        asked = dict(FORMS[form])
        smoothing, table, biased = asked.pop("smoothing", 0.0), asked.pop("table", 1), asked.pop("biased", False)
        model, scheme = load_model(checkpoint), QuantScheme(target="tensorrt", **asked)
        operators, plan = quantize(model, scheme), trace(model.default_sampler, model.noise_schedule, 4)
        if table > 1:
            tabulate(model.network, operators, plan, table)
        teacher = simulate(model.network, plan, range(2), model.sample_shape, model.condition(range(2)))
        initialise(model.network, operators, plan, teacher, "min-max", smoothing=smoothing)
        for operator in operators.values() if biased else ():
            operator.learn_bias()
            if operator.shift is not None:
                operator.shift.data.normal_(0, 0.1)
        recipe = freeze(operators, scheme, {})
        graph = trace_float(model.network, operators, model.sample_shape, model.condition([0]))
        return lower(graph, recipe, "tensorrt")[0], recipe, plan

    return made


def run(model, path):
    save_graph(model, path)
    check_graph(path)
    random = np.random.default_rng(0)
    engine = OnnxRuntimeEngine(path, EngineOptions(batch=3), exact=True)
    x = random.standard_normal((3, 1, 8, 8)).astype(np.float32)
    return np.array(engine.run({"x": x, "t": np.array([999, 500, 3], np.float32), "y": np.array([0, 4, 2])}))


@pytest.mark.parametrize("form", FORMS, ids=[form.replace(" ", "-") for form in FORMS])
def test_apart_they_compute_the_same_and_keep_the_rules(form, lowered, tmp_path):
    model, recipe, plan = lowered(form)
    alone = recipe.facts.scheme.weights_alone
    before, size = run(model, tmp_path / "before.onnx"), weights(model)
    assert split_projections(model, recipe) == len(QKV)
    assert not [name for name in operator_nodes(model) if "Slice" in name]
    np.testing.assert_allclose(run(model, tmp_path / "after.onnx"), before, rtol=0, atol=1e-6 * np.abs(before).max())
    assert weights(model) == size  # cut, and the wholes dropped
    check_target(model, recipe.facts.operators, "tensorrt", weights_alone=alone)
    time_table(model, [step.timestep for step in plan.steps])
    cast_rest(model, "float16")
    save_graph(model, tmp_path / "cast.onnx")
    check_graph(tmp_path / "cast.onnx")
    check_target(model, recipe.facts.operators, "tensorrt", weights_alone=alone, looked_up=True)
    assert {part for name in QKV for part in operator_parts(operator_nodes(model), name)} == set(PARTS)


def weights(model):
    """Bytes that belong to the projections."""
    held = model.graph.initializers.items()
    return sum(value.const_value.nbytes for name, value in held if name.startswith(tuple(f"{q}." for q in QKV)))


def test_rules_that_any_part_breaks_are_told(lowered):
    model, recipe, _ = lowered("w8a8")
    split_projections(model, recipe)
    node = operator_nodes(model)["blocks.1.attn.qkv/2"]
    node.replace_input_with(1, node.inputs[1].producer().inputs[0])
    assert [broken.node for broken in violations(model, recipe.facts.operators, "tensorrt")] == [
        f"{node.name}, input 1"
    ]


# -- other graphs than the exporter's --------------------------------------------------------------------------------

ONE = SimpleNamespace(facts=SimpleNamespace(operators={"qkv": SimpleNamespace(kind="linear")}))
CODES = np.random.default_rng(0).integers(-8, 8, (8, 24)).astype(np.int8)
GATHERS = "a = Gather <axis = 0> (m, i0) b = Gather <axis = 0> (m, i1) c = Gather <axis = 0> (m, i2)"
SPLIT = """u, v, w = Split <axis = 0, num_outputs = 3> (m)
    a = Squeeze(u, i) b = Squeeze(v, i) c = Squeeze(w, i)"""
TOKENS = "[qkv] n = MatMul(d, f) p = Add(bias, n) r = Reshape(p, heads) m = Transpose <perm = [2, 0, 3, 1, 4]> (r)"
VECTORS = "[qkv] p = Gemm <transB = 1> (d, f, bias) r = Reshape(p, heads) m = Transpose <perm = [1, 0, 2, 3]> (r)"


def handmade(
    linear=TOKENS, cut=GATHERS, weight="[dequantize] f = DequantizeLinear <axis = 1> (codes, scales)", wide=8, **changed
):
    """A layer of 8 inputs and 24 outputs, in three sets of two heads; or of others."""
    tokens = [5] if linear is not VECTORS else []
    shape = ", ".join(map(str, ["batch", *tokens, wide]))
    body = (
        f"q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) {weight} {linear} {cut} o = Mul(a, b) y = Sub(o, c)"
    )
    given = f"float[{shape}] x) => (float[{'b, h, n, d' if tokens else 'b, h, d'}] y"
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 21]> g ({given}) {{ {body} }}')
    constants = {
        "codes": CODES, "scales": np.linspace(0.01, 0.1, 24, dtype=np.float32), "s": np.float32(0.02),
        "bias": np.arange(24, dtype=np.float32), "z": np.int8(0), "heads": np.array([-1, *tokens, 3, 2, 4]),
        "i": np.array([0]), "i0": np.array(0), "i1": np.array(1), "i2": np.array(2),
    }  # fmt: skip
    read = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(np.asarray(value), name)
        for name, value in (constants | changed).items() if name in read
    )  # fmt: skip
    return ir.from_proto(onnx.shape_inference.infer_shapes(model, data_prop=True))


def of_x(model, path):
    save_graph(model, path)
    engine = OnnxRuntimeEngine(path, EngineOptions(batch=2), exact=True)
    (port,) = engine.inputs
    return np.array(engine.run({"x": np.random.default_rng(1).standard_normal(port.shape).astype(np.float32)}))


@pytest.mark.parametrize(
    "made",
    [
        pytest.param({}, id="gathers"),
        pytest.param({"cut": SPLIT}, id="split"),
        pytest.param(
            {
                "linear": VECTORS, "codes": CODES.T,
                "weight": "[dequantize] f = DequantizeLinear <axis = 0> (codes, scales)",
            },
            id="gemm",
        ),
        pytest.param(
            {
                "weight": "[dequantize] f = DequantizeLinear <axis = 0, block_size = 4> (codes, scales)",
                "scales": np.linspace(0.01, 0.1, 48, dtype=np.float32).reshape(2, 24),
            },
            id="scales-of-blocks",
        ),
    ],
)  # fmt: skip
def test_other_ways_to_cut_are_seen(made, tmp_path):
    model = handmade(**made)
    before = of_x(model, tmp_path / "before.onnx")
    assert split_projections(model, ONE) == 1
    assert operator_parts(operator_nodes(model), "qkv") == ["qkv", "qkv/1", "qkv/2"]
    np.testing.assert_array_equal(of_x(model, tmp_path / "after.onnx"), before)


@pytest.mark.parametrize(
    "made",
    [
        pytest.param({"cut": GATHERS.replace("i2", "i1")}, id="two-of-three"),
        pytest.param(
            {"cut": GATHERS.replace("c = Gather <axis = 0> (m, i2)", "c = ReduceMax(m, i)")}, id="other-reader"
        ),
        pytest.param({"linear": TOKENS.replace("Add(bias, n)", "Relu(n)")}, id="not-linear"),
        pytest.param({"linear": TOKENS.replace("2, 0, 3, 1, 4", "3, 0, 2, 1, 4")}, id="not-by-columns"),
        pytest.param({"linear": TOKENS.replace("Add(bias, n)", "Add(n, n)")}, id="added-to-itself"),
        pytest.param(
            {
                "codes": CODES[:7, :6].astype(ml_dtypes.int4), "wide": 7, "heads": np.array([-1, 5, 2, 1, 3]),
                "cut": GATHERS.replace("c = Gather <axis = 0> (m, i2)", "c = Identity(a)"),
                "scales": np.ones(6, np.float32), "bias": np.ones(6, np.float32),
            },
            id="4-bit-parts-of-odd-size",
        ),
    ],
)  # fmt: skip
def test_what_is_cut_otherwise_is_left_as_it_is(made):
    model = handmade(**made)
    before = ir.to_proto(model)
    assert split_projections(model, ONE) == 0
    assert ir.to_proto(model) == before


def test_a_graph_of_convolutions_has_nothing_to_take_apart(tiny):
    model = tiny.float_graph()
    before = ir.to_proto(model)
    assert split_projections(model, SimpleNamespace(facts=SimpleNamespace(operators={}))) == 0
    assert ir.to_proto(model) == before


def test_a_weight_that_is_not_stored_is_refused_by_name():
    model = handmade(weight="f = Cast <to = 1> (codes)")
    with pytest.raises(AccuQuantError, match=r"layer qkv: its weight .* run store_weights first"):
        split_projections(model, ONE)


def test_a_layer_that_is_not_in_the_graph_is_refused_by_name():
    model = handmade(linear=TOKENS.replace("[qkv]", "[other]"))
    with pytest.raises(AccuQuantError, match="layer qkv is not in the graph"):
        split_projections(model, ONE)


# -- what others make of it ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "kernel", "gpu"),
    [
        ("w8a8", "Int8", "default"),
        ("w4a8 smoothed", "Int8", "sm86"),
        ("fp8", "FP8", "sm89"),
        ("w4a16", "Half x Int4", "sm120"),
    ],
    ids=["w8a8", "w4a8-smoothed", "fp8", "w4a16"],
)
def test_every_part_is_multiplied_as_asked(rtx, form, kernel, gpu, lowered, tmp_path):
    model, recipe, _ = lowered(form)
    split_projections(model, recipe)
    cast_rest(model, "float16")
    save_graph(model, tmp_path / "apart.onnx")
    compiled = compile_plan(CompileRequest(tmp_path / "apart.onnx", gpu))
    assert compiled.precisions(PARTS) == dict.fromkeys(PARTS, kernel)
    running = SimpleNamespace(kernels=lambda: compiled.kernels, kept_in_float={})  # as the engine on a GPU tells it
    assert operator_precisions(running, QKV) == dict.fromkeys(QKV, kernel)
    of_parts = [replace(k, microseconds=1.0) for k in compiled.kernels if multiplies(k) and set(PARTS) & set(k.nodes)]
    assert sum(attribute(of_parts, QKV).operators.values()) == pytest.approx(len(of_parts))


@pytest.fixture(scope="module")
def bundle(tiny, tmp_path_factory):
    return tiny.export_classes(tmp_path_factory.mktemp("bundle"), target="tensorrt")


def test_a_bundle_for_tensorrt_is_written_apart_and_every_part_is_compared(bundle):
    written = operator_nodes(ir.load(bundle.graph("denoiser")))
    assert set(PARTS) <= written.keys()
    assert not set(PARTS) - set(QKV) & operator_nodes(ir.load(bundle.graph("twin"))).keys()
    assert set(QKV) <= bundle.manifest.operators.keys()
    found = compare.compare(bundle, "onnxruntime", range(2), 2, lambda *_: None)
    assert set(PARTS) <= found.layers.keys()
    assert found.first(compare.LEAST) is None


def test_inspection_tells_of_every_layer_of_it(rtx, bundle, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(
        sys, "argv", ["accuquant-inspect", str(bundle.folder), "--gpu", "sm89", "--out", str(tmp_path / "o.json")]
    )
    with pytest.raises(SystemExit):
        cli_inspect.main()
    (told,) = json.loads((tmp_path / "o.json").read_text())["results"]
    got = {verdict["operator"]: verdict["got"] for verdict in told["verdicts"]}
    assert {got[name] for name in QKV} == {"Int8"}
