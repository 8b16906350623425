"""Every rewrite against its own promise, on the tiny U-Net's real graph."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch
from accuquant.calibrate.families.ddim import role_of
from accuquant.calibrate.initialise import initialise
from accuquant.calibrate.layers import quantization, quantize_operators
from accuquant.calibrate.recipe import freeze
from accuquant.calibrate.scheme import QuantScheme
from accuquant.calibrate.sharing import tabulate
from accuquant.calibrate.splits import find_splits
from accuquant.calibrate.trace import trace
from accuquant.calibrate.trajectory import simulate
from accuquant.export.check_target import check_target
from accuquant.export.graph import operator_nodes, save_graph, trace_float
from accuquant.export.lower import lower
from accuquant.export.passes.cast_rest import cast_rest
from accuquant.export.passes.emulate_bfloat16 import emulate_bfloat16
from accuquant.export.passes.group_norm_affine import group_norm_affine
from accuquant.export.passes.insert_qdq import insert_qdq
from accuquant.export.passes.linear_as_matmul import linear_as_matmul
from accuquant.export.passes.store_weights import store_weights
from accuquant.export.verify import check_graph, sqnr
from accuquant.runtime.engines import open_engine
from accuquant.runtime.engines.base import EngineOptions
from accuquant.runtime.engines.onnxruntime import OnnxRuntimeEngine
from accuquant.runtime.errors import AccuQuantError

SAMPLES = 16  # of fewer, what rounding flips by the CPU is half a decibel


class Lowered:
    """The tiny U-Net with scales from data, its recipe and its float graph."""

    def __init__(self, tiny, smoothing=0.0, table=1, **scheme):
        self.network = tiny.unet()
        plan = trace("ddim", tiny.NOISE_SCHEDULE, 4)
        self.teacher = simulate(self.network, plan, range(SAMPLES), tiny.SHAPE)
        self.plan = plan
        self.scheme = QuantScheme(**scheme)
        splits = find_splits(self.network, tiny.SHAPE) if self.scheme.split else None
        self.operators = quantize_operators(self.network, self.scheme, role_of, splits)
        if table > 1:
            tabulate(self.network, self.operators, plan, table)
        initialise(self.network, self.operators, plan, self.teacher, "mse", smoothing=smoothing)
        self.recipe = freeze(self.operators, self.scheme, {})
        self.graph = trace_float(self.network, self.operators, tiny.SHAPE) if splits else tiny.float_graph()

    def run(self, model, path, exact=True):
        save_graph(model, path)
        check_graph(path)
        x = self.teacher.states[1].numpy()
        t = np.full(len(x), self.plan.steps[1].timestep, np.float32)
        engine = OnnxRuntimeEngine(path, EngineOptions(batch=len(x)), exact=exact)
        return engine.run({"x": x, "t": t})

    def torch_output(self, active):
        from accuquant.calibrate.layers import quantization
        from accuquant.calibrate.trajectory import call

        with torch.no_grad(), quantization(self.operators, active):
            return call(self.network, self.plan, 1, self.teacher.states[1]).numpy()


def copy(model):
    return ir.from_proto(ir.to_proto(model))


def copy_of(recipe, facts):
    return type(recipe)(facts, recipe.codes, recipe.scales, recipe.shifts, recipe.smoothings)


@pytest.fixture(scope="module")
def w4a8(tiny):
    return Lowered(tiny, weight_bits=4, activation_bits=8)


def test_every_operator_has_exactly_one_node_of_its_name(w4a8):
    nodes = operator_nodes(w4a8.graph)
    assert set(w4a8.operators) <= set(nodes)
    kinds = {"conv": {"Conv"}, "linear": {"Gemm", "MatMul"}, "matmul": {"MatMul"}}
    for name, operator in w4a8.operators.items():
        assert nodes[name].op_type in kinds[operator.kind]


def test_a_graph_tells_nothing_of_the_machine_it_was_made_on(w4a8, tmp_path):
    save_graph(copy(w4a8.graph), tmp_path / "float.onnx")
    assert b".py" not in (tmp_path / "float.onnx").read_bytes()


def test_float_graph_is_the_network(w4a8, tmp_path):
    out = w4a8.run(copy(w4a8.graph), tmp_path / "float.onnx")
    # float32 in another order of summation
    np.testing.assert_allclose(out, w4a8.torch_output(active=False), atol=2e-5)


@pytest.mark.parametrize(("rewrite", "gone"), [(group_norm_affine, "GroupNormalization"), (linear_as_matmul, "Gemm")])
def test_a_rewrite_of_the_float_part_computes_the_same(w4a8, tmp_path, rewrite, gone):
    model = copy(w4a8.graph)
    before = w4a8.run(copy(model), tmp_path / "before.onnx")
    count = sum(node.op_type == gone for node in model.graph)
    assert rewrite(model) == count > 0
    assert not any(node.op_type == gone for node in model.graph)
    np.testing.assert_allclose(w4a8.run(model, tmp_path / "after.onnx"), before, atol=2e-5)


def test_a_pair_that_some_readers_share_stands_before_the_first_of_them(w4a8, tmp_path):
    """Every time projection reads one tensor. Of those in `up`, the last in the module's order runs first."""
    readers = [name for name in w4a8.operators if name.endswith("temb_proj")]
    facts = dict(w4a8.recipe.facts.operators)
    for name in readers:
        if not name.startswith("up."):
            (given,) = facts[name].inputs
            wider = given.model_copy(update={"scale": 2 * given.scale})
            facts[name] = facts[name].model_copy(update={"inputs": (wider,)})
    recipe = copy_of(w4a8.recipe, w4a8.recipe.facts.model_copy(update={"operators": facts}))
    model = copy(w4a8.graph)
    store_weights(model, recipe)
    insert_qdq(model, recipe)
    w4a8.run(model, tmp_path / "parted.onnx")  # which checks the graph
    pairs = {name: operator_nodes(model)[name].inputs[0] for name in readers}
    assert len({id(value) for value in pairs.values()}) == 2


