"""NVIDIA's compiler on a CPU: what it makes of the graphs we write, kernel by kernel, and what it still refuses."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
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
from accuquant.export.graph import operator_nodes, operator_parts, save_graph, trace_float
from accuquant.export.lower import LAST_REWRITES, lower
from accuquant.export.passes.cast_rest import cast_rest
from accuquant.export.passes.time_table import time_table
from accuquant.runtime.engines.compile_plan import CompileRequest, compile_plan
from accuquant.runtime.engines.rtx_log import ATTENTION
from accuquant.runtime.errors import AccuQuantError
from accuquant.runtime.inspection import operator_precisions
from torch import nn

REFERENCE = Path(__file__).parents[2] / "tools" / "reference" / "fashion-ddim.ckpt"
GPUS = ["default", "sm86", "sm89", "sm120"]
FLOAT8_GPUS = ["default", "sm89", "sm120"]


# -- our graphs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference_graph():
    model = load_model(REFERENCE)
    operators = quantize(model, QuantScheme(weight_bits=8, activation_bits=8))
    return trace_float(model.network, operators, model.sample_shape)


@pytest.fixture(scope="module")
def whole(rtx, reference_graph, tmp_path_factory):
    """Bytes of the bundled model's weights in float32, as compiled."""
    path = tmp_path_factory.mktemp("whole") / "float.onnx"
    save_graph(reference_graph.clone(), path)
    return compile_plan(CompileRequest(path)).weights_bytes


def lowered(model, folder, graph=None, table=1, smoothing=0.0, biased=False, looked_up=0, **scheme):
    """Both graphs of a model with plausible ranges, on disk; and the nodes that must become integer kernels.

    `graph` is the model's exported one, if it was exported before. What is looked up, at the timesteps of a plan of so
    many steps, is no operator of the integer graph any more; the float32 one is the network as it was.
    """
    chosen = QuantScheme(target="tensorrt", **scheme)
    operators = quantize(model, chosen)
    plan = trace(model.default_sampler, model.noise_schedule, 4)
    if table > 1:
        tabulate(model.network, operators, plan, table)
    teacher = simulate(model.network, plan, range(2), model.sample_shape, model.condition(range(2)))
    keep_sensitive(model.network, operators, plan, teacher, chosen.reserve)
    initialise(model.network, operators, plan, teacher, "min-max", smoothing=smoothing)
    for operator in operators.values() if biased else ():
        operator.learn_bias()
    graph = graph or trace_float(model.network, operators, model.sample_shape, model.condition([0]))
    recipe = freeze(operators, chosen, {})
    graphs = lower(graph, recipe, "tensorrt")
    for rewrite in LAST_REWRITES["tensorrt"]:
        rewrite(graphs[0], recipe)
    if looked_up:
        sampled = trace(model.default_sampler, model.noise_schedule, looked_up)
        assert time_table(graphs[0], [step.timestep for step in sampled.steps]) > 0
    if chosen.rest != "float32":
        cast_rest(graphs[0], chosen.rest)
    for name, made in zip(("int", "fp"), graphs, strict=True):
        save_graph(made, folder / f"{name}.onnx")
    kept = operator_nodes(graphs[0])
    parts = [part for name in operators if name in kept for part in operator_parts(kept, name)]
    return folder / "int.onnx", folder / "fp.onnx", parts


FORMS = {
    "w8a8 with attention": {"weight_bits": 8, "attention": "quantized"},
    "w4a8 smoothed float16": {"weight_bits": 4, "rest": "float16", "smoothing": 0.5, "biased": True},
    "w4a8 bytes bfloat16": {"weight_bits": 4, "container": "int8", "rest": "bfloat16", "attention": "quantized"},
    "w4a7 split table": {
        "weight_bits": 4, "activation_bits": 7, "policy": "uniform", "split": True, "table": 3, "rest": "float16",
    },
    "w3a5 smoothed table looked up": {
        "weight_bits": 3, "activation_bits": 5, "table": 2, "smoothing": 0.5, "looked_up": 4, "biased": True,
        "rest": "float16", "attention": "quantized",
    },
    "fp8 float16": {"number": "float8", "rest": "float16", "smoothing": 0.5},
    "fp8 bfloat16 table": {"number": "float8", "rest": "bfloat16", "table": 2, "looked_up": 4},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS, ids=[name.replace(" ", "-") for name in FORMS])
def test_every_operator_of_every_form_is_an_integer_kernel(rtx, form, tiny, tmp_path):
    scheme = {"weight_bits": 8, "activation_bits": 8, "policy": "integer"} | FORMS[form]
    graph, _, operators = lowered(tiny.every(), tmp_path, None if "split" in scheme else tiny.every_graph(), **scheme)
    assert {"first", "grouped", "down", "q", "kv", "pooled", "joined", "last"} <= set(operators)
    kernel = "FP8" if "number" in scheme else "Int8"
    for gpu in GPUS if kernel == "Int8" else FLOAT8_GPUS:
        compiled = compile_plan(CompileRequest(graph, gpu))
        assert compiled.precisions(operators) == dict.fromkeys(operators, kernel), gpu
        # As the engine on a GPU tells it.
        running = SimpleNamespace(kernels=lambda compiled=compiled: compiled.kernels, kept_in_float={})
        assert operator_precisions(running, operators) == dict.fromkeys(operators, kernel), gpu


