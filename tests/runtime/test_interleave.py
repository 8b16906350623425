"""Calls in turn, and what one gains over another: a verdict that noise alone does not bring about."""

import math

import numpy as np
import pytest
from accuquant.runtime.interleave import gain, interleaved, spread


def test_calls_take_turns_and_warm_up_is_not_counted():
    order = []
    taken = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 4, warm_up=2, run_up=0)
    assert "".join(order) == "abbaabbaabba"
    assert {name: len(seconds) for name, seconds in taken.items()} == {"a": 4, "b": 4}


@pytest.mark.parametrize(("needs", "seconds"), [(1, 0.5), (4, 12.0)])
def test_a_call_is_timed_as_in_a_loop_of_its_own(needs, seconds):
    """Behind another's it is three times as slow, `needs` times."""
    now, row = [0.0], ["", 0]

    def call(name):
        row[:] = [name, row[1] + 1 if row[0] == name else 1]
        now[0] += 3.0 if row[1] <= needs else 1.0

    calls = {name: lambda name=name: call(name) for name in "ab"}
    assert interleaved(calls, 4, run_up=seconds, clock=lambda: now[0]) == {"a": [1.0] * 4, "b": [1.0] * 4}
    assert max(interleaved(calls, 4, run_up=0, clock=lambda: now[0])["a"]) == 3.0


def test_progress_counts_every_round():
    told = []
    interleaved({"a": lambda: None}, 3, lambda done, total: told.append((done, total)), warm_up=1, run_up=0)
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_gain_is_the_share_that_is_saved():
    found = gain([10.0] * 9, [8.0] * 9)
    assert (found.median, found.low, found.high, found.n) == (
        pytest.approx(0.2),
        pytest.approx(0.2),
        pytest.approx(0.2),
        9,
    )
    assert gain([10.0] * 9, [11.0] * 9).high < 0


def test_what_disturbs_both_alike_does_not_hide_a_gain():
    """The machine's load moves steps by far more than what is saved, within a round it moves both."""
    load = np.random.default_rng(0).uniform(1.0, 3.0, 60)
    assert gain(load * 1.0, load * 0.99).low > 0


def test_an_interval_covers_the_median_as_often_as_it_says():
    rng = np.random.default_rng(0)
    trials, n = 2000, 30
    missed = 0
    for _ in range(trials):
        noise = rng.standard_cauchy(n)  # whatever the differences are distributed like
        found = gain(np.ones(n), 1.0 - noise, confidence=0.9)
        missed += not found.low <= 0.0 <= found.high
    assert missed / trials <= 0.1 + 3 * math.sqrt(0.1 * 0.9 / trials)
    assert missed / trials >= 0.04  # and is no wider than it must be


def test_too_few_rounds_prove_nothing():
    assert gain([2.0] * 7, [1.0] * 7).low == -math.inf
    assert gain([2.0] * 8, [1.0] * 8).low == pytest.approx(0.5)


def test_a_spread_says_what_it_stands_on():
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "p10": pytest.approx(1.2), "p90": pytest.approx(2.8), "n": 3}