def test_weights_are_stored_as_the_recipe_has_them(w4a8):
    model = copy(w4a8.graph)
    assert store_weights(model, w4a8.recipe) == len(w4a8.recipe.codes)
    nodes = operator_nodes(model)
    for name, codes in w4a8.recipe.codes.items():
        parent = nodes[name].inputs[1].producer()
        assert parent.op_type == "DequantizeLinear"
        stored = parent.inputs[0].const_value
        bits = w4a8.recipe.facts.operators[name].weight_bits
        assert stored.dtype == (ir.DataType.INT4 if bits <= 4 else ir.DataType.INT8)
        assert stored.nbytes == (codes.numel() + 1) // 2 if bits <= 4 else codes.numel()
        values = stored.numpy().astype(np.int8)
        np.testing.assert_array_equal(values if nodes[name].op_type != "MatMul" else values.T, codes.numpy())
    # No float copy of a quantized weight may stay behind in the file.
    assert not any(name.removesuffix(".weight") in w4a8.recipe.codes for name in model.graph.initializers)


def test_only_operator_inputs_get_quantizers(w4a8):
    model = copy(w4a8.graph)
    insert_qdq(model, w4a8.recipe)
    nodes = operator_nodes(model)
    for name, operator in w4a8.recipe.facts.operators.items():
        for index, facts in enumerate(operator.inputs):
            dequantize = nodes[name].inputs[index].producer()
            assert dequantize.op_type == "DequantizeLinear"
            scale = dequantize.inputs[1].const_value.numpy()
            assert scale.shape == ()  # TensorRT quietly runs in float otherwise
            assert scale.dtype == np.float32
            assert dequantize.inputs[2].const_value.numpy() == facts.zero_point
    targets = {use.node.name for n in model.graph if n.op_type == "DequantizeLinear" for use in n.outputs[0].uses()}
    assert targets == set(w4a8.operators)


@pytest.mark.parametrize(
    ("bits", "target"),
    [
        ((8, 8), "cpu"),
        ((4, 8), "cpu"),
        ((4, 6), "cpu"),
        ((8, 8), "tensorrt"),
        ((4, 4), "tensorrt"),
        ((4, 8), "onnxruntime"),
        ((4, 16), "tensorrt"),
        ((8, 8, "float8"), "tensorrt"),
    ],
)
def test_lowered_graph_computes_what_the_simulation_computes(tiny, tmp_path, bits, target):
    scheme = dict(zip(("weight_bits", "activation_bits", "number"), bits, strict=False))
    lowered = Lowered(tiny, target=target, **scheme)
    quantized, twin = lower(lowered.graph, lowered.recipe, lowered.scheme.target)
    fp, simulation = lowered.torch_output(active=False), lowered.torch_output(active=True)
    out = lowered.run(quantized, tmp_path / "q.onnx")
    np.testing.assert_allclose(lowered.run(twin, tmp_path / "t.onnx"), fp, atol=2e-5)
    # Rounding flips spread, so the two executions are held against full precision, not against each other.
    assert sqnr(fp, out) == pytest.approx(sqnr(fp, simulation), abs=0.5)
    assert sqnr(simulation, out) > sqnr(fp, simulation) + 3


