"""Where groups start: on the teacher's latents, or where the student itself ended the group before."""

import itertools

import pytest
import torch
from accuquant.calibrate.batches import Batches
from accuquant.calibrate.initialise import initialise
from accuquant.calibrate.layers import quantization
from accuquant.calibrate.multistep import GroupBatch, accumulate_gradient, cut, roll


def batches_of(tiny, **settings):
    run = tiny.prepare(iterations=20, **settings)
    initialise(run.network, run.operators, run.plan, run.teacher, "min-max")
    groups = cut(run.plan, run.spec.group)
    return run, groups, Batches(run.network, run.operators, run.plan, run.teacher, groups, run.spec)


def walk(run, batches, iterations):
    """(group, data, rollout) of every iteration, with parameters that stay as they are."""
    seen = []
    for i in iterations:
        group, data = batches.draw(i)
        with quantization(run.operators, active=True):
            ended = accumulate_gradient(run.network, run.plan, group, data)
        batches.keep(i, group, data, ended)
        seen.append((group, data, ended))
    return seen


@pytest.mark.parametrize("start", ["teacher", "student"])
def test_every_round_visits_every_group_once(tiny, start):
    _, groups, batches = batches_of(tiny, start=start)
    for cycle in range(3):
        visited = [batches.draw(cycle * len(groups) + k)[0] for k in range(len(groups))]
        assert sorted(g.start for g in visited) == [g.start for g in groups]


def test_the_teachers_start_is_on_the_teachers_trajectory_and_drawn_anew(tiny):
    run, groups, batches = batches_of(tiny)
    starts = []
    for i, (group, data, _) in enumerate(walk(run, batches, range(3 * len(groups)))):
        states = run.teacher.states
        rows = [int((states[group.start] == x).flatten(1).all(1).nonzero()[0]) for x in data.start]
        assert torch.equal(data.end, states[group.stop, rows])
        starts.append((i, sorted(rows)))
    assert len({tuple(rows) for _, rows in starts}) > 3
    assert batches.state() == {}


def test_the_students_start_is_where_it_ended(tiny):
    """Every lane: its first visit starts with the teacher, later ones where the lane's last visit ended."""
    run, groups, batches = batches_of(tiny, start="student")
    ends = {}
    drifted = 0
    for i, (group, data, ended) in enumerate(walk(run, batches, range(4 * len(groups)))):
        at = groups.index(group)
        lane = (at - i // len(groups)) % len(groups)
        if at == 0 or i < len(groups):
            assert any(torch.equal(data.start[0], x) for x in run.teacher.states[group.start])
        else:
            assert torch.equal(data.start, ends[lane])
            drifted += 1
        ends[lane] = ended.end
    assert drifted > len(groups)


def test_a_lane_keeps_its_trajectories_to_the_end_of_the_chain_and_then_takes_others(tiny):
    run, groups, batches = batches_of(tiny, start="student", trajectories=32)
    wanted = {}
    for i, (group, data, _) in enumerate(walk(run, batches, range(4 * len(groups)))):
        visit = groups.index(group)
        lane = (visit - i // len(groups)) % len(groups)
        passed = (lane + i // len(groups)) // len(groups)
        states = run.teacher.states[group.stop]
        rows = [int((states == x).flatten(1).all(1).nonzero()[0]) for x in data.end]
        wanted.setdefault((lane, passed), []).append(rows)
    assert all(a == b for rows in wanted.values() for a, b in itertools.pairwise(rows))
    assert any(wanted[lane, 0] != wanted[lane, 1] for lane, passed in wanted if passed == 1)


def test_a_local_target_is_the_teachers_end_from_the_same_start(tiny):
    """And with the trajectory as target, the same start is asked to come back to it."""
    run, groups, batches = batches_of(tiny, start="student", aim="local", between=0.5, sampler="plms")
    checked = 0
    for group, data, _ in walk(run, batches, range(3 * len(groups))):
        with quantization(run.operators, active=False):
            bare = GroupBatch(data.start, data.end, data.history, data.noise)
            latents, _ = roll(run.network, run.plan, group, bare)
        torch.testing.assert_close(latents[-1], data.end, rtol=1e-4, atol=1e-5)
        for i, x in data.between.items():
            torch.testing.assert_close(latents[i - group.start], x, rtol=1e-4, atol=1e-5)
            checked += 1
    assert checked


def test_latents_kept_survive_a_snapshot(tiny):
    run, groups, batches = batches_of(tiny, start="student", sampler="plms")
    walk(run, batches, range(2 * len(groups)))
    again = Batches(run.network, run.operators, run.plan, run.teacher, groups, run.spec)
    again.restore({k: v.clone() for k, v in batches.state().items()})
    (_, wanted), (_, got) = batches.draw(2 * len(groups)), again.draw(2 * len(groups))
    assert torch.equal(wanted.start, got.start)
    assert wanted.history.keys() == got.history.keys()
    assert all(torch.equal(wanted.history[j], got.history[j]) for j in wanted.history)
