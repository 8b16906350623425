"""The rules of a target: our graphs keep them, and a graph that breaks one is told which, where, and what to do."""

import numpy as np
import onnx_ir as ir
import pytest
from accuquant.calibrate.families.ddim import role_of
from accuquant.calibrate.initialise import initialise, set_plausible
from accuquant.calibrate.layers import quantize_operators
from accuquant.calibrate.recipe import freeze
from accuquant.calibrate.scheme import TARGETS, QuantScheme
from accuquant.calibrate.splits import find_splits
from accuquant.calibrate.trace import trace
from accuquant.calibrate.trajectory import simulate
from accuquant.export.check_target import check_target, violations
from accuquant.export.graph import operator_nodes
from accuquant.export.lower import lower
from accuquant.export.passes.cast_rest import cast_rest
from accuquant.export.passes.time_table import time_table
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
READS = f"{CONV}, input 0, QuantizeLinear {CONV}.input0.quantize"
REQUANTIZES = f"{CONV}, input 1, QuantizeLinear {CONV}.weight.requantize"
STORES = f"{CONV}, input 1, DequantizeLinear {CONV}.weight.dequantize"
WRITES = f"{CONV}, QuantizeLinear {CONV}.output.quantize"


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


def quantizer(model, name=CONV, index=0):
    return dequantizer(model, name, index).inputs[0].producer()


def written(model):
    """The QuantizeLinear behind a convolution."""
    (use,) = operator_nodes(model)[CONV].outputs[0].uses()
    return use.node


def quantizer_of_rank_one(model):
    quantizer(model).replace_input_with(1, constant(model, "one", np.array([0.1], np.float32)))


def quantizer_in_half_precision(model):
    quantizer(model).replace_input_with(1, constant(model, "half", np.array(0.1, np.float16)))


def quantizer_of_nan(model):
    quantizer(model).replace_input_with(1, constant(model, "nan", np.array(np.nan, np.float32)))


def computed_quantizer(model):
    node = quantizer(model)
    one = ir.Node("", "Identity", [node.inputs[1]], name="at run time")
    model.graph.insert_before(node, one)
    node.replace_input_with(1, one.outputs[0])


def other_scale_in_the_quantizer(model):
    quantizer(model).replace_input_with(1, constant(model, "other", np.array(123.0, np.float32)))


def other_zero_point_in_the_quantizer(model):
    quantizer(model).replace_input_with(2, constant(model, "other", np.array(255, np.uint8)))


def quantizer_with_a_zero_point(model):
    quantizer(model).replace_input_with(2, constant(model, "zero", np.array(3, np.int8)))


def quantizer_without_a_zero_point(model):
    quantizer(model).resize_inputs(2)


def quantizer_of_16_bits(model):
    quantizer(model).replace_input_with(2, constant(model, "wide", np.array(0, np.uint16)))


def computed_zero_point(model):
    node = quantizer(model)
    one = ir.Node("", "Identity", [node.inputs[2]], name="at run time")
    model.graph.insert_before(node, one)
    node.replace_input_with(2, one.outputs[0])


def requantized_along_the_inputs(model):
    quantizer(model, index=1).attributes["axis"] = ir.AttrInt64("axis", 1)


def requantized_with_another_scale(model):
    node = quantizer(model, index=1)
    scale = node.inputs[1].const_value.numpy() * 2
    node.replace_input_with(1, constant(model, "double", scale))


def dead_channel_of_int4(model):
    outer = quantizer(model, index=1).inputs[0].producer()
    scale = outer.inputs[1].const_value.numpy().copy()
    scale[5] = 0
    outer.replace_input_with(1, constant(model, "dead", scale))


def blocks_of_a_convolution(model):
    dequantizer(model, index=1).attributes["block_size"] = ir.AttrInt64("block_size", 16)


def two_types(model):
    dequantizer(model).attributes["output_dtype"] = ir.AttrInt64("output_dtype", ir.DataType.FLOAT16)


def bias_of_another_type(model):
    node = operator_nodes(model)[CONV]
    bias = node.inputs[2].const_value.numpy().astype(np.float16)
    node.replace_input_with(2, constant(model, "half bias", bias))


def output_of_rank_one(model):
    written(model).replace_input_with(1, constant(model, "one", np.array([0.1], np.float32)))


def dead_output(model):
    written(model).replace_input_with(1, constant(model, "dead", np.array(0, np.float32)))


