"""The output's correction in the graph: the simulation's own, at any batch, looked up in the table of timesteps too."""

import numpy as np
import pytest
import torch
from accuquant.calibrate.correction import OutputCorrection
from accuquant.calibrate.initialise import initialise
from accuquant.calibrate.layers import quantization, quantize_operators
from accuquant.calibrate.recipe import Recipe, freeze
from accuquant.calibrate.scheme import QuantScheme
from accuquant.calibrate.trace import trace
from accuquant.calibrate.trajectory import simulate
from accuquant.export.graph import operator_nodes, save_graph
from accuquant.export.lower import lower
from accuquant.export.passes.cast_rest import cast_rest
from accuquant.export.passes.time_table import time_table
from accuquant.runtime.engines.base import EngineOptions
from accuquant.runtime.engines.onnxruntime import OnnxRuntimeEngine
from accuquant.runtime.errors import AccuQuantError
from safetensors.torch import load_file, save_file

TIMESTEPS = (75.0, 50.0, 25.0, 0.0)


def exactly(graph, path, inputs):
    """As the standard defines it: engines saturate on CPUs without VNNI where no target is named."""
    save_graph(graph, path)
    engine = OnnxRuntimeEngine(path, EngineOptions(batch=4), exact=True)
    return torch.from_numpy(engine.run({name: value.numpy() for name, value in inputs.items()}))


@pytest.fixture(scope="module")
def made(tiny):
    """Network, operators, inputs at several timesteps, and the recipe without and with a correction."""
    from accuquant.calibrate.families.ddim import role_of

    network, plan = tiny.unet(), trace("ddim", tiny.NOISE_SCHEDULE, 4)
    scheme = QuantScheme(weight_bits=8, activation_bits=8)
    operators = quantize_operators(network, scheme, role_of)
    teacher = simulate(network, plan, range(4), tiny.SHAPE)
    initialise(network, operators, plan, teacher, "mse")
    assert [step.timestep for step in plan.steps] == list(TIMESTEPS)
    generator = torch.Generator().manual_seed(0)
    correction = OutputCorrection(torch.tensor(TIMESTEPS), 0.1 * torch.randn(4, 3, generator=generator))
    inputs = {"x": teacher.states[1], "t": torch.tensor([75.0, 0.0, 25.0, 50.0])}
    return network, operators, inputs, freeze(operators, scheme, {}), freeze(operators, scheme, {}, correction)


def test_the_graph_has_the_correction_of_the_simulation(tiny, made, tmp_path):
    network, operators, inputs, plain, corrected = made
    graph, twin = lower(tiny.float_graph(), corrected, "cpu")
    bare, bare_twin = lower(tiny.float_graph(), plain, "cpu")
    found = tiny.on_onnxruntime(graph, tmp_path / "corrected.onnx", inputs)
    raw = tiny.on_onnxruntime(bare, tmp_path / "bare.onnx", inputs)
    assert torch.allclose(found, corrected.correction(inputs["x"], inputs["t"], raw), atol=1e-5)
    assert (found - raw).abs().mean() > 0.01
    handle = corrected.correction.attach(network, operators)
    with torch.no_grad(), quantization(operators, active=True):
        simulated = network(inputs["x"], inputs["t"])
        handle.remove()
        without = network(inputs["x"], inputs["t"])
    # Codes flip where values lie on a boundary, with the correction as without; it makes a flip (1 + alpha) times that.
    exact, exact_bare = (exactly(g, tmp_path / "exact.onnx", inputs) for g in (graph, bare))
    assert torch.allclose(exact, corrected.correction(inputs["x"], inputs["t"], exact_bare), atol=1e-5)
    apart, apart_without = (exact - simulated).square().mean(), (exact_bare - without).square().mean()
    largest = corrected.correction.coefficients[:, 0].abs().max()
    assert apart <= (1 + largest) ** 2 * apart_without + 1e-10
    of_twins = [tiny.on_onnxruntime(g, tmp_path / "twin.onnx", inputs) for g in (twin, bare_twin)]
    assert torch.equal(*of_twins)


def test_the_table_of_timesteps_holds_it_too(tiny, made, tmp_path):
    *_, inputs, _, corrected = made
    graph, _ = lower(tiny.float_graph(), corrected, "cpu")
    wanted = tiny.on_onnxruntime(graph, tmp_path / "computed.onnx", inputs)
    assert time_table(graph, TIMESTEPS) > 0
    assert not [name for name in operator_nodes(graph) if name in ("correction.row", "correction.values")]
    assert torch.allclose(tiny.on_onnxruntime(graph, tmp_path / "table.onnx", inputs), wanted, atol=1e-6)


def test_a_graph_in_sixteen_bits_has_it(tiny, made, tmp_path):
    from onnx.reference import ReferenceEvaluator

    *_, inputs, _, corrected = made
    graph, _ = lower(tiny.float_graph(), corrected, "tensorrt")
    wanted = exactly(graph, tmp_path / "32.onnx", inputs).numpy()
    cast_rest(graph, "float16")
    save_graph(graph, tmp_path / "16.onnx")
    (found,) = ReferenceEvaluator(str(tmp_path / "16.onnx")).run(None, {k: v.numpy() for k, v in inputs.items()})
    assert found.dtype == np.float32
    assert np.square(found - wanted).mean() < 3e-3 * np.square(wanted).mean()


def test_a_recipe_keeps_it(made, tmp_path):
    *_, plain, corrected = made
    corrected.save(tmp_path)
    read = Recipe.load(tmp_path)
    assert torch.equal(read.correction.timesteps, corrected.correction.timesteps)
    assert torch.equal(read.correction.coefficients, corrected.correction.coefficients)
    plain.save(tmp_path)
    assert Recipe.load(tmp_path).correction is None


def test_half_of_a_correction_is_no_recipe(made, tmp_path):
    made[-1].save(tmp_path)
    tensors = load_file(tmp_path / "recipe.safetensors")
    del tensors["output/timesteps"]
    save_file(tensors, tmp_path / "recipe.safetensors")
    with pytest.raises(AccuQuantError, match="holds no usable recipe: 'output/timesteps'"):
        Recipe.load(tmp_path)


def test_other_channels_than_the_latents_are_refused(tiny, made):
    *_, plain, corrected = made
    wide = OutputCorrection(corrected.correction.timesteps, torch.zeros(4, 6))
    recipe = Recipe(plain.facts, plain.codes, plain.scales, correction=wide)
    with pytest.raises(AccuQuantError, match=r"corrects 4 channels; calibrate .* \(--set correct=0\)"):
        lower(tiny.float_graph(), recipe, "cpu")


def test_a_timestep_between_two_has_the_nearest_ones(tiny, made, tmp_path):
    *_, inputs, plain, corrected = made
    between = inputs | {"t": torch.tensor([90.0, 11.0, 26.5, 62.0])}
    found = tiny.on_onnxruntime(lower(tiny.float_graph(), corrected, "cpu")[0], tmp_path / "corrected.onnx", between)
    raw = tiny.on_onnxruntime(lower(tiny.float_graph(), plain, "cpu")[0], tmp_path / "bare.onnx", between)
    rows = corrected.correction.coefficients[[0, 3, 2, 1]][:, :, None, None, None].numpy()
    wanted = raw.numpy() * (1 + rows[:, 0]) + rows[:, 1] * inputs["x"].numpy() + rows[:, 2]
    assert np.abs(found.numpy() - wanted).max() < 1e-5
