"""One set of activation parameters for each stretch of the chain."""

import pytest
import torch
from accuquant.calibrate.guidance import Guided
from accuquant.calibrate.initialise import initialise
from accuquant.calibrate.recipe import freeze
from accuquant.calibrate.scheme import QuantScheme
from accuquant.calibrate.sharing import StepTable, tabulate
from accuquant.runtime.errors import AccuQuantError


def test_rows_are_found_by_the_timestep():
    table = StepTable((600.0, 200.0))
    assert len(table) == 3
    assert [table.row(t) for t in (999, 600, 599, 200, 199, 0)] == [0, 0, 1, 1, 2, 2]


def test_every_stretch_has_its_row_and_a_call_uses_it(tiny):
    run = tiny.prepare(steps=8)
    table = tabulate(run.network, run.operators, run.plan, 4)
    rows = [table.row(s.timestep) for s in run.plan.steps]
    assert rows == [0, 0, 1, 1, 2, 2, 3, 3]
    for i, step in enumerate(run.plan.steps):
        run.network(run.teacher.states[i, :1], torch.tensor([step.timestep]))
        assert table.current == rows[i]


def test_a_network_called_without_its_guidance_uses_the_rows_too(tiny):
    """The checks of a graph hold it against the network itself, of which both halves of a guided output come."""

    class Listening(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x, t, label):
            return self.inner(x, t) + label[:, None, None]

    run = tiny.prepare(steps=8)
    network = Listening(run.network)
    guided = Guided(network, {"label": torch.zeros(1, 1)}, 3.0)
    table = tabulate(guided, run.operators, run.plan, 4)
    x, label = run.teacher.states[0, :1], torch.ones(1, 1)
    for called, i in ((network, 7), (guided, 0), (network, 4)):
        called(x, torch.tensor([run.plan.steps[i].timestep]), label=label)
        assert table.current == i // 2


def test_a_call_across_rows_is_refused(tiny):
    run = tiny.prepare(steps=8)
    tabulate(run.network, run.operators, run.plan, 2)
    ends = torch.tensor([run.plan.steps[0].timestep, run.plan.steps[-1].timestep])
    with pytest.raises(AccuQuantError, match="one row"):
        run.network(run.teacher.states[0, :2], ends)


def test_rows_start_on_what_their_own_stretch_shows(tiny):
    """A row's range covers its stretch, not the chain: some layer's scale falls along it."""
    run = tiny.prepare(steps=8)
    tabulate(run.network, run.operators, run.plan, 4)
    initialise(run.network, run.operators, run.plan, run.teacher, "min-max")
    tables = [q.scale.detach() for op in run.operators.values() for q in op.quantizers]
    assert all(t.shape == (4,) for t in tables)
    assert all((t != 1.0).all() for t in tables)
    assert any(float(t.max() / t.min()) > 1.1 for t in tables)


def test_learning_moves_every_row_and_resumes_bit_for_bit(tiny, tmp_path):
    settings = {"table": 3, "iterations": 12, "steps": 6, "group": 2, "checks": 2}
    whole = tiny.prepare(**settings)
    whole.start(tmp_path / "whole")
    start = tiny.prepare(**settings)
    tabulate(start.network, start.operators, start.plan, 3)
    initialise(start.network, start.operators, start.plan, start.teacher, "min-max")
    now = whole.snapshot(tmp_path / "whole")
    before = start.operators["mid.block_1.conv1"].quantizers[0].log_scale
    place = [q for op in start.operators.values() for q in op.quantizers].index(
        start.operators["mid.block_1.conv1"].quantizers[0]
    )
    assert (now[f"now/scale/{place}"] != before).all()

    class StoppedError(Exception):
        pass

    def stop(stage, done, total, loss):
        if stage == "multi-step" and done == 7:
            raise StoppedError

    broken = tiny.prepare(**settings)
    with pytest.raises(StoppedError):
        broken.start(tmp_path / "broken", report=stop)
    again = tiny.prepare(**settings)
    again.start(tmp_path / "broken", resume=True)
    for name, value in whole.learned().items():
        assert torch.equal(again.learned()[name], value), name


def test_a_table_is_frozen_into_the_recipe(tiny, tmp_path):
    run = tiny.prepare(table=2, iterations=0, steps=6)
    run.start(tmp_path)
    recipe = freeze(run.operators, QuantScheme(weight_bits=4, activation_bits=8), {})
    recipe.save(tmp_path)
    again = type(recipe).load(tmp_path)
    assert again.facts == recipe.facts
    assert again.facts.step_bounds == (run.plan.steps[2].timestep,)
    for name, facts in again.facts.operators.items():
        for k, given in enumerate(facts.inputs):
            scales = run.operators[name].quantizers[k].scale.tolist()
            assert list(given.rows) == pytest.approx(scales)