def output_with_another_zero_point(model):
    written(model).replace_input_with(2, constant(model, "other", np.array(255, np.uint8)))


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
        ("cpu", quantizer_of_rank_one, READS, "float32 of shape (1,)", "one float32 scalar"),
        ("tensorrt", quantizer_in_half_precision, READS, "float16 of shape ()", "one float32 scalar"),
        ("onnxruntime", quantizer_of_nan, READS, "scale 0 of 1 is nan", "calibrate again"),
        ("cpu", computed_quantizer, READS, "its scale is computed at run time", "a constant of the graph"),
        ("cpu", other_scale_in_the_quantizer, READS, "its scale is 123, and ", "the same scale"),
        ("cpu", other_zero_point_in_the_quantizer, READS, "its zero point is 255, and ", "the same zero point"),
        ("cpu", quantizer_of_16_bits, READS, "its zero point is UINT16", "int8, uint8 or float8"),
        ("onnxruntime", computed_zero_point, READS, "its zero point is computed", "a constant of int8"),
        ("tensorrt", quantizer_with_a_zero_point, READS, "zero point that is not zero", "calibrate for tensorrt"),
        ("tensorrt", quantizer_without_a_zero_point, READS, "which makes it uint8", "int8 zero point of 0"),
        ("tensorrt", requantized_along_the_inputs, REQUANTIZES, "along axis 1", "per output channel, axis 0"),
        ("tensorrt", requantized_with_another_scale, REQUANTIZES, "its scale is one of 32", "the same scale"),
        ("tensorrt", dead_channel_of_int4, STORES, "scale 5 of 32 is 0", "calibrate again"),
        ("tensorrt", blocks_of_a_convolution, f"{CONV}, input 1", "for each block", "columns of linear layers"),
        ("tensorrt", two_types, CONV, "reads float16 and float", "as cast_rest does"),
        ("tensorrt", bias_of_another_type, CONV, "reads float and float16", "as cast_rest does"),
        ("onnxruntime", output_of_rank_one, WRITES, "float32 of shape (1,)", "one float32 scalar"),
        ("onnxruntime", dead_output, WRITES, "scale 0 of 1 is 0", "calibrate again"),
        ("onnxruntime", output_with_another_zero_point, WRITES, "its zero point is 255, and ", "the same zero point"),
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


@pytest.fixture
def halved(made, request):
    """A graph for TensorRT as it is written: with its table of timesteps, and what is not integer in 16 bits."""
    model = ir.from_proto(ir.to_proto(made[0]["tensorrt"]))
    assert time_table(model, [0.0, 25.0, 50.0, 75.0])
    cast_rest(model, request.param)
    return model, made[1]


@pytest.mark.parametrize("halved", ["float16", "bfloat16"], indirect=True)
def test_the_graph_that_is_written_keeps_the_rules(halved):
    model, operators = halved
    left = [name for name in operators if name in operator_nodes(model)]
    assert 0 < len(left) < len(operators)  # the table holds what knows no latent
    assert violations(model, left, "tensorrt") == []
    check_target(model, operators, "tensorrt", looked_up=True)
    with pytest.raises(AccuQuantError, match=f"{LINEAR}: no node of that name"):
        check_target(model, operators, "tensorrt")


@pytest.mark.parametrize("halved", ["float16"], indirect=True)
def test_a_cast_that_spoils_a_scale_is_seen(halved):
    """As one that reached into QuantizeLinear's scales would."""
    model, operators = halved
    quantizer_in_half_precision(model)
    with pytest.raises(AccuQuantError, match=f"{READS}: its scale is float16"):
        check_target(model, operators, "tensorrt", looked_up=True)


@pytest.mark.parametrize("halved", ["float16"], indirect=True)
def test_an_operand_that_was_not_cast_is_seen(halved):
    model, operators = halved
    del dequantizer(model).attributes["output_dtype"]
    with pytest.raises(AccuQuantError, match=f"{CONV}: reads float and float16; .*as cast_rest does"):
        check_target(model, operators, "tensorrt", looked_up=True)


def test_a_scale_of_weights_alone_that_16_bits_do_not_reach_names_a_type_that_does(tiny):
    network = tiny.unet()
    scheme = QuantScheme(weight_bits=4, activation_bits=16, target="tensorrt", rest="float16")
    operators = quantize_operators(network, scheme, role_of)
    recipe = freeze(operators, scheme, {})
    recipe.scales[CONV][2] = 1e-9
    model, _ = lower(tiny.float_graph(), recipe, "tensorrt")
    check_target(model, operators, "tensorrt", weights_alone=True)
    cast_rest(model, "float16")
    said = rf"{CONV}, input 1: scale 2 of 32 is 0; float16 may not reach .*--rest bfloat16 or float32"
    with pytest.raises(AccuQuantError, match=said):
        check_target(model, operators, "tensorrt", weights_alone=True)


def test_both_parts_of_a_convolution_in_two_are_looked_at(tiny):
    network = tiny.unet()
    scheme = QuantScheme(weight_bits=8, activation_bits=8, split=True)
    operators = quantize_operators(network, scheme, role_of, find_splits(network, tiny.SHAPE))
    set_plausible(operators)
    model, _ = lower(tiny.float_graph(), freeze(operators, scheme, {}), "cpu")
    check_target(model, operators, "cpu")
    dequantizer(model, f"{CONV}.second").replace_input_with(1, constant(model, "inf", np.array(np.inf, np.float32)))
    with pytest.raises(AccuQuantError, match=rf"{CONV}\.second, input 0: scale 0 of 1 is inf"):
        check_target(model, operators, "cpu")