@pytest.mark.parametrize(
    "scheme",
    [
        {"weight_bits": 8, "activation_bits": 8, "attention": "quantized"},
        {"weight_bits": 4, "activation_bits": 6, "policy": "uniform", "split": True, "table": 3},
    ],
    ids=["w8a8", "w4a6-uniform-split-table"],
)
def test_a_u_net_is_whole_in_integers(rtx, scheme, tiny, tiny_checkpoint, tmp_path):
    exported = None if scheme.get("split") else tiny.float_graph()
    graph, _, operators = lowered(load_model(tiny_checkpoint), tmp_path, exported, **scheme)
    for gpu in ("default", "sm120"):
        compiled = compile_plan(CompileRequest(graph, gpu))
        assert compiled.precisions(operators) == dict.fromkeys(operators, "Int8"), gpu


@pytest.mark.parametrize("rest", ["float16", "bfloat16"])
def test_attention_that_is_left_in_16_bits_is_one_kernel(rtx, rest, tiny, tmp_path):
    """For which its products are left in float."""
    scheme = {"weight_bits": 8, "activation_bits": 8, "rest": rest}
    graph, _, _ = lowered(tiny.every(), tmp_path, tiny.every_graph(), **scheme)
    compiled = compile_plan(CompileRequest(graph))
    (fused,) = [k for k in compiled.kernels if k.kind == ATTENTION]
    assert {"qk", "av"} <= set(fused.nodes)
    assert fused.precision == {"float16": "Half", "bfloat16": "BFloat16"}[rest]


MOST = {8: 0.27, 4: 0.15}  # of float32's weights memory, by bits of weights
# As `--target tensorrt` exports where nothing else is asked: the time embedding is a table of a row for each step.
BY_DEFAULT = {"activation_bits": 8, "rest": "float16", "looked_up": 50}


def check_reference(exported, whole, folder, gpus, **scheme):
    """The bundled model in some form: all of it in integers, and small."""
    graph, _, operators = lowered(load_model(REFERENCE), folder, exported, **scheme)
    for gpu in gpus:
        compiled = compile_plan(CompileRequest(graph, gpu), folder / "plan")
        assert compiled.precisions(operators) == dict.fromkeys(operators, "Int8"), gpu
        assert compiled.weights_bytes <= MOST[scheme["weight_bits"]] * whole
        assert (folder / "plan").stat().st_size > compiled.weights_bytes


@pytest.mark.parametrize("bits", [8, 4])
def test_the_bundled_model_as_users_get_it_is_whole_in_integers_and_small(rtx, bits, reference_graph, whole, tmp_path):
    assert load_model(REFERENCE).default_steps == BY_DEFAULT["looked_up"]
    check_reference(reference_graph, whole, tmp_path, GPUS, weight_bits=bits, **BY_DEFAULT)


@pytest.mark.parametrize(
    ("gpu", "form"),
    [
        ("sm86", {"weight_bits": 8, "rest": "float32", "looked_up": 0}),
        ("default", {"weight_bits": 4, "rest": "float32", "looked_up": 0}),
        ("sm89", {"weight_bits": 4, "rest": "bfloat16", "reserve": 0.0}),
        ("sm120", {"weight_bits": 4, "table": 3, "reserve": 0.0}),
        ("sm86", {"weight_bits": 8, "rest": "bfloat16", "table": 3, "looked_up": 0, "policy": "integer"}),
        ("sm89", {"weight_bits": 8, "smoothing": 0.5}),
    ],
    ids=["w8a8-float32", "w4a8-float32", "w4a8-bfloat16", "w4a8-table", "w8a8-bfloat16-table", "w8a8-smoothed"],
)
def test_the_bundled_model_in_other_forms_is_so_too(rtx, gpu, form, reference_graph, whole, tmp_path):
    check_reference(reference_graph, whole, tmp_path, [gpu], **BY_DEFAULT | form)


@pytest.mark.slow  # 16 forms on four GPUs: five minutes
@pytest.mark.parametrize("table", [1, 3])
@pytest.mark.parametrize("looked_up", [0, 50])
@pytest.mark.parametrize("rest", ["float16", "bfloat16"])
@pytest.mark.parametrize("bits", [8, 4])
def test_the_bundled_model_in_all_forms(rtx, bits, rest, looked_up, table, reference_graph, whole, tmp_path):
    form = {"weight_bits": bits, "rest": rest, "looked_up": looked_up, "table": table}
    check_reference(reference_graph, whole, tmp_path, GPUS, **BY_DEFAULT | form)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dit", "pixart", "sd3", "flux"])