def test_blocks_of_columns_are_stored_with_a_scale_each(tiny, tmp_path):
    """4-bit codes of a linear layer's weight, times the scale of their block, are the weight that was simulated."""
    made = Lowered(tiny, weight_bits=4, activation_bits=16, target="tensorrt")
    quantized, _ = lower(made.graph, made.recipe, "tensorrt")
    name = "down.0.block.0.temb_proj"
    dequantize = operator_nodes(quantized)[f"{name}.weight.dequantize"]
    codes, scale = (value.const_value for value in dequantize.inputs[:2])
    assert codes.dtype == ir.DataType.INT4
    assert (tuple(codes.shape), tuple(scale.shape)) == ((32, 128), (32, 2))
    assert {k: v.as_int() for k, v in dequantize.attributes.items()} == {"axis": 1, "block_size": 64}
    simulated, _ = made.operators[name].weight_codes()
    stored = codes.numpy().astype(np.float32) * scale.numpy().repeat(64, axis=1)
    np.testing.assert_array_equal(stored, simulated.detach().numpy())
    assert not [node for node in quantized.graph if node.op_type == "QuantizeLinear"]  # activations are left alone
    check_target(quantized, made.operators, "tensorrt", weights_alone=True)
    with pytest.raises(AccuQuantError, match=r"comes from .*, not from DequantizeLinear"):
        check_target(quantized, made.operators, "tensorrt")


@pytest.fixture(scope="module")
def for_onnxruntime(tiny):
    return Lowered(tiny, weight_bits=4, activation_bits=8, target="onnxruntime")


def test_onnxruntime_multiplies_every_operator_in_integers(for_onnxruntime, tmp_path):
    """By its own profile; 4-bit weights were widened while loading."""
    quantized, twin = lower(for_onnxruntime.graph, for_onnxruntime.recipe, "onnxruntime")
    for_onnxruntime.run(quantized, tmp_path / "q.onnx", exact=False)
    kernels = open_engine(tmp_path / "q.onnx", EngineOptions(batch=2), "onnxruntime").kernels()
    ran = {node: kernel for kernel in kernels for node in kernel.nodes if node in for_onnxruntime.operators}
    assert ran.keys() == for_onnxruntime.operators.keys()
    products = {"conv": {"QLinearConv"}, "linear": {"MatMulIntegerToFloat"}}
    products["matmul"] = {"MatMulIntegerToFloat", "QLinearMatMul"}  # the latter where a convolution reads the product
    for name, operator in for_onnxruntime.operators.items():
        assert ran[name].kind in products[operator.kind]
        assert ran[name].precision in {"u8", "i8"}
    assert "Cast" not in {kernel.kind for kernel in kernels if kernel.precision == "i8"}
    save_graph(twin, tmp_path / "t.onnx")
    floats = open_engine(tmp_path / "t.onnx", EngineOptions(batch=2), "onnxruntime").kernels()
    assert not {kernel.precision for kernel in floats} & {"u8", "i8"}


def test_what_is_written_in_8_bits_is_read_in_8_bits(for_onnxruntime):
    quantized, _ = lower(for_onnxruntime.graph, for_onnxruntime.recipe, "onnxruntime")
    nodes = operator_nodes(quantized)
    convolutions = [name for name, op in for_onnxruntime.operators.items() if op.kind == "conv"]
    assert convolutions
    for name in convolutions:
        (use,) = nodes[name].outputs[0].uses()
        facts = for_onnxruntime.recipe.facts.operators[name].output
        assert use.node.op_type == "QuantizeLinear"
        assert use.node.inputs[1].const_value.numpy() == np.float32(facts.scale)
        assert use.node.inputs[2].const_value.numpy() == facts.zero_point
    others = [name for name, op in for_onnxruntime.recipe.facts.operators.items() if op.kind != "conv"]
    assert all(for_onnxruntime.recipe.facts.operators[name].output is None for name in others)


def test_a_gemm_with_factors_is_refused(w4a8):
    model = copy(w4a8.graph)
    gemm = next(node for node in model.graph if node.op_type == "Gemm")
    gemm.attributes["alpha"] = ir.AttrFloat32("alpha", 2.0)
    with pytest.raises(AccuQuantError, match=f"linear layer {gemm.name}: a Gemm of a plain input"):
        linear_as_matmul(model)


