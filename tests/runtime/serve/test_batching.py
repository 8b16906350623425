"""The queue before an engine: strangers share batches, too much is refused, leaving frees the place."""

import threading
import time

import numpy as np
import pytest
from accuquant.runtime.serve.batching import DrainingError, Job, QueueFullError, Wish, Worker

WAIT = 30


class Easel:
    """Paints pictures of one pixel, the seed; before every row it waits for `go`. Seed 13 cannot be painted."""

    def __init__(self, batch=3, rows=3, seconds=0.0):
        self.batch, self.rows, self.seconds = batch, rows, seconds
        self.go, self.begun, self.batches, self.done, self.closed = threading.Event(), threading.Event(), [], [], False
        self.go.set()

    def paint(self, wishes, on_row):
        self.batches.append([wish.seed for wish in wishes])
        self.begun.set()
        pixels = np.array([wish.seed for wish in wishes], np.uint8).reshape(-1, 1, 1, 1)
        for row in range(self.rows):
            assert self.go.wait(WAIT)
            time.sleep(self.seconds)
            if any(wish.seed == 13 for wish in wishes):
                raise ValueError("unlucky")
            on_row(row, lambda seen: pixels[list(seen)] + 100)
        self.done.append(self.batches[-1])
        return pixels

    def close(self):
        self.closed = True


def job(*seeds, **settings):
    return Job([Wish(seed) for seed in seeds], **settings)


def seeds_of(job):
    return job.pictures.result(WAIT)[:, 0, 0, 0].tolist()


@pytest.fixture
def held():
    """An easel busy with seed 0, and its worker, whose queue holds six pictures; nothing moves before `go`."""
    easel = Easel()
    easel.go.clear()
    worker = Worker(easel, most_waiting=6)
    first = job(0)
    worker.submit(first)
    assert easel.begun.wait(WAIT)
    yield easel, worker, first
    easel.go.set()
    worker.drain()
    assert worker.join(WAIT)
    assert easel.closed


def test_strangers_share_batches_and_everyone_gets_their_own(held):
    easel, worker, first = held
    jobs = [job(1), job(2, 3, 4, 5), job(6)]
    for one in jobs:
        worker.submit(one)
    assert worker.waiting == 6
    easel.go.set()
    assert [seeds_of(one) for one in (first, *jobs)] == [[0], [1], [2, 3, 4, 5], [6]]
    assert easel.batches == [[0], [1, 2, 3], [4, 5, 6]]


def test_a_full_queue_refuses_and_says_when_to_come_again(held):
    _, worker, _ = held
    worker.submit(job(1, 2, 3, 4))
    with pytest.raises(QueueFullError, match="4 pictures are waiting and the queue holds 6") as refused:
        worker.submit(job(5, 6, 7))
    assert refused.value.retry_after >= 1
    worker.submit(job(5, 6))


def test_an_empty_queue_takes_what_a_full_one_could_not(held):
    _, worker, _ = held
    large = job(*range(1, 11))
    worker.submit(large)
    large.pictures.cancel()
    assert worker.waiting == 0


def test_what_would_come_too_late_is_refused_at_once():
    worker = Worker(easel := Easel(batch=1, rows=1, seconds=0.2), most_waiting=100)
    worker.submit(first := job(1))
    seeds_of(first)
    easel.go.clear()
    worker.submit(job(2))
    time.sleep(0.05)
    with pytest.raises(QueueFullError, match=r"the deadline is 0\.3 s"):
        worker.submit(job(3), patience=0.3)
    worker.submit(job(4), patience=60)
    easel.go.set()
    worker.drain()
    assert worker.join(WAIT)


def test_who_leaves_gives_the_place_to_others(held):
    easel, worker, _ = held
    left, stays = job(1, 2), job(3)
    worker.submit(left)
    worker.submit(stays)
    left.pictures.cancel()
    easel.go.set()
    assert seeds_of(stays) == [3]
    assert easel.batches == [[0], [3]]


def test_a_batch_that_nobody_waits_for_is_given_up(held):
    easel, worker, first = held
    worker.submit(after := job(1))
    first.pictures.cancel()
    easel.go.set()
    assert seeds_of(after) == [1]
    assert easel.done == [[1]]


def test_a_batch_goes_on_while_one_still_waits(held):
    easel, worker, first = held
    worker.submit(left := job(1))
    worker.submit(stays := job(2))
    easel.begun.clear()
    easel.go.set()
    assert seeds_of(first) == [0]
    left.pictures.cancel()
    assert seeds_of(stays) == [2]


def test_one_that_cannot_be_painted_fails_alone(held):
    easel, worker, _ = held
    jobs = [job(1), job(13), job(2)]
    for one in jobs:
        worker.submit(one)
    easel.go.set()
    assert seeds_of(jobs[0]) == [1]
    assert seeds_of(jobs[2]) == [2]
    assert "unlucky" in str(jobs[1].pictures.exception(WAIT))
    worker.submit(later := job(3))
    assert seeds_of(later) == [3]


def test_previews_go_to_who_asked_for_them(held):
    easel, worker, _ = held
    seen = []
    worker.submit(plain := job(1))
    worker.submit(job(2, 3, glances=frozenset({0, 2}), on_glance=lambda *told: seen.append(told)))
    easel.go.set()
    seeds_of(plain)
    assert [(index, row, int(pixels[0, 0, 0])) for index, row, pixels in seen] == [
        (0, 0, 102), (1, 0, 103), (0, 2, 102), (1, 2, 103),
    ]  # fmt: skip


def test_draining_finishes_what_was_accepted_and_takes_nothing_more(held):
    easel, worker, first = held
    worker.submit(accepted := job(1, 2, 3, 4, 5))
    worker.drain()
    with pytest.raises(DrainingError):
        worker.submit(job(6))
    easel.go.set()
    assert seeds_of(first) == [0]
    assert seeds_of(accepted) == [1, 2, 3, 4, 5]
    assert worker.join(WAIT)


def test_batches_are_measured():
    told = []
    worker = Worker(Easel(batch=2, rows=1, seconds=0.02), on_batch=lambda *facts: told.append(facts))
    worker.submit(one := job(1, 2, 3))
    seeds_of(one)
    worker.drain()
    assert worker.join(WAIT)
    assert [pictures for pictures, _ in told] == [2, 1]
    assert all(seconds >= 0.02 for _, seconds in told)
