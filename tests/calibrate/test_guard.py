"""What learning did to each group, and what goes back where it did harm."""

import pytest
import torch
from accuquant.calibrate.guard import activation_state, fall_back, group_errors, held_out_error, verdict
from accuquant.calibrate.initialise import initialise
from accuquant.calibrate.multistep import Group, cut
from accuquant.calibrate.sharing import tabulate


def initialised(tiny, table=1, **settings):
    run = tiny.prepare(**settings)
    if table > 1:
        tabulate(run.network, run.operators, run.plan, table)
    initialise(run.network, run.operators, run.plan, run.teacher, "min-max")
    return run


def errors(run, groups):
    return group_errors(run.network, run.operators, run.plan, run.judge, groups)


def back(run, groups, before, initial):
    return fall_back(run.network, run.operators, run.plan, run.judge, groups, before, initial)


@pytest.mark.parametrize("sampler", ["ddim", "ddim-eta1", "plms"])
def test_one_group_of_the_whole_chain_errs_as_the_chain_does(tiny, sampler):
    run = initialised(tiny, sampler=sampler)
    (whole,) = errors(run, [Group(0, len(run.plan))])
    assert whole == pytest.approx(held_out_error(run.network, run.operators, run.plan, run.judge), rel=1e-6)


def move(run, row, by):
    with torch.no_grad():
        for operator in run.operators.values():
            for quantizer in operator.quantizers:
                quantizer.log_scale[row] += by


def test_a_row_that_learning_spoiled_goes_back_and_the_others_stay(tiny):
    run = initialised(tiny, table=4, steps=8)
    groups = cut(run.plan, 2)
    move(run, 0, 2.0)  # a bad start, which "learning" undoes
    before, initial = errors(run, groups), activation_state(run.operators)
    move(run, 0, -2.0)
    move(run, 2, 3.0)
    learned = activation_state(run.operators)
    gains = back(run, groups, before, initial)
    assert [g.restored for g in gains] == [False, False, True, False]
    assert gains[0].after < gains[0].before
    assert gains[2].after == gains[2].before == before[2]
    state = activation_state(run.operators)
    assert all(torch.equal(now[2], then[2]) for now, then in zip(state, initial, strict=True))
    assert all(torch.equal(now[0], then[0]) for now, then in zip(state, learned, strict=True))
    assert "back to their initial parameters: steps 5-6" in verdict(gains)


def test_shared_parameters_are_left_and_the_worse_groups_are_named(tiny):
    run = initialised(tiny)
    groups = cut(run.plan, 2)
    before, initial = errors(run, groups), activation_state(run.operators)
    with torch.no_grad():
        for operator in run.operators.values():
            for quantizer in operator.quantizers:
                quantizer.log_scale += 3.0
    spoiled = activation_state(run.operators)
    gains = back(run, groups, before, initial)
    assert all(not g.improved and not g.restored for g in gains)
    assert all(torch.equal(a, b) for a, b in zip(activation_state(run.operators), spoiled, strict=True))
    assert verdict(gains).startswith("0 of 2 no worse than before; worse: steps 1-2 (")


def test_a_calibration_tells_of_every_group(tiny, tmp_path):
    outcome = tiny.prepare(steps=6).start(tmp_path)
    assert [(g.start, g.stop) for g in outcome.groups] == [(0, 2), (2, 4), (4, 6)]
    assert tiny.prepare(iterations=0).start(tmp_path / "none").groups == []
