"""What depends on the timestep alone, looked up: the same numbers, and nothing left of the network that made them."""

import numpy as np
import onnx_ir as ir
import pytest
from accuquant.calibrate.families.ddim import role_of
from accuquant.calibrate.initialise import initialise
from accuquant.calibrate.layers import quantize_operators
from accuquant.calibrate.recipe import freeze
from accuquant.calibrate.scheme import QuantScheme
from accuquant.calibrate.sharing import tabulate
from accuquant.calibrate.trace import trace
from accuquant.calibrate.trajectory import simulate
from accuquant.export.graph import operator_nodes, save_graph
from accuquant.export.lower import lower
from accuquant.export.passes.time_table import time_table
from accuquant.export.verify import check_graph
from accuquant.runtime.engines.base import EngineOptions
from accuquant.runtime.engines.onnxruntime import OnnxRuntimeEngine
from accuquant.runtime.errors import AccuQuantError

BATCH = 4


@pytest.fixture(scope="module")
def plan(tiny):
    return trace("ddim", tiny.NOISE_SCHEDULE, 6)


@pytest.fixture(scope="module", params=[("cpu", 1), ("tensorrt", 3)], ids=["cpu", "tensorrt-step-table"])
def graphs(tiny, plan, request):
    """Both graphs of the tiny U-Net: quantized, for two targets, one of them with scales that depend on the step."""
    target, table = request.param
    network, scheme = tiny.unet(), QuantScheme(weight_bits=4, activation_bits=8, target=target)
    operators = quantize_operators(network, scheme, role_of)
    if table > 1:
        tabulate(network, operators, plan, table)
    initialise(network, operators, plan, simulate(network, plan, range(2), tiny.SHAPE), "min-max")
    return lower(tiny.float_graph(), freeze(operators, scheme, {}), target)


def run(model, path, feeds):
    save_graph(model, path)
    check_graph(path)
    engine = OnnxRuntimeEngine(path, EngineOptions(batch=BATCH), exact=True)
    return [np.array(engine.run(feed)) for feed in feeds]


def test_looked_up_is_computed_bit_for_bit_also_where_samples_differ_in_their_step(tiny, graphs, plan, tmp_path):
    timesteps = np.array([step.timestep for step in plan.steps], np.float32)
    x = np.random.default_rng(0).standard_normal((BATCH, *tiny.SHAPE)).astype(np.float32)
    feeds = [{"x": x, "t": np.full(BATCH, t, np.float32)} for t in timesteps]
    feeds.append({"x": x, "t": timesteps[[3, 0, 5, 1]]})
    for model in graphs:
        made = ir.from_proto(ir.to_proto(model))
        before = run(made, tmp_path / "computed.onnx", feeds)
        assert time_table(made, timesteps.tolist()) > 0
        for computed, looked_up in zip(before, run(made, tmp_path / "looked_up.onnx", feeds), strict=True):
            np.testing.assert_array_equal(looked_up, computed)


def test_nothing_is_left_of_what_made_the_values(graphs, plan):
    for model in graphs:
        made = ir.from_proto(ir.to_proto(model))
        timed = {name for name in operator_nodes(made) if role_of(name) == "time"}
        assert timed
        time_table(made, [step.timestep for step in plan.steps])
        assert not timed & operator_nodes(made).keys()
        assert not [name for name in made.graph.initializers if name.startswith(("temb.", "down.0.block.0.temb_proj"))]
        readers = {usage.node.name for usage in next(v for v in made.graph.inputs if v.name == "t").uses()}
        assert readers == {"time.column"}


def test_a_table_larger_than_the_weights_it_replaces_is_not_made(graphs):
    for model in graphs:
        made = ir.from_proto(ir.to_proto(model))
        before = [node.name for node in made.graph]
        assert time_table(made, [k / 8 for k in range(800)]) == 0
        assert [node.name for node in made.graph] == before


def test_timesteps_that_float32_cannot_tell_apart_are_refused(graphs):
    with pytest.raises(AccuQuantError, match="the same in float32; sample in fewer steps"):
        time_table(ir.from_proto(ir.to_proto(graphs[0])), [1.0, 1.0 + 1e-9])
