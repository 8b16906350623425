"""Rewrites of what stays in float: the same numbers, in a form that OpenVINO multiplies and reads less for."""

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from accuquant.export.graph import save_graph
from accuquant.export.lower import lower
from accuquant.export.passes.group_norm_affine import group_norm_affine
from accuquant.export.passes.narrow_convolutions import narrow_convolutions
from accuquant.export.passes.silu_by_exp import silu_by_exp
from accuquant.export.passes.tokens_channels_last import tokens_channels_last
from accuquant.runtime.engines import open_engine
from accuquant.runtime.engines.base import EngineOptions

SIDE = 6


def graph(body, weights, channels=32):
    """x, t -> y as the lines of `body` say, with `weights` by name; t is read by nobody's arithmetic."""
    text = f"""<ir_version: 10, opset_import: ["" : 21]>
        g (float[b,{channels},{SIDE},{SIDE}] x, float[b] t) => (float[b,o,{SIDE},{SIDE}] y) {{ {body} }}"""
    model = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    for name, shape in weights.items():
        value = rng.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    for n, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}{n}"
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


def run(model, folder, name="onnxruntime", x=None):
    save_graph(ir.from_proto(ir.to_proto(model)), folder / "graph.onnx")
    engine = open_engine(folder / "graph.onnx", EngineOptions(batch=2, threads=1), name)
    shape = next(port.shape for port in engine.inputs if port.name == "x")
    given = np.random.default_rng(1).standard_normal(shape).astype(np.float32) if x is None else x
    out = engine.run({"x": given, "t": np.zeros(2, np.float32)} if len(engine.inputs) > 1 else {"x": given}).copy()
    engine.close()
    return out


def kinds(model):
    return Counter(node.op_type for node in model.graph)


def operators(kind, model):
    return [node for node in model.graph if node.op_type == kind]


# -- convolutions to few channels -------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(("outputs", "kernel", "pads"), [(1, 3, 1), (3, 3, 1), (2, 5, 2), (1, 3, 0)])
def test_few_channels_are_columns_that_are_chosen_from(tmp_path, engine, outputs, kernel, pads):
    side = SIDE + 2 * pads - kernel + 1
    body = f"y = Conv <kernel_shape = [{kernel},{kernel}], pads = [{pads},{pads},{pads},{pads}]> (x, w, b)"
    body = body if side == SIDE else f"z = {body.partition('= ')[2]} y = Pad (z, room)"
    weights = {"w": (outputs, 128, kernel, kernel), "b": (outputs,)}
    model = graph(body, weights, channels=128)
    if side != SIDE:
        room = np.array([0, 0, 0, 0, 0, 0, SIDE - side, SIDE - side])
        model = ir.from_proto(with_constant(ir.to_proto(model), "room", room))
    before = run(model, tmp_path, engine)
    (conv,) = operators("Conv", model)
    name = conv.name
    assert narrow_convolutions(model) == 1
    first, second = operators("Conv", model)
    assert (first.name, second.name) == (name, f"{name}/positions")
    assert first.inputs[1].const_value.shape.numpy() == (outputs * kernel**2, 128, 1, 1)
    assert "w" not in model.graph.initializers
    np.testing.assert_allclose(run(model, tmp_path, engine), before, atol=3e-4)  # sums of 1152 terms and more


def with_constant(proto, name, value):
    proto.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    return proto


@pytest.mark.parametrize(
    ("body", "shape"),
    [
        ("y = Conv <pads = [1,1,1,1]> (x, w)", (16, 32, 3, 3)),  # fills the vectors already
        ("y = Conv (x, w)", (1, 32, 1, 1)),  # nothing to choose from
        ("y = Conv <pads = [2,2,2,2], dilations = [2,2]> (x, w)", (1, 32, 3, 3)),
        ("z = Conv <pads = [1,1,1,1], strides = [2,2]> (x, w) y = Concat <axis = 1> (z, z)", (1, 32, 3, 3)),
        ("y = Conv <auto_pad = 'SAME_UPPER'> (x, w)", (1, 32, 3, 3)),
        ("v = Neg (w) y = Conv <pads = [1,1,1,1]> (x, v)", (1, 32, 3, 3)),  # as behind a DequantizeLinear
    ],
)
def test_other_convolutions_are_as_they_were(body, shape):
    model = graph(body.replace("'", '"'), {"w": shape})
    before = kinds(model)
    assert narrow_convolutions(model) == 0
    assert kinds(model) == before


# -- SiLU -------------------------------------------------------------------------------------------------------------


