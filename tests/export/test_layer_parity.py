"""Layer by layer, graph and simulation on the same inputs: alike in every form, and the culprit named when not."""

from functools import partial

import numpy as np
import onnx_ir as ir
import pytest
import torch
from accuquant.calibrate.families.ddim import role_of
from accuquant.calibrate.gptq import compensate
from accuquant.calibrate.grid import Grid
from accuquant.calibrate.initialise import initialise
from accuquant.calibrate.layers import QuantizedLinear, quantize_operators
from accuquant.calibrate.recipe import freeze
from accuquant.calibrate.scheme import QuantScheme
from accuquant.calibrate.sharing import tabulate
from accuquant.calibrate.splits import find_splits
from accuquant.calibrate.trace import trace
from accuquant.calibrate.trajectory import simulate
from accuquant.export.graph import operator_nodes, save_graph, trace_float
from accuquant.export.layer_parity import LEAST, check_layers, form_of, layer_parity, reference
from accuquant.export.lower import lower
from accuquant.export.places import operator_places
from accuquant.runtime.engines import open_engine
from accuquant.runtime.errors import AccuQuantError
from torch import nn


class Lowered:
    """The tiny U-Net, or the model `of`, quantized in some form, on disk, and what it is compared with."""

    def __init__(self, tiny, folder, *, of=None, table=1, smoothing=0.0, bias=False, **scheme):
        network, shape, roles = (
            (tiny.unet(), tiny.SHAPE, role_of) if of is None else (of.network, of.sample_shape, of.role_of)
        )
        self.plan = trace("ddim", tiny.NOISE_SCHEDULE, 4)
        self.teacher = simulate(network, self.plan, range(4), shape)
        self.scheme = QuantScheme(**scheme)
        splits = find_splits(network, shape) if self.scheme.split else None
        self.operators = quantize_operators(network, self.scheme, roles, splits)
        if table > 1:
            tabulate(network, self.operators, self.plan, table)
        initialise(network, self.operators, self.plan, self.teacher, "mse", smoothing=smoothing)
        compensate(network, self.operators, self.plan, self.teacher)
        if bias:
            for operator in self.operators.values():
                operator.learn_bias()
                if operator.shift is not None:
                    nn.init.normal_(operator.shift, std=0.1)
        exported = tiny.float_graph() if of is None else tiny.every_graph()
        graph = trace_float(network, self.operators, shape) if splits else exported
        self.graph, _ = lower(graph, freeze(self.operators, self.scheme, {}), self.scheme.target)
        self.path = folder / "denoiser.onnx"
        save_graph(self.graph, self.path)

    def parity(self, open_engine=reference):
        return layer_parity(self.path, self.operators, self.plan, self.teacher, open_engine)


FORMS = {
    "w4a8": {"weight_bits": 4, "activation_bits": 8},
    "w4a6 table": {"weight_bits": 4, "activation_bits": 6, "table": 2},
    "split smoothed biased": {"weight_bits": 4, "activation_bits": 8, "split": True, "smoothing": 0.5, "bias": True},
    "onnxruntime": {"weight_bits": 4, "activation_bits": 8, "target": "onnxruntime", "bias": True, "smoothing": 0.5},
    "tensorrt table": {"weight_bits": 4, "activation_bits": 8, "target": "tensorrt", "table": 2, "bias": True},
    "tensorrt attention": {"weight_bits": 8, "activation_bits": 8, "target": "tensorrt", "attention": "quantized"},
    "w3a5 integer": {"weight_bits": 3, "activation_bits": 5, "policy": "integer", "smoothing": 0.5},
    "w5a7 uniform": {"weight_bits": 5, "activation_bits": 7, "target": "tensorrt", "policy": "uniform", "table": 3},
    "fp8": {"weight_bits": 8, "activation_bits": 8, "number": "float8", "target": "tensorrt", "smoothing": 0.5},
    "fp8 table": {"weight_bits": 8, "activation_bits": 8, "number": "float8", "target": "tensorrt", "table": 2},
    "w4a16": {"weight_bits": 4, "activation_bits": 16, "target": "tensorrt", "bias": True},
}


