"""Activations of few bits on their grid: a Clip in front of their quantizers, and of nobody else's."""

import numpy as np
import onnx_ir as ir
import pytest
from accuquant.calibrate.families.ddim import role_of
from accuquant.calibrate.initialise import set_plausible
from accuquant.calibrate.layers import quantize_operators
from accuquant.calibrate.recipe import freeze
from accuquant.calibrate.scheme import QuantScheme
from accuquant.export.graph import operator_nodes, save_graph
from accuquant.export.passes.clip_activations import clip_activations
from accuquant.export.passes.insert_qdq import insert_qdq
from accuquant.export.passes.store_weights import store_weights
from accuquant.runtime.engines.base import EngineOptions
from accuquant.runtime.engines.onnxruntime import OnnxRuntimeEngine
from accuquant.runtime.errors import AccuQuantError


def made(tiny, **scheme):
    """The tiny U-Net's graph with Q/DQ in it, and the recipe."""
    network, asked = tiny.unet(), QuantScheme(weight_bits=8, **scheme)
    operators = quantize_operators(network, asked, role_of)
    set_plausible(operators)
    recipe = freeze(operators, asked, {})
    graph = ir.from_proto(ir.to_proto(tiny.float_graph()))
    store_weights(graph, recipe)
    return graph, recipe


def quantizers(graph, recipe):
    """Of every activation input, with what the recipe says of it."""
    nodes = operator_nodes(graph)
    for name, operator in recipe.facts.operators.items():
        for index, facts in enumerate(operator.inputs):
            yield nodes[name].inputs[index].producer().inputs[0].producer(), facts


@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
def test_a_clip_ends_where_the_grid_ends(tiny, target):
    graph, recipe = made(tiny, activation_bits=6, target=target, attention="quantized")
    pairs = insert_qdq(graph, recipe)
    assert not [node for node in graph.graph if node.op_type == "Clip"]
    low_bit = {id(q) for q, facts in quantizers(graph, recipe) if facts.bits == 6}
    assert clip_activations(graph, recipe) == len(low_bit) < pairs
    for quantize, facts in quantizers(graph, recipe):
        clip = quantize.inputs[0].producer()
        if facts.bits == 8:  # the time embedding's
            assert clip is None or clip.op_type != "Clip"
            continue
        assert clip.op_type == "Clip"
        ends = [round(float(clip.inputs[i].const_value.numpy()) / facts.scale) + facts.zero_point for i in (1, 2)]
        assert ends == ([-32, 31] if facts.signed else [0, 63])


def test_codes_beyond_the_grid_are_clipped_and_the_others_are_the_same(tiny, tmp_path):
    """Codes of the first quantizer of the body, before and after, on a grid that is too small for what it reads."""
    name, codes = "down.0.block.0.conv1", []
    for clip in (False, True):
        graph, recipe = made(tiny, activation_bits=6)
        operators = dict(recipe.facts.operators)
        (facts,) = operators[name].inputs
        facts = facts.model_copy(update={"scale": 0.02})
        operators[name] = operators[name].model_copy(update={"inputs": (facts,)})
        recipe.facts = recipe.facts.model_copy(update={"operators": operators})
        insert_qdq(graph, recipe)
        if clip:
            clip_activations(graph, recipe)
        result = operator_nodes(graph)[name].inputs[0]
        result.type, result.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", None, None, None])
        graph.graph.outputs[:] = [result]
        path = tmp_path / f"{clip}.onnx"
        save_graph(graph, path)
        engine = OnnxRuntimeEngine(path, EngineOptions(batch=2), exact=True)
        x = np.random.default_rng(0).standard_normal((2, *tiny.SHAPE)).astype(np.float32)
        values = engine.run({"x": x, "t": np.array([3.0, 70.0], np.float32)})
        codes.append(np.round(values / facts.scale) + facts.zero_point)
    before, after = codes
    np.testing.assert_array_equal(after, np.minimum(before, 63))
    assert before.max() > 63 > before.min()


def test_8_bits_saturate_by_themselves(tiny):
    graph, recipe = made(tiny, activation_bits=8)
    insert_qdq(graph, recipe)
    assert clip_activations(graph, recipe) == 0
    assert not [node for node in graph.graph if node.op_type == "Clip"]


def test_before_the_quantizers_there_is_nothing_to_clip(tiny):
    graph, recipe = made(tiny, activation_bits=6)
    first = next(name for name, op in recipe.facts.operators.items() if any(i.bits < 8 for i in op.inputs))
    with pytest.raises(AccuQuantError, match=rf"layer {first}, input 0: comes from .*run insert_qdq first"):
        clip_activations(graph, recipe)