def test_silu_is_a_quotient_wherever_it_is_evaluated(tmp_path):
    """Far below 0 the exponential is infinite on ONNX Runtime and float32's largest number on OpenVINO."""
    model = graph("s = Sigmoid (x) y = Mul (x, s)", {}, channels=1)
    x = np.linspace(-300, 300, 2 * SIDE * SIDE, dtype=np.float32).reshape(2, 1, SIDE, SIDE)
    expected = x / (1 + np.exp(-x.astype(np.float64)))
    assert silu_by_exp(model) == 1
    assert kinds(model) == {"Mul": 1, "Exp": 1, "Add": 1, "Div": 1}
    for engine in ("onnxruntime", "openvino"):
        np.testing.assert_allclose(run(model, tmp_path, engine, x), expected, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize(
    "body",
    [
        "p = Conv (x, w) s = Sigmoid (p) y = Mul (p, s)",  # in the product's own kernel
        "c = Conv (x, w) p = Add (c, b) s = Sigmoid (p) y = Mul (s, p)",
        "s = Sigmoid (x) y = Mul (b, s)",  # a gate, of something else
        "s = Sigmoid (x) z = Mul (x, s) y = Add (z, s)",  # which others read too
    ],
)
def test_other_sigmoids_are_as_they_were(body):
    model = graph(body, {"w": (32, 32, 1, 1), "b": (1, 32, 1, 1)})
    before = kinds(model)
    assert silu_by_exp(model) == 0
    assert kinds(model) == before


# -- means of norms ---------------------------------------------------------------------------------------------------


def test_means_are_read_once_of_a_value_and_of_a_concatenation_by_its_parts(tmp_path):
    norm = "GroupNormalization <num_groups = 4>"
    body = f"""down = {norm} (x, g1, b1)
        h = Relu (x)
        joined = Concat <axis = 1> (h, x)
        up = {norm} (joined, g2, b2)
        again = Concat <axis = 1> (joined, h)
        last = {norm} (again, g3, b3)
        y = Concat <axis = 1> (down, up, last)"""
    sizes = {"1": 32, "2": 64, "3": 96}
    model = graph(body, {f"{kind}{n}": (size,) for n, size in sizes.items() for kind in "gb"})
    before = run(model, tmp_path, "openvino")
    assert group_norm_affine(model) == 3
    assert [node.inputs[0].name for node in operators("ReduceL2", model)] == ["x", "h"]
    assert [node.inputs[0].name for node in operators("GlobalAveragePool", model)] == ["x", "h"]
    for engine in ("onnxruntime", "openvino"):
        np.testing.assert_allclose(run(model, tmp_path, engine), before, atol=2e-5)


# -- pictures to tokens and back --------------------------------------------------------------------------------------

ATTENTION = """
    q = Conv (x, wq) k = Conv (x, wk) v = Conv (x, wv)
    cq = Reshape (q, columns) ck = Reshape (k, columns) cv = Reshape (v, columns)
    rq = Transpose <perm = [0,2,1]> (cq) rv = Transpose <perm = [0,2,1]> (cv)
    qk = MatMul (rq, ck) p = Softmax <axis = 2> (qk) av = MatMul (p, rv)
    back = Transpose <perm = [0,2,1]> (av) y = Reshape (back, picture)"""


def test_attention_takes_and_gives_pictures_channels_last(tmp_path):
    proto = ir.to_proto(graph(ATTENTION, dict.fromkeys(("wq", "wk", "wv"), (32, 32, 1, 1))))
    with_constant(proto, "columns", np.array([-1, 32, SIDE * SIDE]))
    with_constant(proto, "picture", np.array([-1, 32, SIDE, SIDE]))
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))
    before = run(model, tmp_path)
    assert tokens_channels_last(model) == 4
    perms = sorted(tuple(node.attributes["perm"].as_ints()) for node in operators("Transpose", model))
    assert perms == [(0, 2, 1), (0, 2, 3, 1), (0, 2, 3, 1), (0, 2, 3, 1), (0, 3, 1, 2)]  # one swap is left: that of k
    for engine in ("onnxruntime", "openvino"):
        np.testing.assert_allclose(run(model, tmp_path, engine), before, atol=1e-5)


@pytest.mark.parametrize(
    "body",
    [
        "v = Conv (x, w) c = Reshape (v, columns) r = Relu (c) y = Reshape (r, picture)",  # nobody wants rows
        "c = Reshape (x, columns) r = Transpose <perm = [0,2,1]> (c) m = MatMul (c, r) n = MatMul (m, c) "
        "y = Reshape (n, picture)",  # what heads are joined by looks like it
        "v = Conv (x, w) c = Reshape (v, columns) n = Relu (c) r = Transpose <perm = [0,2,1]> (c) "
        "s = MatMul (n, r) m = MatMul (s, n) y = Reshape (m, picture)",  # Relu reads them too
        "v = Conv (x, w) h = Reshape (v, heads) r = Transpose <perm = [0,2,1]> (h) u = Transpose <perm = [0,2,1]> (r) "
        "y = Reshape (u, picture)",  # channels are cut as well
    ],
)
def test_other_reshapes_are_as_they_were(body):
    proto = ir.to_proto(graph(body, {"w": (32, 32, 1, 1)}))
    for name, sides in (
        ("columns", (32, SIDE * SIDE)),
        ("picture", (32, SIDE, SIDE)),
        ("heads", (16, 2 * SIDE * SIDE)),
    ):
        with_constant(proto, name, np.array([-1, *sides]))
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))
    before = kinds(model)
    assert tokens_channels_last(model) == 0
    assert kinds(model) == before


def test_of_a_u_net_on_a_cpu_the_last_layer_is_narrow_in_both_graphs_unless_it_is_quantized(lowered):
    for policy, narrow in (("standard", True), ("uniform", False)):
        recipe, exported = lowered(policy)
        quantized, twin = lower(exported, recipe, "cpu")
        names = {node.name for node in quantized.graph}
        assert ("conv_out/positions" in names, "conv_out" in names) == (narrow, True)
        assert "conv_out/positions" in {node.name for node in twin.graph}


@pytest.fixture
def lowered(tiny):
    from accuquant.calibrate.families.ddim import role_of
    from accuquant.calibrate.initialise import set_plausible
    from accuquant.calibrate.layers import quantize_operators
    from accuquant.calibrate.recipe import freeze
    from accuquant.calibrate.scheme import QuantScheme

    def make(policy):
        network, asked = tiny.unet(), QuantScheme(weight_bits=8, activation_bits=8, policy=policy)
        made = quantize_operators(network, asked, role_of)
        set_plausible(made)
        return freeze(made, asked, {}), tiny.float_graph()

    return make
