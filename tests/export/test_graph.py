"""The float graph: inputs by name, operators by module, and weights that are shared until they are written."""

import os

import numpy as np
import onnx_ir as ir
import pytest
import torch
from accuquant.calibrate.guidance import Guided
from accuquant.calibrate.initialise import initialise
from accuquant.calibrate.layers import quantization, quantize_operators
from accuquant.calibrate.recipe import freeze
from accuquant.calibrate.scheme import QuantScheme
from accuquant.calibrate.trace import trace
from accuquant.calibrate.trajectory import simulate
from accuquant.export import graph as graph_module
from accuquant.export.check_target import check_target
from accuquant.export.graph import operator_nodes, save_graph, trace_float
from accuquant.export.layer_parity import LEAST, layer_parity
from accuquant.export.lower import _copy, lower
from accuquant.export.passes.cast_rest import cast_rest
from accuquant.export.verify import check_graph, check_parity
from accuquant.runtime.engines import open_engine
from accuquant.runtime.engines.base import EngineOptions
from accuquant.runtime.engines.compile_plan import CompileRequest, compile_plan
from accuquant.runtime.engines.onnxruntime import OnnxRuntimeEngine
from accuquant.runtime.errors import AccuQuantError
from torch import nn

SHAPE, TOKENS, WIDTH = (4, 8, 8), 5, 8


class TextUNet(nn.Module):
    """diffusers' UNet2DConditionModel, tiny, as a network of (x, t, context)."""

    def __init__(self):
        super().__init__()
        from diffusers import UNet2DConditionModel

        torch.manual_seed(0)
        self.unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 64),
            layers_per_block=1,
            cross_attention_dim=WIDTH,
            attention_head_dim=2,
            norm_num_groups=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )

    def forward(self, x, t, context):
        return self.unet(x, t, encoder_hidden_states=context, return_dict=False)[0]


class Conditioned(nn.Module):
    """A linear network of x (B, 2, 4, 4) under two conditions that do not commute."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)
        self.embedding = nn.Embedding(3, 2)

    def forward(self, x, t, label, shift):
        return self.conv(x) * self.embedding(label)[:, :, None, None] + shift[:, :, None, None] * t[:, None, None, None]


def conditions(n, seed=1):
    return {"context": torch.randn(n, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))}


class Text:
    """The text U-Net, quantized for a target on ranges from data, with the runs it is judged on."""

    def __init__(self, tiny, target, graph=None):
        self.network = TextUNet().eval().requires_grad_(False)
        self.plan = trace("ddim", tiny.NOISE_SCHEDULE, 4)
        self.judge = simulate(self.network, self.plan, range(3), SHAPE, conditions(3))
        scheme = QuantScheme(weight_bits=4, activation_bits=8, target=target, policy="uniform")
        self.operators = quantize_operators(self.network, scheme, lambda name: "body")
        initialise(self.network, self.operators, self.plan, self.judge, "min-max")
        self.recipe = freeze(self.operators, scheme, {})
        self.graph = graph or trace_float(self.network, self.operators, SHAPE, conditions(1))


@pytest.fixture(scope="module")
def text(tiny):
    return Text(tiny, "cpu")


# -- conditions ------------------------------------------------------------------------------------------------------


def test_conditions_are_inputs_of_the_graph_by_name_with_a_dynamic_batch(text):
    assert [value.name for value in text.graph.graph.inputs] == ["x", "t", "context"]
    for value in text.graph.graph.inputs:
        assert not isinstance(value.shape[0], int)
    assert list(text.graph.graph.inputs[2].shape)[1:] == [TOKENS, WIDTH]


@pytest.mark.parametrize("batch", [1, 3])
def test_a_conditional_graph_computes_what_the_network_does(text, tmp_path, batch):
    save_graph(text.graph, tmp_path / "float.onnx")
    check_graph(tmp_path / "float.onnx")
    x, t, given = torch.randn(batch, *SHAPE), torch.linspace(3, 90, batch), conditions(batch, 7)
    with torch.no_grad(), quantization(text.operators, active=False):
        wanted = text.network(x, t, **given)
    fed = {"x": x.numpy(), "t": t.numpy(), "context": given["context"].numpy()}
    for name in ("onnxruntime", "openvino"):
        engine = open_engine(tmp_path / "float.onnx", EngineOptions(batch=batch), name)
        np.testing.assert_allclose(engine.run(fed), wanted, atol=1e-4)


@pytest.mark.parametrize("target", ["cpu", "onnxruntime", "tensorrt"])
def test_a_conditional_graph_goes_the_whole_way(text, tiny, tmp_path, target):
    """Lowered, checked, and every layer of it - tokens' linear layers too - what its simulation is."""
    case = text if target == "cpu" else Text(tiny, target, text.graph)
    quantized, twin = lower(case.graph, case.recipe, target)
    check_target(quantized, case.recipe.facts.operators, target)
    for name, model in (("denoiser", quantized), ("twin", twin)):
        save_graph(model, tmp_path / f"{name}.onnx")
        check_graph(tmp_path / f"{name}.onnx")
    parity = layer_parity(tmp_path / "denoiser.onnx", case.operators, case.plan, case.judge)
    assert parity.keys() == case.operators.keys()
    assert min(parity.values()) > LEAST
    paths = tmp_path / "denoiser.onnx", tmp_path / "twin.onnx"
    facts = check_parity(*paths, case.network, case.operators, case.plan, case.judge)
    assert facts["twin_relative_error"] < 1e-4


