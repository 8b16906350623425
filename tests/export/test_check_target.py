"""The rules of a target: our graphs keep them, and a graph that breaks one is told which, where, and what to do."""

import numpy as np
import onnx_ir as ir
import pytest
from accuquant.calibrate.families.ddim import role_of
from accuquant.calibrate.initialise import initialise
from accuquant.calibrate.layers import quantize_operators
from accuquant.calibrate.recipe import freeze
from accuquant.calibrate.scheme import TARGETS, QuantScheme
from accuquant.calibrate.trace import trace
from accuquant.calibrate.trajectory import simulate
from accuquant.export.check_target import check_target, violations
from accuquant.export.graph import operator_nodes
from accuquant.export.lower import lower
from accuquant.runtime.errors import AccuQuantError


@pytest.fixture(scope="module")
def made(tiny):
    """Lowered W4A8 graphs by target, and the operators' names."""
    graphs = {}
    for target in TARGETS:
        network = tiny.unet()
        plan = trace("ddim", tiny.NOISE_SCHEDULE, 4)
        scheme = QuantScheme(weight_bits=4, activation_bits=8, target=target)
        operators = quantize_operators(network, scheme, role_of)
        initialise(network, operators, plan, simulate(network, plan, range(2), tiny.SHAPE), "min-max")
        recipe = freeze(operators, scheme, {})
        graphs[target] = lower(tiny.float_graph(), recipe, target)[0]
    return graphs, list(operators)


@pytest.fixture
def graph(made, request):
    target = request.param
    return ir.from_proto(ir.to_proto(made[0][target])), made[1], target


CONV, LINEAR = "up.0.block.0.nin_shortcut", "temb.dense.0"


@pytest.mark.parametrize("target", TARGETS)
def test_our_graphs_keep_the_rules(made, target):
    assert violations(made[0][target], made[1], target) == []


def dequantizer(model, name=CONV, index=0):
    return operator_nodes(model)[name].inputs[index].producer()


def constant(model, name, value):
    made = ir.val(name, const_value=ir.tensor(value, name=name))
    model.graph.register_initializer(made)
    return made


def scale_of_rank_one(model):
    dequantizer(model).replace_input_with(1, constant(model, "one", np.array([0.1], np.float32)))


def half_precision_scale(model):
    dequantizer(model).replace_input_with(1, constant(model, "half", np.array(0.1, np.float16)))


def dead_channel(model):
    weight = dequantizer(model, index=1)
    scale = weight.inputs[1].const_value.numpy().copy()
    scale[3] = 0
    weight.replace_input_with(1, constant(model, "dead", scale))


def infinite_scale(model):
    dequantizer(model).replace_input_with(1, constant(model, "inf", np.array(np.inf, np.float32)))


def scale_along_the_inputs(model):
    dequantizer(model, index=1).attributes["axis"] = ir.AttrInt64("axis", 1)


def something_between(model):
    node = operator_nodes(model)[CONV]
    between = ir.Node("", "Relu", [node.inputs[0]], name="between")
    model.graph.insert_before(node, between)
    node.replace_input_with(0, between.outputs[0])


def float_weight(model):
    node = operator_nodes(model)[LINEAR]
    node.replace_input_with(1, constant(model, "float", np.zeros((4, 4), np.float32)))


def zero_point(model):
    dequantizer(model).replace_input_with(2, constant(model, "zero", np.array(3, np.int8)))


def unsigned(model):
    dequantizer(model).replace_input_with(2, constant(model, "zero", np.array(0, np.uint8)))


def signed_behind_concat(model):
    for node in (dequantizer(model), dequantizer(model).inputs[0].producer()):
        node.replace_input_with(2, constant(model, f"zero of {node.op_type}", np.array(0, np.int8)))


def straight_int4(model):
    node = operator_nodes(model)[CONV]
    outer = node.inputs[1].producer().inputs[0].producer().inputs[0].producer()
    node.replace_input_with(1, outer.outputs[0])


def odd_int4(model):
    import ml_dtypes

    outer = dequantizer(model, index=1).inputs[0].producer().inputs[0].producer()
    outer.replace_input_with(0, constant(model, "odd", np.zeros((3, 3), ml_dtypes.int4)))


