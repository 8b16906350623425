"""NVIDIA's compiler on a CPU: what it makes of the graphs we write, kernel by kernel, and what it still refuses."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from accuquant.calibrate.families import load_model
from accuquant.calibrate.initialise import initialise
from accuquant.calibrate.model import quantize
from accuquant.calibrate.recipe import freeze
from accuquant.calibrate.scheme import QuantScheme
from accuquant.calibrate.sensitivity import keep_sensitive
from accuquant.calibrate.sharing import tabulate
from accuquant.calibrate.trace import trace
from accuquant.calibrate.trajectory import simulate
from accuquant.export.build import load
from accuquant.export.graph import save_graph, trace_float
from accuquant.export.lower import lower
from accuquant.export.passes.cast_rest import cast_rest
from accuquant.runtime.engines.compile_plan import CompileRequest, compile_plan
from accuquant.runtime.errors import AccuQuantError
from accuquant.runtime.inspection import operator_precisions

REFERENCE = Path(__file__).parents[2] / "tools" / "reference" / "fashion-ddim.ckpt"
GPUS = ["default", "sm86", "sm89", "sm120"]


# -- our graphs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference_graph():
    model = load_model(REFERENCE)
    operators = quantize(model, QuantScheme(weight_bits=8, activation_bits=8))
    return trace_float(model.network, operators, model.sample_shape)


def lowered(model, folder, graph=None, table=1, **scheme):
    """Both graphs of a model with plausible ranges, on disk; and the operators that must become integer kernels.

    `graph` is the model's exported one, if it was exported before.
    """
    chosen = QuantScheme(target="tensorrt", **scheme)
    operators = quantize(model, chosen)
    plan = trace(model.default_sampler, model.noise_schedule, 4)
    if table > 1:
        tabulate(model.network, operators, plan, table)
    teacher = simulate(model.network, plan, range(2), model.sample_shape, model.condition(range(2)))
    keep_sensitive(model.network, operators, plan, teacher, chosen.reserve)
    initialise(model.network, operators, plan, teacher, "min-max")
    graph = graph or trace_float(model.network, operators, model.sample_shape, model.condition([0]))
    graphs = lower(graph, freeze(operators, chosen, {}), "tensorrt")
    if chosen.rest != "float32":
        cast_rest(graphs[0], chosen.rest)
    for name, graph in zip(("int", "fp"), graphs, strict=True):
        save_graph(graph, folder / f"{name}.onnx")
    return folder / "int.onnx", folder / "fp.onnx", list(operators)


@pytest.mark.parametrize(
    "scheme",
    [
        {"weight_bits": 8, "activation_bits": 8, "attention": "quantized"},
        {"weight_bits": 4, "activation_bits": 8},
        {"weight_bits": 4, "activation_bits": 8, "container": "int8"},
        {"weight_bits": 4, "activation_bits": 8, "rest": "float16"},
        {"weight_bits": 4, "activation_bits": 8, "rest": "bfloat16"},
        {"weight_bits": 4, "activation_bits": 6, "policy": "uniform", "split": True, "table": 3},
    ],
    ids=[
        "w8a8-with-attention",
        "w4a8",
        "w4a8-int8-containers",
        "w4a8-float16-rest",
        "w4a8-bfloat16-rest",
        "w4a6-uniform-split-table",
    ],
)
def test_every_operator_of_every_form_is_an_integer_kernel(rtx, scheme, tiny, tiny_checkpoint, tmp_path):
    exported = None if scheme.get("split") else tiny.float_graph()
    graph, _, operators = lowered(load_model(tiny_checkpoint), tmp_path, exported, **scheme)
    for gpu in GPUS:
        compiled = compile_plan(CompileRequest(graph, gpu))
        assert compiled.precisions(operators) == dict.fromkeys(operators, "Int8"), gpu
        running = SimpleNamespace(kernels=lambda compiled=compiled: compiled.kernels)  # as the engine on a GPU tells it
        assert operator_precisions(running, operators) == dict.fromkeys(operators, "Int8"), gpu


@pytest.mark.parametrize(("bits", "most"), [(8, 0.27), (4, 0.15)])
def test_the_bundled_model_is_whole_in_integers_and_small_in_memory(rtx, bits, most, reference_graph, tmp_path):
    model = load_model(REFERENCE)
    graph, twin, operators = lowered(model, tmp_path, reference_graph, weight_bits=bits, activation_bits=8)
    whole = compile_plan(CompileRequest(twin)).weights_bytes
    for gpu in GPUS:
        compiled = compile_plan(CompileRequest(graph, gpu), tmp_path / "plan")
        assert compiled.precisions(operators) == dict.fromkeys(operators, "Int8"), gpu
        assert compiled.weights_bytes <= most * whole
        assert (tmp_path / "plan").stat().st_size > compiled.weights_bytes


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dit", "pixart", "sd3", "flux"])
def test_transformers_of_diffusers_are_whole_in_integers(rtx, name, folders, formula, tmp_path):
    """Both streams of a joint attention, and under the policy that leaves nothing in float: the ends too."""
    scheme = {"weight_bits": 8, "activation_bits": 8, "policy": "integer"}
    model = load(folders.request(name, tmp_path, formula, QuantScheme(target="tensorrt", **scheme)))[0]
    graph, _, operators = lowered(model, tmp_path, **scheme)
    compiled = compile_plan(CompileRequest(graph, "sm89"))
    assert compiled.precisions(operators) == dict.fromkeys(operators, "Int8")


@pytest.mark.parametrize("rest", ["float32", "float16"])
def test_8_bit_floats_are_multiplied_as_such_from_ada_on(rtx, rest, reference_graph, tmp_path):
    model = load_model(REFERENCE)
    scheme = {"weight_bits": 8, "activation_bits": 8, "number": "float8", "rest": rest}
    graph, twin, operators = lowered(model, tmp_path, reference_graph, **scheme)
    whole = compile_plan(CompileRequest(twin)).weights_bytes
    for gpu in ("default", "sm89", "sm120"):
        compiled = compile_plan(CompileRequest(graph, gpu))
        assert compiled.precisions(operators) == dict.fromkeys(operators, "FP8"), gpu
        assert compiled.weights_bytes <= 0.27 * whole
    with pytest.raises(AccuQuantError, match="sm86, because the model contains HW-specific datatypes: fp8_e4m3"):
        compile_plan(CompileRequest(graph, "sm86"))


def test_weights_alone_are_4_bits_in_memory_and_inside_the_kernels_of_linear_layers(rtx, reference_graph, tmp_path):
    """Convolutions dequantize theirs in kernels of their own: none multiplies floats by 4-bit weights."""
    model = load_model(REFERENCE)
    scheme = {"weight_bits": 4, "activation_bits": 16, "rest": "float16", "reserve": 0.0}
    graph, twin, operators = lowered(model, tmp_path, reference_graph, **scheme)
    linear = {node.name for node in onnx.load(graph).graph.node if node.op_type in ("Gemm", "MatMul")}
    whole = compile_plan(CompileRequest(twin)).weights_bytes
    for gpu in GPUS:
        compiled = compile_plan(CompileRequest(graph, gpu))
        got = compiled.precisions(operators)
        # A timestep's digits stay: what reads it alone computes in float32.
        assert {got[name] for name in linear & got.keys()} == {"Float x Int4"}, gpu
        assert {got[name] for name in got.keys() - linear} == {"Half"}, gpu
        assert got.keys() == set(operators)
        assert compiled.weights_bytes <= 0.15 * whole


@pytest.mark.parametrize(("to", "kernels"), [("float16", "Half"), ("bfloat16", "BFloat16")])
def test_the_twin_in_16_bits_is_whole_in_16_bits(rtx, reference_graph, tmp_path, to, kernels):
    model = load_model(REFERENCE)
    _, twin, operators = lowered(model, tmp_path, reference_graph, weight_bits=8, activation_bits=8)
    whole = compile_plan(CompileRequest(twin)).weights_bytes
    half = ir.load(twin)
    cast_rest(half, to)
    save_graph(half, tmp_path / "half.onnx")
    timed = {name for name in operators if model.role_of(name) == "time"}
    for gpu in GPUS:
        compiled = compile_plan(CompileRequest(tmp_path / "half.onnx", gpu))
        got = compiled.precisions(operators)
        assert got.keys() == set(operators)
        assert {got[name] for name in got.keys() - timed} == {kernels}, gpu
        assert compiled.weights_bytes < 0.6 * whole


def test_requantized_weights_are_the_same_weights(tiny, tiny_checkpoint, tmp_path):
    """INT4 -> x16 -> int8: bit for bit the weight that the int8 container holds, by ONNX Runtime's word."""
    import onnxruntime

    outputs = []
    for container in ("packed", "int8"):
        (tmp_path / container).mkdir()
        graph, _, _ = lowered(
            load_model(tiny_checkpoint), tmp_path / container, tiny.float_graph(),
            weight_bits=4, activation_bits=8, container=container,
        )  # fmt: skip
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        x = np.random.default_rng(0).standard_normal((2, 1, 8, 8)).astype(np.float32)
        outputs.append(session.run(None, {"x": x, "t": np.full(2, 50, np.float32)})[0])
    np.testing.assert_array_equal(*outputs)
