"""Calibration: it helps, it keeps its best, and a killed run resumes to the same bits."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accuquant.calibrate.guard import held_out_error
from accuquant.calibrate.initialise import initialise
from accuquant.calibrate.journal import Journal
from accuquant.runtime.errors import AccuQuantError

TESTS = Path(__file__).parents[1]


class StoppedError(Exception):
    pass


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    differing = [name for name in one if not torch.equal(one[name], other[name])]
    assert differing == []


def stop_after(iteration: int):
    def report(stage, done, total, loss):
        if stage == "multi-step" and done == iteration:
            raise StoppedError

    return report


@pytest.mark.parametrize(
    ("settings", "stop"),
    [
        ({}, 5),  # between snapshots: iteration 5 is done again
        ({}, 6),  # right after one
        ({"rounding": "adaround", "gradient": "injected-a"}, 5),
        ({"rounding": "nearest", "gradient": "injected-1"}, 3),
        ({"sampler": "plms", "initialisation": "judged", "compensate": "judged"}, 3),
        ({"sampler": "ddim-eta1", "group": 4}, 7),
        ({"initialisation": "judged", "correct": 4}, 5),
        ({"initialisation": "mse", "correct": 8, "gradient": "injected-v"}, 6),
        ({"start": "student", "sampler": "plms", "aim": "local", "warmup": 3, "between": 0.2, "iterations": 9}, 7),
        ({"start": "student", "grouping": "angle", "gradient": "measured", "iterations": 12}, 9),
    ],
)
def test_resumed_equals_uninterrupted_bit_for_bit(tiny, tmp_path, settings, stop):
    whole = tiny.prepare(**settings)
    wanted = whole.start(tmp_path / "whole")
    broken = tiny.prepare(**settings)
    with pytest.raises(StoppedError):
        broken.start(tmp_path / "broken", report=stop_after(stop))
    again = tiny.prepare(**settings)
    got = again.start(tmp_path / "broken", resume=True)
    assert got == wanted
    assert_same(again.learned(), whole.learned())
    # The best state may be an early one; the last one, with its optimizer, shows more.
    assert_same(again.snapshot(tmp_path / "broken"), whole.snapshot(tmp_path / "whole"))


def test_two_runs_of_one_seed_are_equal_and_another_seed_differs(tiny, tmp_path):
    one, two, other = tiny.prepare(), tiny.prepare(), tiny.prepare(seed=1)
    for i, run in enumerate((one, two, other)):
        run.start(tmp_path / str(i))
    first, second, third = (run.snapshot(tmp_path / str(i)) for i, run in enumerate((one, two, other)))
    assert_same(first, second)
    assert any(not torch.equal(v, third[k]) for k, v in first.items() if k.startswith("now/"))


CHILD = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import tiny
tiny.prepare().start(Path(sys.argv[2]), report=lambda *_: time.sleep(0.01))
"""


def test_a_killed_process_resumes_bit_for_bit(tiny, tmp_path):
    """SIGKILL at whatever point the process happens to be at, some time after its first snapshot."""
    folder = tmp_path / "killed"
    path = Journal(folder, {}).path
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(TESTS), str(folder)])
    try:
        deadline = time.monotonic() + 60
        while not path.exists():
            assert child.poll() is None, "finished before a snapshot was seen"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(int.from_bytes(os.urandom(1)) / 256 * 0.2)
        child.send_signal(signal.SIGKILL)
        child.wait()
    finally:
        child.kill()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the child: the bits of a sum may depend on it
    try:
        resumed, whole = tiny.prepare(), tiny.prepare()
        assert resumed.start(folder, resume=True) == whole.start(tmp_path / "whole")
    finally:
        torch.set_num_threads(threads)
    assert_same(resumed.learned(), whole.learned())
    assert_same(resumed.snapshot(folder), whole.snapshot(tmp_path / "whole"))
    assert [p.name for p in folder.iterdir() if not p.name.endswith(".part")] == [path.name]


def test_without_resume_an_old_snapshot_is_ignored(tiny, tmp_path):
    first = tiny.prepare(iterations=2)
    first.start(tmp_path)
    again = tiny.prepare(iterations=2)
    again.start(tmp_path)
    assert_same(first.learned(), again.learned())


def test_resuming_a_finished_run_changes_nothing(tiny, tmp_path):
    first, again = tiny.prepare(), tiny.prepare()
    wanted = first.start(tmp_path)
    steps = []
    got = again.start(tmp_path, resume=True, report=lambda stage, *_: steps.append(stage))
    assert got == wanted
    assert "multi-step" not in steps
    assert_same(first.learned(), again.learned())


def test_resuming_with_other_settings_is_refused(tiny, tmp_path):
    tiny.prepare(iterations=2).start(tmp_path)
    with pytest.raises(AccuQuantError, match="spec"):
        tiny.prepare(iterations=2, group=3).start(tmp_path, resume=True)


