"""A rewrite that is called on what it does not require says which layer, what was expected, and what to do."""

import re

import numpy as np
import onnx_ir as ir
import pytest
import torch
from accuquant.calibrate.families.ddim import role_of
from accuquant.calibrate.initialise import set_plausible
from accuquant.calibrate.layers import quantize_operators
from accuquant.calibrate.recipe import Recipe, freeze
from accuquant.calibrate.scheme import QuantScheme
from accuquant.calibrate.sharing import tabulate
from accuquant.calibrate.splits import find_splits
from accuquant.calibrate.trace import trace
from accuquant.export.graph import operator_nodes
from accuquant.export.passes.cast_rest import cast_rest
from accuquant.export.passes.correct_bias import correct_bias
from accuquant.export.passes.insert_qdq import insert_qdq
from accuquant.export.passes.quantize_outputs import quantize_outputs
from accuquant.export.passes.requantize_int4 import requantize_int4
from accuquant.export.passes.smooth_inputs import smooth_inputs
from accuquant.export.passes.split_shortcuts import split_shortcuts
from accuquant.export.passes.step_table import step_table
from accuquant.export.passes.store_weights import store_weights
from accuquant.export.passes.time_table import time_table
from accuquant.export.passes.widen_int4 import widen_int4
from accuquant.runtime.errors import AccuQuantError

CONV, SHORTCUT = "mid.block_1.conv1", "up.0.block.0.nin_shortcut"


@pytest.fixture
def made(tiny):
    def make(table=1, **scheme):
        network, asked = tiny.unet(), QuantScheme(**{"weight_bits": 4, "activation_bits": 8} | scheme)
        splits = find_splits(network, tiny.SHAPE) if asked.split else None
        operators = quantize_operators(network, asked, role_of, splits)
        if table > 1:
            tabulate(network, operators, trace("ddim", tiny.NOISE_SCHEDULE, 4), table)
        set_plausible(operators)
        return ir.from_proto(ir.to_proto(tiny.float_graph())), freeze(operators, asked, {})

    return make


def rename(graph, name=CONV):
    operator_nodes(graph)[name].name = f"{name}b"


def compute(graph, name, index):
    """Make an input of an operator a result of the graph, where it was a constant."""
    node = operator_nodes(graph)[name]
    same = ir.Node("", "Identity", [node.inputs[index]], name="computed")
    same.outputs[0].name = "computed.output"
    graph.graph.insert_before(node, same)
    node.replace_input_with(index, same.outputs[0])


def with_everything(recipe, name=CONV):
    """The recipe with a learned bias and a smoothed input."""
    channels = recipe.codes[name].shape
    return Recipe(
        recipe.facts, recipe.codes, recipe.scales, {name: torch.ones(channels[0])}, {name: torch.ones(channels[1])}
    )


@pytest.mark.parametrize(
    ("rewrite", "scheme"),
    [
        (store_weights, {}),
        (insert_qdq, {}),
        (correct_bias, {}),
        (smooth_inputs, {}),
        (widen_int4, {"target": "onnxruntime"}),
        (quantize_outputs, {"target": "onnxruntime"}),
        (requantize_int4, {"target": "tensorrt"}),
        (step_table, {"table": 2}),
    ],
    ids=lambda v: getattr(v, "__name__", None),
)
def test_a_layer_that_is_not_in_the_graph_is_named_with_what_is_near_it(made, rewrite, scheme):
    graph, recipe = made(**scheme)
    if rewrite in (correct_bias, smooth_inputs):
        recipe = with_everything(recipe)
    if rewrite in (widen_int4, requantize_int4):
        store_weights(graph, recipe)
    rename(graph)
    said = rf"layer {re.escape(CONV)} is not in the graph \(near it .*{re.escape(CONV)}b, .*do not fit: export"
    with pytest.raises(AccuQuantError, match=said):
        rewrite(graph, recipe)


def test_a_shortcut_in_two_parts_that_is_not_in_the_graph_is_named(made):
    graph, recipe = made(split=True)
    rename(graph, SHORTCUT)
    with pytest.raises(
        AccuQuantError, match=rf"layer {re.escape(SHORTCUT)} is not in the graph \(near it .*do not fit"
    ):
        split_shortcuts(graph, recipe)


@pytest.mark.parametrize("what", ["sum", "other axis", "unknown width"])
def test_a_shortcut_that_reads_no_concatenation_is_named_with_what_it_reads(made, what):
    graph, recipe = made(split=True)
    node = operator_nodes(graph)[SHORTCUT]
    whole = node.inputs[0].producer()
    if what == "sum":
        compute(graph, SHORTCUT, 0)
    elif what == "other axis":
        whole.attributes["axis"] = ir.AttrInt64("axis", 2)
    else:
        whole.inputs[0].shape = None
    reads = "Identity computed" if what == "sum" else f"Concat {whole.name}"
    said = rf"layer {re.escape(SHORTCUT)} was quantized in two parts and reads {reads}.*axis 1.*without --split"
    with pytest.raises(AccuQuantError, match=said):
        split_shortcuts(graph, recipe)


@pytest.mark.parametrize("rewrite", [widen_int4, requantize_int4])
def test_four_bits_that_are_not_stored_yet_are_asked_for(made, rewrite):
    graph, recipe = made(target="tensorrt" if rewrite is requantize_int4 else "onnxruntime")
    first = next(iter(recipe.codes))
    with pytest.raises(
        AccuQuantError, match=rf"layer {re.escape(first)}: its weight is float.*run store_weights first"
    ):
        rewrite(graph, recipe)


