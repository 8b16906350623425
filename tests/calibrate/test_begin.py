"""The beginning that sampling judged: candidates are what they claim, and the best of them is what learning gets."""

import pytest
import torch
from accuquant.calibrate import begin as module
from accuquant.calibrate.begin import Beginning, begin, candidates
from accuquant.calibrate.gptq import compensate
from accuquant.calibrate.guard import held_out_error
from accuquant.calibrate.initialise import initialise
from accuquant.calibrate.spec import CalibrationSpec

FOUR = ["min-max, gptq", "min-max, nearest", "mse, gptq", "mse, nearest"]
BOTH = {"initialisation": "judged", "compensate": "judged"}


def begun(run, known=None):
    told = []
    found = begin(
        run.network, run.operators, run.plan, run.teacher, run.judge, run.spec, lambda *at: told.append(at), known
    )
    return found, told


def by_hand(tiny, ranges, rounded, **settings):
    run = tiny.prepare(**settings)
    initialise(run.network, run.operators, run.plan, run.teacher, ranges, smoothing=run.spec.smoothing)
    if rounded:
        compensate(run.network, run.operators, run.plan, run.teacher)
    return run


def error_of(run):
    return held_out_error(run.network, run.operators, run.plan, run.judge)


def assert_same(run, other):
    expected = other.learned()
    for name, value in run.learned().items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("settings", [{}, {"weight_bits": 8}, {"smoothing": 0.5}])
def test_the_best_candidate_is_in_place_and_every_error_is_what_it_gives_by_itself(tiny, settings):
    run = tiny.prepare(**BOTH, **settings)
    found, _ = begun(run)
    assert found.chosen == min(found.errors, key=found.errors.__getitem__)
    assert error_of(run) == found.errors[found.chosen]
    for name, error in found.errors.items():
        ranges, rounding = name.split(", ")
        alone = by_hand(tiny, ranges, rounding == "gptq", **settings)
        assert error_of(alone) == error
        if name == found.chosen:
            assert_same(run, alone)


@pytest.mark.parametrize("least", FOUR)
def test_whoever_ends_closest_is_begun_from(tiny, monkeypatch, least):
    """The four are judged in this order; an earlier one that wins has to be put back."""
    order = iter(FOUR)
    monkeypatch.setattr(module, "held_out_error", lambda *_: 0.1 if next(order) == least else 0.3)
    run = tiny.prepare(**BOTH)
    found, told = begun(run)
    assert found.chosen == least
    ranges, rounding = least.split(", ")
    assert_same(run, by_hand(tiny, ranges, rounding == "gptq"))
    assert [at[1:] for at in told if at[0] == "beginnings"] == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_choice_that_is_known_is_not_judged_again(tiny, monkeypatch):
    monkeypatch.setattr(module, "held_out_error", None)
    known = Beginning("mse, nearest", {"mse, nearest": 1.0})
    run = tiny.prepare(**BOTH)
    found, told = begun(run, known)
    assert found == known
    assert_same(run, by_hand(tiny, "mse", False))
    assert "beginnings" not in {at[0] for at in told}


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        (BOTH, 4),
        ({"initialisation": "judged", "compensate": "always"}, 2),
        ({"initialisation": "judged", "compensate": "never"}, 2),
        ({"initialisation": "percentile", "compensate": "judged"}, 2),
        ({"initialisation": "mse", "compensate": "never"}, 1),
    ],
)
def test_as_many_are_judged_as_there_are_to_choose_from(tiny, settings, count):
    assert len(candidates(CalibrationSpec(**settings))) == count
    run = tiny.prepare(steps=2, **settings)
    found, _ = begun(run)
    assert len(found.errors) == (count if count > 1 else 0)
    if count == 1:
        assert str(found) == "mse, nearest"
        assert_same(run, by_hand(tiny, "mse", False, steps=2))
    else:
        assert str(found).startswith(f"{found.chosen} (held-out error: ")
