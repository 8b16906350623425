"""Calls timed in turn: whatever else the machine does meanwhile falls on all of them alike.

A sampling loop makes the same call again and again, and so finds its weights in the caches and its branches predicted;
behind another one's call all that is gone, and takes more than one call to come back. So whoever has its turn calls for
a while without being timed, and is timed then.

What one call gains over another is judged round by round, since both meet the same machine within a round. The median
of the n differences lies between their k-th smallest and k-th largest unless fewer than k fall on one side of it,

    P(median outside [d_(k), d_(n+1-k)]) = 2 P(Binomial(n, 1/2) < k),

whatever the differences are distributed like (David and Nagaraja, "Order Statistics", 7.1).
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

WARM_UP = 10  # rounds
RUN_UP = 0.03  # seconds
CONFIDENCE = 0.99


@dataclass(frozen=True)
class Gain:
    """Median of what is saved, as a share of what was spent before, and the ends of its confidence interval."""

    median: float
    low: float
    high: float
    n: int


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    repeats: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    warm_up: int = WARM_UP,
    run_up: float = RUN_UP,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every call, `repeats` of each by `clock`, after `warm_up` rounds that are not counted.

    In each turn there are calls for `run_up` seconds before, or one that takes longer; with 0 there is none.
    """
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(-warm_up, repeats):
        for name in in_turn(list(calls), i):
            if run_up and i >= 0:
                until = clock() + run_up
                calls[name]()
                while clock() < until:
                    calls[name]()
            begun = clock()
            calls[name]()
            if i >= 0:
                taken[name].append(clock() - begun)
        progress(warm_up + i + 1, warm_up + repeats)
    return taken


def in_turn(names: list[str], i: int) -> list[str]:
    """Who goes first changes every time, so that no one always finds the same other's caches."""
    turned = i % len(names)
    return names[turned:] + names[:turned]


def spread(seconds: Sequence[float]) -> dict[str, float]:
    p10, median, p90 = np.percentile(seconds, [10, 50, 90])
    return {"median": float(median), "p10": float(p10), "p90": float(p90), "n": len(seconds)}


def gain(before: Sequence[float], after: Sequence[float], confidence: float = CONFIDENCE) -> Gain:
    """What `after` saves of `before`, which were measured in the same rounds; negative where it takes longer.

    The interval of too few rounds for the confidence is without ends.
    """
    n = len(before)
    saved = np.sort(np.subtract(before, after)) / np.median(before)
    outside, k = 0.0, 0
    while outside + math.comb(n, k) * 0.5**n <= (1 - confidence) / 2:
        outside += math.comb(n, k) * 0.5**n
        k += 1
    low, high = (float(saved[k - 1]), float(saved[n - k])) if k else (-math.inf, math.inf)
    return Gain(float(np.median(saved)), low, high, n)