@pytest.fixture(scope="module", params=FORMS, ids=[name.replace(" ", "-") for name in FORMS])
def lowered(request, tiny, tmp_path_factory):
    torch.manual_seed(0)
    return Lowered(tiny, tmp_path_factory.mktemp("parity"), **FORMS[request.param])


def test_the_reference_computes_every_layer_as_the_simulation_does(lowered):
    parity = lowered.parity()
    assert parity.keys() == lowered.operators.keys()
    assert min(parity.values()) > 100  # float32 in another order; ties are left out


@pytest.mark.parametrize(
    "form",
    [
        {"weight_bits": 4, "activation_bits": 16},
        {"weight_bits": 8, "activation_bits": 8, "number": "float8", "policy": "uniform"},
        {"weight_bits": 4, "activation_bits": 7, "policy": "uniform", "attention": "quantized", "table": 2},
    ],
    ids=["w4a16-blocks", "fp8", "w4a7-table"],
)
def test_every_kind_of_operator_is_computed_as_its_simulation_is(form, tiny, tmp_path):
    """Grouped convolutions, tokens, attention of several heads and weights by blocks, which the U-Net has not."""
    made = Lowered(tiny, tmp_path, of=tiny.every(), target="tensorrt", **form)
    parity = made.parity()
    assert {"grouped", "kv", "pooled"} <= parity.keys()
    assert ("qk" in parity) == (form["activation_bits"] < 16)
    assert min(parity.values()) > 100


def test_the_engine_computes_every_layer_as_the_simulation_does(lowered):
    if lowered.scheme.target == "tensorrt":
        pytest.skip("a graph for TensorRT is not run on CPUs")
    check_layers(lowered.parity(partial(open_engine, target=lowered.scheme.target)), "the engine")


def test_operators_come_in_the_order_of_the_graph(lowered):
    in_order = [node.name for node in lowered.graph.graph if node.name in lowered.operators]
    assert list(operator_places(lowered.graph, {name: form_of(o) for name, o in lowered.operators.items()})) == in_order


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    return Lowered(tiny, tmp_path_factory.mktemp("whole"), weight_bits=8, activation_bits=8)


@pytest.mark.parametrize("culprit", ["mid.block_1.conv1", "mid.attn_1.q", "temb.dense.1"])
def test_the_layer_that_departs_is_named(whole, tmp_path, culprit):
    """One scale of a layer is a hundredth off: it is named, and those behind it, on their own inputs, are not."""
    graph = ir.load(whole.path)
    scale = operator_nodes(graph)[culprit].inputs[1].producer().inputs[1]
    scale.const_value = ir.tensor(scale.const_value.numpy() * np.float32(1.01), name=scale.name)
    save_graph(graph, tmp_path / "wrong.onnx")
    parity = layer_parity(tmp_path / "wrong.onnx", whole.operators, whole.plan, whole.teacher)
    assert {name for name, db in parity.items() if db < LEAST} == {culprit}
    with pytest.raises(AccuQuantError, match=f"layer {culprit}: the graph computes something else"):
        check_layers(parity, "the graph")


def test_values_that_are_not_finite_depart():
    with pytest.raises(AccuQuantError, match=r"layer a: .* so do 1 layers"):
        check_layers({"a": float("nan"), "b": 12.0, "c": 90.0}, "the graph")


def test_a_layer_that_is_not_in_the_graph_is_named(tiny):
    linear = QuantizedLinear("lost", "body", nn.Linear(2, 2), Grid(8, True, True), Grid(8, False, False))
    with pytest.raises(AccuQuantError, match="layer lost is not in the graph"):
        operator_places(tiny.float_graph(), {"lost": form_of(linear)})