def test_a_conditional_graph_computes_the_rest_in_16_bits(tiny, text, tmp_path):
    case = Text(tiny, "tensorrt", text.graph)
    quantized, _ = lower(case.graph, case.recipe, "tensorrt")
    cast_rest(quantized, "float16")
    save_graph(quantized, tmp_path / "denoiser.onnx")
    check_graph(tmp_path / "denoiser.onnx")
    assert [value.dtype for value in quantized.graph.inputs] == [ir.DataType.FLOAT] * 3
    engine = OnnxRuntimeEngine(tmp_path / "denoiser.onnx", EngineOptions(batch=2), exact=True)
    x, t = torch.randn(2, *SHAPE), torch.tensor([3.0, 50.0])
    out = engine.run({"x": x.numpy(), "t": t.numpy(), "context": conditions(2)["context"].numpy()})
    with torch.no_grad(), quantization(case.operators, active=True):
        wanted = case.network(x, t, **conditions(2)).numpy()
    assert np.square(out - wanted).sum() < 0.01 * np.square(wanted).sum()


@pytest.mark.usefixtures("rtx")
def test_a_conditional_graph_compiles_to_integer_kernels(tiny, text, tmp_path):
    case = Text(tiny, "tensorrt", text.graph)
    quantized, _ = lower(case.graph, case.recipe, "tensorrt")
    cast_rest(quantized, "float16")
    save_graph(quantized, tmp_path / "denoiser.onnx")
    compiled = compile_plan(CompileRequest(tmp_path / "denoiser.onnx", "sm89", (1, 2, 4)), tmp_path / "plan")
    assert compiled.precisions(case.operators) == dict.fromkeys(case.operators, "Int8")
    assert (tmp_path / "plan").stat().st_size > compiled.weights_bytes


@pytest.fixture(scope="module")
def small():
    network = Conditioned().eval().requires_grad_(False)
    operators = quantize_operators(network, QuantScheme(weight_bits=8, activation_bits=8), lambda name: "body")
    return network, operators


@pytest.mark.parametrize("names", [("label", "shift"), ("shift", "label")])
def test_conditions_are_not_mixed_up_whatever_their_order(small, tmp_path, names):
    network, operators = small
    given = {"label": torch.tensor([2, 0, 1]), "shift": torch.randn(3, 2)}
    model = trace_float(network, operators, (2, 4, 4), {name: given[name] for name in names})
    assert {value.name: value.dtype for value in model.graph.inputs}["label"] == ir.DataType.INT64
    save_graph(model, tmp_path / "float.onnx")
    x, t = torch.randn(3, 2, 4, 4), torch.tensor([1.0, 2.0, 3.0])
    engine = OnnxRuntimeEngine(tmp_path / "float.onnx", EngineOptions(batch=3))
    fed = {"x": x.numpy(), "t": t.numpy()} | {name: value.numpy() for name, value in given.items()}
    np.testing.assert_allclose(engine.run(fed), network(x, t, **given), atol=1e-5)