@pytest.mark.parametrize("to", ["float16", "bfloat16"])
def test_the_rest_in_16_bits_is_the_same_network(tiny, tmp_path, to):
    """By the standard's own reference execution, the only one on a CPU that has bfloat16."""
    from onnx.reference import ReferenceEvaluator

    made = Lowered(tiny, weight_bits=4, activation_bits=8, target="tensorrt")
    quantized, _ = lower(made.graph, made.recipe, "tensorrt")
    fp, before = made.torch_output(active=False), made.run(copy(quantized), tmp_path / "before.onnx")
    scales = {name: v.const_value.numpy() for name, v in quantized.graph.initializers.items() if "scale" in name}
    assert cast_rest(quantized, to) > len(made.operators)
    save_graph(quantized, tmp_path / "after.onnx")
    check_graph(tmp_path / "after.onnx")
    feed = {"x": made.teacher.states[1].numpy(), "t": np.full(SAMPLES, made.plan.steps[1].timestep, np.float32)}
    (after,) = ReferenceEvaluator(str(tmp_path / "after.onnx")).run(None, feed)
    assert after.dtype == np.float32
    assert sqnr(fp, after) == pytest.approx(sqnr(fp, before), abs=1.0)
    assert not np.array_equal(after, before)
    nodes = operator_nodes(quantized)
    for name, scale in scales.items():  # the integers are the same ones
        np.testing.assert_array_equal(quantized.graph.initializers[name].const_value.numpy(), scale)
    computed = {name: nodes[name].outputs[0].dtype.name.lower() for name in made.operators}
    alone = {name for name, dtype in computed.items() if dtype == "float"}
    assert alone == {name for name in made.operators if role_of(name) == "time"}  # no latent reaches them
    assert {dtype for name, dtype in computed.items() if name not in alone} == {to}
    check_target(quantized, made.operators, "tensorrt")


@pytest.mark.parametrize("bits", [(4, 8), (4, 16), (16, 16)])
def test_bfloat16_is_emulated_where_no_engine_has_it(tiny, tmp_path, bits):
    """Nearly what the standard's own execution makes, which adds up in bfloat16 too; and another thing than float32."""
    from onnx.reference import ReferenceEvaluator

    made = Lowered(tiny, weight_bits=bits[0], activation_bits=bits[1], target="tensorrt", rest="bfloat16")
    quantized, _ = lower(made.graph, made.recipe, "tensorrt")
    before = made.run(copy(quantized), tmp_path / "before.onnx")
    cast_rest(quantized, "bfloat16")
    kept = quantized.clone()
    emulated = emulate_bfloat16(quantized)
    assert [str(n) for n in quantized.graph] == [str(n) for n in kept.graph], "the graph itself stays as it was"
    values = {v for n in emulated.graph for v in n.outputs if v.dtype == ir.DataType.BFLOAT16}
    assert values
    assert {v.producer().op_type for v in values} == {"Cast"}
    save_graph(quantized, tmp_path / "itself.onnx")
    feed = {"x": made.teacher.states[1].numpy(), "t": np.full(SAMPLES, made.plan.steps[1].timestep, np.float32)}
    (standard,) = ReferenceEvaluator(str(tmp_path / "itself.onnx")).run(None, feed)
    after = made.run(emulated, tmp_path / "emulated.onnx")
    assert sqnr(before, after) == pytest.approx(sqnr(before, standard), abs=1.5)
    assert sqnr(standard, after) > sqnr(before, standard) - 1.5
    np.testing.assert_array_equal(after.astype(ml_dtypes.bfloat16).astype(np.float32), after)
    assert not np.array_equal(before.astype(ml_dtypes.bfloat16).astype(np.float32), before)


@pytest.mark.parametrize("form", [{"split": True}, {"table": 2}])
def test_forms_that_cannot_write_8_bits_are_refused(tiny, form):
    with pytest.raises(AccuQuantError, match=r"writes 8 bits on this target|cannot write 8 bits"):
        Lowered(tiny, weight_bits=4, activation_bits=8, target="onnxruntime", **form)