def test_blocks_are_not_requantized(made):
    graph, recipe = made(target="tensorrt")
    store_weights(graph, recipe)
    operator_nodes(graph)[f"{CONV}.weight.dequantize"].attributes["block_size"] = ir.AttrInt64("block_size", 16)
    with pytest.raises(AccuQuantError, match=rf"layer {re.escape(CONV)}.* one scale per block.*--bits 4/16"):
        requantize_int4(graph, recipe)


def test_a_scale_that_is_computed_is_not_requantized(made):
    graph, recipe = made(target="tensorrt")
    store_weights(graph, recipe)
    compute(graph, f"{CONV}.weight.dequantize", 1)
    with pytest.raises(AccuQuantError, match=rf"layer {re.escape(CONV)}.* a scale that is computed, a constant per"):
        requantize_int4(graph, recipe)


@pytest.mark.parametrize("change", [{"inputs": ()}, {"rows": (0.1, 0.2)}])
def test_what_writes_8_bits_has_one_scale_of_its_input(made, change):
    graph, recipe = made(target="onnxruntime")
    operators = dict(recipe.facts.operators)
    known = operators[CONV]
    inputs = change.get("inputs", tuple(i.model_copy(update=change) for i in known.inputs))
    operators[CONV] = known.model_copy(update={"inputs": inputs})
    recipe.facts = recipe.facts.model_copy(update={"operators": operators})
    said = rf"layer {re.escape(CONV)} is to write 8 bits, and the recipe has [02] of its input.*without --split"
    with pytest.raises(AccuQuantError, match=said):
        quantize_outputs(graph, recipe)


def test_a_bias_on_the_sums_grid_is_a_constant(made):
    graph, recipe = made(target="onnxruntime")
    compute(graph, CONV, 2)
    with pytest.raises(AccuQuantError, match=rf"layer {re.escape(CONV)}: its bias is computed.*--in-float {CONV}"):
        quantize_outputs(graph, recipe)


def test_a_learned_bias_is_put_on_a_constant(made):
    graph, recipe = made()
    compute(graph, CONV, 2)
    with pytest.raises(AccuQuantError, match=rf"layer {re.escape(CONV)}: its bias is computed.*--set bias_rate=0"):
        correct_bias(graph, with_everything(recipe))


def test_a_bias_behind_a_table_is_a_constant(made):
    graph, recipe = made(table=2)
    compute(graph, CONV, 2)
    with pytest.raises(AccuQuantError, match=rf"layer {re.escape(CONV)}: its bias is computed.*table = 1"):
        step_table(graph, recipe)


def test_a_stored_weight_replaces_a_constant(made):
    graph, recipe = made()
    compute(graph, CONV, 1)
    with pytest.raises(AccuQuantError, match=rf"layer {re.escape(CONV)}: its weight is computed.*--in-float {CONV}"):
        store_weights(graph, recipe)


def test_tables_go_before_quantizers(made):
    graph, recipe = made(table=2)
    with pytest.raises(AccuQuantError, match=r"input 0: has 2 scales, QuantizeLinear takes one; run step_table first"):
        insert_qdq(graph, recipe)


def test_two_parts_are_taken_apart_before_quantizers(made):
    graph, recipe = made(split=True)
    operators = {SHORTCUT: recipe.facts.operators[SHORTCUT]}
    inputs = operators[SHORTCUT].inputs * 2  # more than a convolution with a bias has
    recipe.facts = recipe.facts.model_copy(
        update={"operators": {SHORTCUT: operators[SHORTCUT].model_copy(update={"inputs": inputs})}}
    )
    with pytest.raises(AccuQuantError, match=rf"layer {re.escape(SHORTCUT)}: .*no input 3.*run split_shortcuts first"):
        insert_qdq(graph, recipe)


@pytest.mark.parametrize(
    ("rewrite", "name"),
    [(lambda graph: time_table(graph, [1.0, 2.0]), "t"), (lambda graph: cast_rest(graph, "float16"), "x")],
    ids=["time_table", "cast_rest"],
)
def test_a_graph_without_our_inputs_is_none_of_ours(made, rewrite, name):
    graph, _ = made()
    for value in graph.graph.inputs:
        value.name = f"the_{value.name}"
    with pytest.raises(AccuQuantError, match=rf"no input {name} \(it has the_x, the_t\).*trace_float"):
        rewrite(graph)


def test_a_recipe_holds_a_weight_for_every_layer_that_has_one(made):
    _, recipe = made()
    codes = {name: value for name, value in recipe.codes.items() if name != CONV}
    with pytest.raises(AccuQuantError, match=rf"layer {re.escape(CONV)}: the recipe's weight has no codes"):
        Recipe(recipe.facts, codes, recipe.scales)
    more = recipe.scales | {"elsewhere": torch.ones(3)}
    with pytest.raises(AccuQuantError, match="layer elsewhere: the recipe's weight has scales, and there is no such"):
        Recipe(recipe.facts, recipe.codes, more)


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf])
def test_a_weight_scale_is_named_with_its_channel(made, scale):
    _, recipe = made()
    spoiled = recipe.scales[CONV].clone()
    spoiled[3] = scale
    said = (
        rf"layer {re.escape(CONV)}: weight scale 3 of {len(spoiled)} is {scale:g}; .*calibrate again.*--in-float {CONV}"
    )
    with pytest.raises(AccuQuantError, match=said):
        Recipe(recipe.facts, recipe.codes, recipe.scales | {CONV: spoiled})