@pytest.mark.parametrize("name", ["text", "x"])
def test_a_condition_that_the_network_does_not_take_is_named(small, name):
    network, operators = small
    with pytest.raises(AccuQuantError, match=f"condition {name}: Conditioned takes x, t, label, shift; wrap it"):
        trace_float(network, operators, (2, 4, 4), {name: torch.zeros(1, 2)})


def test_conditions_by_keyword_only_are_refused(small):
    network, operators = small
    guided = Guided(network, {"label": torch.tensor([0])}, 3.0)
    with pytest.raises(AccuQuantError, match="condition label: Guided takes x, t; wrap it"):
        trace_float(guided, operators, (2, 4, 4), {"label": torch.tensor([0])})


# -- names -----------------------------------------------------------------------------------------------------------


def test_every_operator_has_the_name_of_its_module(text):
    nodes = operator_nodes(text.graph)
    kinds = {nodes[name].op_type for name in text.operators}
    assert kinds == {"Conv", "Gemm", "MatMul"}
    for name, operator in text.operators.items():
        held = sorted(nodes[name].inputs[1].const_value.shape)
        assert held == sorted(operator.weight_quantizer.weight.shape)


class Twice(nn.Module):
    """Linear layers of tokens: `a` is called twice, or `b` and `c` share their weight."""

    def __init__(self, tied):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(128, 128, bias=False) for _ in range(3))
        self.tied = tied
        if tied:
            self.c.weight = self.b.weight

    def forward(self, x, t):
        y = self.c(self.b(self.a(x)))
        return y if self.tied else self.a(y)


@pytest.mark.parametrize(
    ("tied", "message"),
    [
        (False, r"layer a: 2 nodes .*MatMul .*MatMul .*where one Gemm or MatMul"),
        (True, r"layer b: the weight of its MatMul is computed .*share a weight"),
    ],
)
def test_a_layer_that_has_no_node_and_weight_of_its_own_is_refused(tied, message):
    network = Twice(tied).requires_grad_(False)
    operators = quantize_operators(network, QuantScheme(weight_bits=8, activation_bits=8), lambda name: "body")
    with pytest.raises(AccuQuantError, match=message):
        trace_float(network, operators, (2, 128))


# -- size ------------------------------------------------------------------------------------------------------------


def test_a_copy_shares_tensors_and_leaves_the_original_as_it_is(text):
    before = ir.to_proto(text.graph).SerializeToString(deterministic=True)
    copied = _copy(text.graph)
    assert {v.name for v in copied.graph.initializers.values()} == {
        v.name for v in text.graph.graph.initializers.values()
    }
    for name, value in copied.graph.initializers.items():
        assert value is not text.graph.graph.initializers[name]
        assert value.const_value is text.graph.graph.initializers[name].const_value
    lower(text.graph, text.recipe, "onnxruntime")  # the one that also rewrites float layers
    assert ir.to_proto(text.graph).SerializeToString(deterministic=True) == before


def test_twin_and_quantized_graph_share_what_they_have_in_common(text):
    quantized, twin = lower(text.graph, text.recipe, "onnxruntime")
    shared = quantized.graph.initializers.keys() & twin.graph.initializers.keys()
    assert any(name.endswith(".gamma") for name in shared)  # made by a rewrite of both
    assert any(name.endswith(".bias") for name in shared)  # the network's own
    for name in shared:
        assert quantized.graph.initializers[name].const_value is twin.graph.initializers[name].const_value


def test_weights_that_became_integers_are_held_as_nothing_else(text):
    """Neither the float weight nor a second form of the integers: those are made when the graph is written."""
    quantized, _ = lower(text.graph, text.recipe, "tensorrt")
    held = {v.name: v.const_value for v in quantized.graph.initializers.values()}
    floats = sum(t.nbytes for t in held.values() if t.dtype == ir.DataType.FLOAT)
    assert floats < 0.1 * 4 * sum(codes.numel() for codes in text.recipe.codes.values())
    for name in text.recipe.codes:
        assert isinstance(held[f"{name}.weight.codes"], ir.LazyTensor)
        assert not held[f"{name}.weight.codes"].cache


@pytest.fixture
def both_forms(text, tmp_path, monkeypatch):
    """The same graph with its weights inside, and beside it."""
    quantized, _ = lower(text.graph, text.recipe, "cpu")
    save_graph(quantized, tmp_path / "inside.onnx")
    monkeypatch.setattr(graph_module, "EXTERNAL_DATA_ABOVE", 1000)
    save_graph(quantized, tmp_path / "outside.onnx")
    return tmp_path