@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
def test_split_shortcuts_compute_what_the_simulation_computes(tiny, tmp_path, target):
    """Two convolutions and a sum, each with its own scale, and the bias once."""
    made = Lowered(tiny, weight_bits=4, activation_bits=8, target=target, split=True)
    split = [name for name, op in made.recipe.facts.operators.items() if op.kind == "conv" and len(op.inputs) == 2]
    assert split
    assert all(name.startswith("up.") and name.endswith("nin_shortcut") for name in split)
    quantized, twin = lower(made.graph, made.recipe, target)
    nodes = operator_nodes(quantized)
    for name in split:
        assert nodes[name].inputs[0].producer().op_type == "DequantizeLinear"
        assert nodes[f"{name}.second"].op_type == "Conv"
        assert len(nodes[f"{name}.second"].inputs) == 2
        assert nodes[f"{name}.sum"].op_type == "Add"
    assert not any(node.name and node.name.endswith(".second") for node in twin.graph)
    out = made.run(quantized, tmp_path / "q.onnx")
    fp, simulation = made.torch_output(active=False), made.torch_output(active=True)
    assert sqnr(fp, out) == pytest.approx(sqnr(fp, simulation), abs=0.5)
    assert sqnr(simulation, out) > sqnr(fp, simulation) + 3


@pytest.mark.parametrize(
    ("target", "split", "bits"),
    [("cpu", False, (8, 8)), ("cpu", True, (4, 6)), ("tensorrt", False, (4, 8)), ("tensorrt", True, (8, 8))],
)
def test_a_table_of_scales_is_looked_up_by_every_sample(tiny, tmp_path, target, split, bits):
    """One call with samples at all four steps gives each what the simulation gives at its own step."""
    made = Lowered(tiny, table=4, weight_bits=bits[0], activation_bits=bits[1], target=target, split=split)
    assert len(made.recipe.facts.step_bounds) == 3
    quantized, twin = lower(made.graph, made.recipe, target)
    check_target(quantized, made.recipe.facts.operators, target)
    assert not any(node.name and "scale_of_step" in node.name for node in twin.graph)
    x = torch.stack([made.teacher.states[i, 0] for i in range(4)])
    t = torch.tensor([step.timestep for step in made.plan.steps])
    simulation = []
    for i in range(4):
        with torch.no_grad(), quantization(made.operators, active=True):
            simulation.append(made.network(x[i : i + 1], t[i : i + 1])[0])
    with torch.no_grad(), quantization(made.operators, active=False):
        fp = np.stack([made.network(x[i : i + 1], t[i : i + 1])[0].numpy() for i in range(4)])
    simulation = np.stack([s.numpy() for s in simulation])
    save_graph(quantized, tmp_path / "q.onnx")
    check_graph(tmp_path / "q.onnx")
    engine = OnnxRuntimeEngine(tmp_path / "q.onnx", EngineOptions(batch=4), exact=True)
    out = engine.run({"x": x.numpy(), "t": t.numpy()})
    assert sqnr(fp, out) == pytest.approx(sqnr(fp, simulation), abs=0.5)
    assert sqnr(simulation, out) > sqnr(fp, simulation) + 3
    # A sample at another row's step is another call: the table is really used.
    turned = engine.run({"x": x.numpy(), "t": t.numpy()[::-1].copy()})
    assert sqnr(simulation, turned) < sqnr(simulation, out)


def test_a_table_stays_in_integer_kernels(tiny, tmp_path):
    from accuquant.runtime.inspection import LOW_BIT, operator_precisions

    made = Lowered(tiny, table=4, weight_bits=4, activation_bits=8)
    save_graph(lower(made.graph, made.recipe, "cpu")[0], tmp_path / "q.onnx")
    engine = open_engine(tmp_path / "q.onnx", EngineOptions(batch=2), "openvino")
    precisions = operator_precisions(engine, made.operators)
    assert precisions.keys() == made.operators.keys()
    assert {name for name, p in precisions.items() if p not in LOW_BIT} == engine.kept_in_float.keys()


def test_a_table_whose_layer_has_no_batch_axis_is_refused_by_name(tiny):
    made = Lowered(tiny, table=2, weight_bits=8, activation_bits=8)
    graph = copy(made.graph)
    name = "mid.attn_1.q"
    operator_nodes(graph)[name].inputs[0].shape = ir.Shape([16, 32, 4, 4])
    with pytest.raises(AccuQuantError, match=rf"layer {name}: input 0 .*table = 1"):
        lower(graph, made.recipe, "cpu")