def test_transformers_of_diffusers_are_whole_in_integers(rtx, name, folders, formula, tmp_path):
    """Both streams of a joint attention, and under the policy that leaves nothing in float: the ends too.

    Queries, keys and values in one are taken apart; fused, the compiler would cut their weight, dequantized.
    """
    scheme = {"weight_bits": 8, "activation_bits": 8, "policy": "integer"}
    model = load(folders.request(name, tmp_path, formula, QuantScheme(target="tensorrt", **scheme)))[0]
    graph, _, operators = lowered(model, tmp_path, **scheme)
    compiled = compile_plan(CompileRequest(graph, "sm89"))
    assert any(operator.endswith(".qkv/2") for operator in operators) == (name == "dit")
    assert compiled.precisions(operators) == dict.fromkeys(operators, "Int8")


@pytest.mark.parametrize(("rest", "looked_up"), [("float32", 0), ("float16", 50)])
def test_8_bit_floats_are_multiplied_as_such_from_ada_on(rtx, rest, looked_up, reference_graph, whole, tmp_path):
    model = load_model(REFERENCE)
    scheme = {"weight_bits": 8, "activation_bits": 8, "number": "float8", "rest": rest, "looked_up": looked_up}
    graph, _, operators = lowered(model, tmp_path, reference_graph, **scheme)
    for gpu in FLOAT8_GPUS:
        compiled = compile_plan(CompileRequest(graph, gpu))
        assert compiled.precisions(operators) == dict.fromkeys(operators, "FP8"), gpu
        assert compiled.weights_bytes <= 0.27 * whole
    with pytest.raises(AccuQuantError, match="sm86, because the model contains HW-specific datatypes: fp8_e4m3"):
        compile_plan(CompileRequest(graph, "sm86"))


def test_weights_alone_are_4_bits_in_memory_and_inside_the_kernels_of_linear_layers(
    rtx, reference_graph, whole, tmp_path
):
    """Convolutions dequantize theirs in kernels of their own: none multiplies floats by 4-bit weights."""
    model = load_model(REFERENCE)
    scheme = {"weight_bits": 4, "activation_bits": 16, "rest": "float16", "reserve": 0.0}
    graph, _, operators = lowered(model, tmp_path, reference_graph, **scheme)
    linear = {node.name for node in onnx.load(graph).graph.node if node.op_type in ("Gemm", "MatMul")}
    for gpu in GPUS:
        compiled = compile_plan(CompileRequest(graph, gpu))
        got = compiled.precisions(operators)
        # A timestep's digits stay: what reads it alone computes in float32.
        assert {got[name] for name in linear & got.keys()} == {"Float x Int4"}, gpu
        assert {got[name] for name in got.keys() - linear} == {"Half"}, gpu
        assert got.keys() == set(operators)
        assert compiled.weights_bytes <= 0.15 * whole


COLUMNS = (24, 32, 64, 128)  # no blocks, and blocks of 16, 32 and 64


class Widths(nn.Module):
    """Linear layers of these columns, of tokens and of vectors."""

    def __init__(self):
        super().__init__()
        self.tokens, self.vectors = (nn.ModuleList(nn.Linear(c, 384) for c in COLUMNS) for _ in range(2))

    def forward(self, x, t):
        of_tokens = [layer(x.reshape(len(x), -1, c)).mean(1) for c, layer in zip(COLUMNS, self.tokens, strict=True)]
        of_vectors = [layer(x.flatten(1)[:, :c]) for c, layer in zip(COLUMNS, self.vectors, strict=True)]
        return torch.stack([*of_tokens, *of_vectors]).sum(0).reshape(x.shape) * t[:, None, None, None]


@pytest.mark.parametrize(("rest", "kernel"), [("float16", "Half"), ("bfloat16", "BFloat16"), ("float32", "Float")])
def test_a_linear_layers_4_bit_weights_alone_enter_its_kernel_by_blocks(rtx, rest, kernel, tiny, tmp_path):
    """Of 24 columns there are no blocks: that weight is dequantized by a kernel of its own."""
    torch.manual_seed(0)
    model = replace(tiny.every(), network=Widths().eval().requires_grad_(False), sample_shape=(6, 8, 8))
    scheme = {"weight_bits": 4, "activation_bits": 16, "rest": rest, "reserve": 0.0}
    graph, _, operators = lowered(model, tmp_path, **scheme)
    kinds = {node.name: node.op_type for node in onnx.load(graph).graph.node if node.name in operators}
    assert set(kinds.values()) == {"Gemm", "MatMul"}
    blocks = {name: kernel if name.endswith(".0") else f"{kernel} x Int4" for name in operators}
    for gpu in GPUS:
        compiled = compile_plan(CompileRequest(graph, gpu))
        assert compiled.precisions(operators) == blocks, gpu
        assert compiled.weights_bytes < 0.2 * 4 * 2 * 384 * sum(COLUMNS)  # scales of blocks among them


@pytest.mark.parametrize(("to", "kernels"), [("float16", "Half"), ("bfloat16", "BFloat16")])
def test_the_twin_in_16_bits_is_whole_in_16_bits(rtx, reference_graph, whole, tmp_path, to, kernels):
    model = load_model(REFERENCE)
    _, twin, operators = lowered(model, tmp_path, reference_graph, weight_bits=8, activation_bits=8)
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