def test_calibration_lowers_the_held_out_error(tiny, tmp_path):
    """W4A8 with a small budget: 40 iterations take at least a seventh off the error of the best fixed ranges."""
    run = tiny.prepare(initialisation="mse", iterations=40, steps=8, group=4, trajectories=32, checks=2)
    outcome = run.start(tmp_path)
    assert outcome.best < 0.85 * outcome.initial
    assert outcome.held_out.keys() == {0, 20, 40}
    assert outcome.kept > 0
    assert held_out_error(run.network, run.operators, run.plan, run.judge) == outcome.best


def test_the_best_state_is_kept_though_the_last_one_is_worse(tiny, tmp_path):
    """Rates so high that learning destroys the network: the start itself is then the best, and is what remains."""
    ruin = {"scale_rate": 2.0, "zero_point_rate": 50.0, "rounding_rate": 2.0}
    run = tiny.prepare(**ruin)
    outcome = run.start(tmp_path)
    assert outcome.kept == min(outcome.held_out, key=outcome.held_out.get)
    assert outcome.held_out[run.spec.iterations] > outcome.best
    assert all(operator.active for operator in run.operators.values())
    assert held_out_error(run.network, run.operators, run.plan, run.judge) == outcome.best


def test_no_iterations_leave_the_starting_ranges(tiny, tmp_path):
    run, start = tiny.prepare(iterations=0), tiny.prepare()
    outcome = run.start(tmp_path)
    initialise(start.network, start.operators, start.plan, start.teacher, "min-max")
    assert outcome.held_out.keys() == {0}
    learned = run.learned()
    for name, value in start.learned().items():
        assert torch.equal(learned[name], value)


@pytest.mark.parametrize("rounding", ["nearest", "adaround", "offset"])
def test_every_rounding_trains_what_it_should(tiny, tmp_path, rounding):
    """Scales and zero points always, the rounding where it is learned, the float weights never."""
    run, start = tiny.prepare(rounding=rounding, iterations=3, checks=1), tiny.prepare()
    initialise(start.network, start.operators, start.plan, start.teacher, "min-max")
    run.start(tmp_path)
    last = run.snapshot(tmp_path)
    named = [(name, q) for name, operator in start.operators.items() for q in operator.inputs]
    quantizers = [q for _, q in named]
    for i, (name, q) in enumerate(named):
        # Where a norm group is one channel (32 of them), it removes what the time embedding adds: no gradient there.
        blind = name.endswith("temb_proj") and start.operators[name].weight_quantizer.weight.shape[0] == 32
        assert blind or not torch.equal(last[f"now/scale/{i}"], q.log_scale), name
    free = [q.zero_point for q in quantizers if q.zero_point.requires_grad]
    assert any(not torch.equal(last[f"now/zero_point/{i}"], z) for i, z in enumerate(free))
    for i, (name, operator) in enumerate((n, o) for n, o in start.operators.items() if o.weight_quantizer is not None):
        weight, learned = operator.weight_quantizer, run.operators[name].weight_quantizer
        assert torch.equal(weight.weight, learned.weight)
        assert torch.equal(weight.start, learned.start)
        blind = name.endswith("temb_proj") and weight.weight.shape[0] == 32
        assert blind or (last[f"now/weight_scale/{i}"] != 0).any(), name
        assert not learned.soft
        weight.learn(rounding)
        if rounding == "nearest":
            assert f"now/choice/{i}" not in last
        elif not blind:
            assert not torch.equal(last[f"now/choice/{i}"], weight.choice), name


def test_better_initialisation_than_full_ranges(tiny):
    """Least squared error against min-max ranges, both untrained, on held-out seeds."""
    error = {}
    for method in ("mse", "min-max"):
        run = tiny.prepare()
        initialise(run.network, run.operators, run.plan, run.teacher, method)
        error[method] = held_out_error(run.network, run.operators, run.plan, run.judge)
    assert error["mse"] < error["min-max"]


def test_eight_bits_are_nearly_the_teacher(tiny):
    """W8A8 of the tiny network: each picture's error stays below 1/100 of its variance."""
    run = tiny.prepare(weight_bits=8, activation_bits=8)
    initialise(run.network, run.operators, run.plan, run.teacher, "mse")
    variance = float(run.judge.states[-1].var())
    assert held_out_error(run.network, run.operators, run.plan, run.judge) < 0.01 * variance


def test_every_activation_scale_is_observed(tiny):
    run = tiny.prepare()
    initialise(run.network, run.operators, run.plan, run.teacher, "mse")
    for name, operator in run.operators.items():
        for quantizer in operator.inputs:
            assert float(quantizer.scale.detach()) != 1.0, name
            assert torch.equal(quantizer.zero_point, quantizer.zero_point.round())