def int4_without_cast(model):
    weight = dequantizer(model, index=1)
    weight.replace_input_with(0, weight.inputs[0].producer().inputs[0])


def float_reader(model):
    conv = operator_nodes(model)[CONV]
    other = ir.Node("", "Relu", [conv.outputs[0]], name="other")
    model.graph.insert_after(conv, other)


def gemm(model):
    operator_nodes(model)[LINEAR].op_type = "Gemm"


def quantized_bias(model):
    node = operator_nodes(model)[CONV]
    codes, scale = constant(model, "b", np.zeros(32, np.int32)), constant(model, "bs", np.array(0.1, np.float32))
    bias = ir.Node("", "DequantizeLinear", [codes, scale], name="bias")
    model.graph.insert_before(node, bias)
    node.replace_input_with(2, bias.outputs[0])


@pytest.mark.parametrize(
    ("graph", "damage", "where", "rule", "repair"),
    [
        ("tensorrt", scale_of_rank_one, f"{CONV}, input 0", "float32 of shape (1,)", "one float32 scalar"),
        ("cpu", half_precision_scale, f"{CONV}, input 0", "float16", "one float32 scalar"),
        ("cpu", dead_channel, f"{CONV}, input 1", "scale 3 of 32 is 0", "calibrate again"),
        ("tensorrt", infinite_scale, f"{CONV}, input 0", "is inf", "calibrate again"),
        ("tensorrt", scale_along_the_inputs, f"{CONV}, input 1", "along axis 1", "axis 0"),
        ("cpu", something_between, f"{CONV}, input 0", "comes from Relu between", "directly before the operator"),
        ("tensorrt", float_weight, f"{LINEAR}, input 1", "a constant or graph input", "directly before the operator"),
        ("tensorrt", zero_point, f"{CONV}, input 0", "zero point that is not zero", "calibrate for tensorrt"),
        ("tensorrt", unsigned, f"{CONV}, input 0", "is uint8", "calibrate for tensorrt"),
        ("cpu", signed_behind_concat, f"{CONV}, input 0", "is signed and reads", "uint8 with zero point 128"),
        ("tensorrt", straight_int4, f"{CONV}, input 1", "int4 straight", "requantize"),
        ("tensorrt", odd_int4, f"{CONV}, input 1", "int4 tensor of 9 elements", "odd sizes as int8"),
        ("tensorrt", quantized_bias, CONV, "quantized bias", "keep biases float"),
        ("onnxruntime", int4_without_cast, f"{CONV}, input 1", "int4 straight", "cast it to int8"),
        (
            "onnxruntime",
            float_reader,
            CONV,
            "writes floats for QuantizeLinear, Relu",
            "one QuantizeLinear directly behind",
        ),
        ("onnxruntime", gemm, LINEAR, "is a Gemm", "MatMul and Add"),
    ],
    indirect=["graph"],
    ids=lambda v: getattr(v, "__name__", None),
)
def test_a_broken_rule_names_node_rule_and_repair(graph, damage, where, rule, repair):
    model, operators, target = graph
    damage(model)
    (found,) = violations(model, operators, target)
    assert found.node == where
    assert rule in found.rule
    assert repair in found.repair
    with pytest.raises(AccuQuantError, match=f"breaks the rules of target {target}: "):
        check_target(model, operators, target)


@pytest.mark.parametrize("graph", ["cpu"], indirect=True)
def test_many_broken_rules_are_counted_not_listed(graph):
    model, operators, target = graph
    for name in operators:
        dequantizer(model, name).replace_input_with(1, constant(model, f"nan {name}", np.array(np.nan, np.float32)))
    with pytest.raises(AccuQuantError, match=rf"and {len(operators) - 3} more"):
        check_target(model, operators, target)


@pytest.mark.parametrize("graph", ["cpu"], indirect=True)
def test_an_operator_that_is_not_in_the_graph_is_named(graph):
    model, _, target = graph
    with pytest.raises(AccuQuantError, match="no_such_layer: no node of that name"):
        check_target(model, ["no_such_layer"], target)
