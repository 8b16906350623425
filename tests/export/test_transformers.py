"""Folders of diffusers' transformers beyond their float graphs: one iteration of learning, lowered, on an engine."""

import re

import pytest
import torch
from accuquant.calibrate.journal import Journal
from accuquant.calibrate.layers import quantization
from accuquant.calibrate.model import quantize
from accuquant.calibrate.optimize import calibrate
from accuquant.calibrate.recipe import freeze
from accuquant.calibrate.scheme import QuantScheme
from accuquant.calibrate.trajectory import simulate
from accuquant.export.build import load
from accuquant.export.check_target import check_target
from accuquant.export.graph import operator_nodes, save_graph, trace_float
from accuquant.export.lower import lower
from accuquant.export.verify import check_graph, check_parity

NAMES = ["dit", "pixart", "sd3", "flux"]


@pytest.mark.parametrize("name", NAMES)
def test_every_operator_is_learned_and_lowered(name, folders, formula, tiny, tmp_path):
    """Of both streams of a joint attention; by the standard the graphs are the network and its simulation."""
    small = folders.FOLDERS[name]
    scheme = QuantScheme(weight_bits=4, activation_bits=6, policy="integer", reserve=0)
    request = folders.request(name, tmp_path, formula, scheme)
    model, plan, _ = load(request)
    operators = quantize(model, scheme)
    roles = [operator.role for operator in operators.values()]
    assert {role: roles.count(role) for role in roles} == small.roles
    prefix = "transformer." if small.rows else ""
    bits = {True: (8, 8), False: (4, 6)}
    for inner, role in small.named.items():
        operator = operators[prefix + inner]
        assert operator.role == role, inner
        kept = role in ("first", "last", "time")
        assert (operator.weight_quantizer.grid.bits, operator.inputs[0].grid.bits) == bits[kept], inner
    for inside in (name for name in operators if "blocks." in name):
        assert model.block_of(inside) == inside[: re.search(r"blocks\.\d+", inside).end()]

    network = model.guided(2.0 if small.rows and name != "flux" else 1.0)
    teacher, judge = (
        simulate(network, plan, seeds, model.sample_shape, model.condition(seeds)) for seeds in (range(2), range(2, 3))
    )
    outcome = calibrate(network, operators, plan, teacher, judge, request.spec, Journal(tmp_path / "work", {}))
    assert outcome.held_out.keys() == {0, 1}

    graph = trace_float(model.network, operators, model.sample_shape, model.condition([0]))
    assert operators.keys() <= operator_nodes(graph).keys()
    quantized, twin = lower(graph, freeze(operators, scheme, {}), "cpu")
    check_target(quantized, operators, "cpu")  # every one multiplies what Q/DQ gives it
    x, t = formula.formula_input((3, *model.sample_shape)), torch.tensor([617.0, 40.0, 3.0])
    given = {"x": x, "t": t} | model.condition([0, 1, 0])
    with quantization(operators, False):
        expected = model.network(**given)
    made = tiny.on_onnxruntime(twin, tmp_path / "twin.onnx", given)
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-4)
    save_graph(quantized, tmp_path / "int.onnx")
    check_graph(tmp_path / "int.onnx")
    check_parity(tmp_path / "int.onnx", tmp_path / "twin.onnx", model.network, operators, plan, judge)