def test_a_convolution_in_two_parts_is_the_convolution(tiny, tmp_path):
    """At 8 bits with ranges that lose little, split and whole agree to the grid's error."""
    whole, split = (Lowered(tiny, weight_bits=8, activation_bits=8, split=s) for s in (False, True))
    a, b = whole.torch_output(active=True), split.torch_output(active=True)
    np.testing.assert_array_equal(whole.torch_output(active=False), split.torch_output(active=False))
    assert sqnr(a, b) > 25


@pytest.mark.parametrize("folded", [True, False])
def test_learned_biases_reach_the_graph(tiny, tmp_path, folded):
    """The simulation with random shifts, to within float summation; with and without a bias of the layer's own."""
    made = Lowered(tiny, weight_bits=8, activation_bits=8)
    generator = torch.Generator().manual_seed(0)
    for name, operator in made.operators.items():
        if operator.weight_quantizer is not None:
            operator.learn_bias()
            if not folded and name.endswith("conv1"):
                operator.conv.bias = None
            with torch.no_grad():
                operator.shift.normal_(0, 0.1, generator=generator)
    made.recipe = freeze(made.operators, made.scheme, {})
    made.recipe.save(tmp_path)
    made.recipe = type(made.recipe).load(tmp_path)
    quantized, twin = lower(trace_float(made.network, made.operators, tiny.SHAPE), made.recipe, "cpu")
    got = made.run(quantized, tmp_path / "q.onnx")
    wanted = made.torch_output(active=True)
    assert sqnr(wanted, got) > 35
    for operator in made.operators.values():
        operator.shift = None
    assert sqnr(made.torch_output(active=True), got) < 20
    assert not any("bias.corrected" in (v or "") for v in twin.graph.initializers)


def test_smoothed_inputs_are_divided_in_the_graph(tiny, tmp_path):
    """As in the simulation, through the disk, and still in integer kernels."""
    made = Lowered(tiny, smoothing=0.5, weight_bits=8, activation_bits=8)
    assert "mid.attn_1.q" in made.recipe.smoothings
    made.recipe.save(tmp_path)
    again = type(made.recipe).load(tmp_path)
    quantized, _ = lower(made.graph, again, "cpu")
    got = made.run(quantized, tmp_path / "q.onnx")
    assert sqnr(made.torch_output(active=True), got) > 35
    plain = Lowered(tiny, weight_bits=8, activation_bits=8)
    assert sqnr(plain.torch_output(active=True), got) < 35
    engine = open_engine(tmp_path / "q.onnx", EngineOptions(batch=4), "openvino")
    ran = {node.partition("/")[0]: kernel.precision for kernel in engine.kernels() for node in kernel.nodes}
    assert {ran[name] for name in again.smoothings.keys() - engine.kept_in_float.keys()} <= {"i8", "u8"}


def test_six_bit_activations_stay_on_their_grid(tiny):
    lowered = Lowered(tiny, weight_bits=4, activation_bits=6)
    quantized, _ = lower(lowered.graph, lowered.recipe, "cpu")
    nodes = operator_nodes(quantized)
    body = next(n for n, o in lowered.recipe.facts.operators.items() if o.role == "body")
    quantize = nodes[body].inputs[0].producer().inputs[0].producer()
    clip = quantize.inputs[0].producer()
    assert clip.op_type == "Clip"
    facts = lowered.recipe.facts.operators[body].inputs[0]
    low, high = (clip.inputs[i].const_value.numpy() for i in (1, 2))
    codes = [round(float(v) / facts.scale) + facts.zero_point for v in (low, high)]
    assert codes == [0, 63]


def test_recipe_of_another_network_is_refused_by_layer_name(w4a8):
    model = copy(w4a8.graph)
    operator_nodes(model)["mid.block_1.conv1"].name = "renamed"
    with pytest.raises(AccuQuantError, match=r"mid\.block_1\.conv1"):
        store_weights(model, w4a8.recipe)
    with pytest.raises(AccuQuantError, match=r"mid\.block_1\.conv1"):
        insert_qdq(model, w4a8.recipe)


def test_weight_of_another_shape_is_refused(w4a8):
    model = copy(w4a8.graph)
    wrong = dict(w4a8.recipe.codes) | {"mid.block_1.conv1": torch.zeros(3, 1, 3, 3, dtype=torch.int8)}
    recipe = type(w4a8.recipe)(w4a8.recipe.facts, wrong, w4a8.recipe.scales)
    with pytest.raises(AccuQuantError, match=r"mid\.block_1\.conv1.*\(3, 1, 3, 3\)"):
        store_weights(model, recipe)