def test_weights_beside_the_graph_are_the_same_weights(both_forms):
    names = {p.name for p in both_forms.iterdir()}
    assert names == {"inside.onnx", "outside.onnx", "outside.onnx.data"}
    sizes = [(both_forms / name).stat().st_size for name in ("inside.onnx", "outside.onnx", "outside.onnx.data")]
    assert sizes[0] - sizes[1] > 0.9 * sizes[2]
    fed = {"x": np.ones((2, *SHAPE), np.float32), "t": np.array([3, 50], np.float32)}
    fed["context"] = conditions(2)["context"].numpy()
    for engine in ("onnxruntime", "openvino"):
        results = []
        for name in ("inside.onnx", "outside.onnx"):
            check_graph(both_forms / name)
            results.append(open_engine(both_forms / name, EngineOptions(batch=2), engine).run(fed).copy())
        np.testing.assert_array_equal(*results)


def test_a_graph_that_became_small_leaves_no_data_behind(both_forms, text, monkeypatch):
    monkeypatch.setattr(graph_module, "EXTERNAL_DATA_ABOVE", 1 << 30)
    save_graph(text.graph, both_forms / "outside.onnx")
    assert not (both_forms / "outside.onnx.data").exists()


def test_a_failed_write_leaves_the_older_graph_and_nothing_else(both_forms, text, monkeypatch):
    before = {p.name: p.read_bytes() for p in both_forms.iterdir()}

    def fail(self):
        raise OSError(28, os.strerror(28))

    quantized, _ = lower(text.graph, text.recipe, "cpu")
    monkeypatch.setattr(ir.LazyTensor, "_evaluate", fail)
    with pytest.raises(AccuQuantError, match="No space left"):
        save_graph(quantized, both_forms / "outside.onnx")
    assert {p.name: p.read_bytes() for p in both_forms.iterdir()} == before


class Wide(nn.Module):
    """Linear layers with 2.3 GB of weights, mapped from a file, on a latent of 256 numbers."""

    def __init__(self, file):
        super().__init__()
        rows, layers = 430 * 256, 20
        pool = torch.from_file(str(file), shared=True, size=layers * rows * 256).view(layers, rows, 256)
        pool.normal_(0.0, 1 / 16, generator=torch.Generator().manual_seed(0))
        with torch.device("meta"):
            self.layers = nn.ModuleList(nn.Linear(256, rows, bias=False) for _ in range(layers))
        for layer, weight in zip(self.layers, pool, strict=True):
            layer.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x, t):
        tall = [layer(x.flatten(1)).view(len(x), -1, 256).mean(1) for layer in self.layers]
        return torch.stack(tall).sum(0).view(x.shape)


@pytest.mark.slow
def test_more_weights_than_protobuf_holds(tmp_path):
    """Beyond 2 GiB: written, checked and run."""
    network = Wide(tmp_path / "weights.bin").eval()
    scheme = QuantScheme(weight_bits=4, activation_bits=8, target="cpu")
    operators = quantize_operators(network, scheme, lambda name: "body")
    for operator in operators.values():
        operator.input_quantizers[0].set(torch.tensor(8 / 256), torch.tensor(128.0))
        weight = operator.weight_quantizer
        weight.set_scale(weight.weight.abs().amax(1, keepdim=True) / 7)
    float_graph = trace_float(network, operators, (4, 8, 8))
    quantized, twin = lower(float_graph, freeze(operators, scheme, {}), "cpu")
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 50.0])
    for name, model, active, least in (("twin", twin, False, 2**31), ("denoiser", quantized, True, 2**28)):
        save_graph(model, tmp_path / f"{name}.onnx")
        assert (tmp_path / f"{name}.onnx.data").stat().st_size > least
        check_graph(tmp_path / f"{name}.onnx")
        with torch.no_grad(), quantization(operators, active):
            wanted = network(x, t).numpy()
        engine = OnnxRuntimeEngine(tmp_path / f"{name}.onnx", EngineOptions(batch=2), exact=True)
        made = engine.run({"x": x.numpy(), "t": t.numpy()})
        engine.close()
        np.testing.assert_allclose(made, wanted, atol=1e-4 * np.abs(wanted).max())
