"""Requests to pictures: one worker thread for each engine, which fills its batch from whatever waits.

A request of several pictures may spread over batches, and strangers share one: a picture depends on its own wish alone.
Nobody waits for a batch to fill up; the queue is bounded, and what would come too late is refused at once.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..errors import AccuQuantError

RECENT = 0.3  # weight of the last batch in the running mean of their seconds


@dataclass(frozen=True)
class Wish:
    """All that one picture depends on: seed, class or prompt (None: the bundle's choice), and guidance."""

    seed: int
    condition: int | str | None = None
    unwanted: str = ""
    guidance: float | None = None


Glance = Callable[[Sequence[int]], np.ndarray]  # rows of the batch to uint8 (rows, H, W, C), as they look so far
OnRow = Callable[[int, Glance], None]  # after every network call; may raise to stop


class Paints(Protocol):
    """What a worker needs of an engine: `batch` pictures at most in one call, each of them uint8 (H, W, C)."""

    batch: int

    def paint(self, wishes: Sequence[Wish], on_row: OnRow) -> np.ndarray: ...

    def close(self) -> None: ...


class QueueFullError(AccuQuantError):
    """A request was not accepted; `retry_after` is when it may be, in seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = max(1, math.ceil(retry_after))


class DrainingError(AccuQuantError):
    """The server is about to stop and accepts nothing more."""


class Job:
    """A request: its wishes, and the future of its pictures, uint8 (n, H, W, C). Cancelling that is how to leave.

    `on_glance(picture's index, row, pixels)` is called by the worker's thread after each of the rows in `glances`.
    """

    def __init__(
        self,
        wishes: Sequence[Wish],
        glances: frozenset[int] = frozenset(),
        on_glance: Callable[[int, int, np.ndarray], None] = lambda *_: None,
    ) -> None:
        self.wishes, self.glances, self.on_glance = wishes, glances, on_glance
        self.pictures: Future[np.ndarray] = Future()
        self._painted: dict[int, np.ndarray] = {}

    @property
    def over(self) -> bool:
        return self.pictures.done()

    def deliver(self, index: int, picture: np.ndarray) -> None:
        self._painted[index] = picture
        if len(self._painted) == len(self.wishes):
            with suppress(InvalidStateError):  # cancelled in the last moment
                self.pictures.set_result(np.stack([self._painted[i] for i in range(len(self.wishes))]))

    def fail(self, error: Exception) -> None:
        with suppress(InvalidStateError):
            self.pictures.set_exception(error)


class _AbandonedError(Exception):
    """Nobody waits for any picture of the batch any more."""


_Place = tuple[Job, int]  # one picture of a job


class Worker:
    """The thread that paints for one engine, and the queue before it: at most `most_waiting` pictures.

    `on_batch(pictures, seconds)` hears of every finished batch.
    """

    def __init__(
        self,
        engine: Paints,
        name: str = "worker",
        most_waiting: int = 64,
        on_batch: Callable[[int, float], None] = lambda *_: None,
    ) -> None:
        self._engine, self._most, self._on_batch = engine, most_waiting, on_batch
        self._queue: deque[_Place] = deque()
        self._changed = threading.Condition()
        self._painting = 0
        self._draining = False
        self._batch_seconds: float | None = None
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Pictures that wait for a batch."""
        with self._changed:
            return self._waiting()

    @property
    def painting(self) -> int:
        """Pictures in the present batch."""
        return self._painting

    def submit(self, job: Job, patience: float = math.inf) -> None:
        """Queue a job whose sender waits `patience` seconds.

        Raises:
            QueueFullError: too many pictures wait, or they take so long that this job would come too late.
            DrainingError: nothing is accepted any more.
        """
        with self._changed:
            if self._draining:
                raise DrainingError("the server is about to stop and takes no more requests; ask another one")
            ahead = self._waiting()
            first = self._seconds(ahead)
            if ahead and ahead + len(job.wishes) > self._most:
                raise QueueFullError(
                    f"{ahead} pictures are waiting and the queue holds {self._most}; "
                    f"try again in {math.ceil(first) or 1} s",
                    first,
                )
            ready = self._seconds(ahead + len(job.wishes))
            if (ahead or self._painting) and ready > patience:
                raise QueueFullError(
                    f"pictures would be ready in about {ready:.0f} s, the deadline is {patience:g} s; "
                    "try again later, ask for fewer, or for a later deadline",
                    ready - patience,
                )
            self._queue.extend((job, index) for index in range(len(job.wishes)))
            self._changed.notify_all()

    def drain(self) -> None:
        """Accept nothing more; the thread ends, and closes the engine, when all that was accepted is painted."""
        with self._changed:
            self._draining = True
            self._changed.notify_all()

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the thread's end; False if it goes on."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _waiting(self) -> int:
        return sum(not job.over for job, _ in self._queue)

    def _seconds(self, pictures: int) -> float:
        """How long `pictures` more take, after the batch that is being painted."""
        batches = math.ceil(pictures / self._engine.batch) + bool(self._painting)
        return batches * (self._batch_seconds or 0.0)

    def _work(self) -> None:
        while taken := self._take():
            begun = time.perf_counter()
            if self._paint(taken):
                seconds, known = time.perf_counter() - begun, self._batch_seconds
                self._batch_seconds = seconds if known is None else known + RECENT * (seconds - known)
                self._on_batch(len(taken), seconds)
            self._painting = 0
        self._engine.close()

    def _take(self) -> list[_Place]:
        """The next batch, waited for; empty once nothing more can come."""
        with self._changed:
            while True:
                taken: list[_Place] = []
                while self._queue and len(taken) < self._engine.batch:
                    job, index = self._queue.popleft()
                    if not job.over:
                        taken.append((job, index))
                if taken or self._draining:
                    self._painting = len(taken)
                    return taken
                self._changed.wait()

    def _paint(self, taken: list[_Place]) -> bool:
        """Was the batch painted whole, in one go?"""

        def on_row(row: int, glance: Glance) -> None:
            if all(job.over for job, _ in taken):
                raise _AbandonedError
            seen = [k for k, (job, _) in enumerate(taken) if row in job.glances and not job.over]
            if seen:
                for k, picture in zip(seen, glance(seen), strict=True):
                    job, index = taken[k]
                    job.on_glance(index, row, picture)

        try:
            pictures = self._engine.paint([job.wishes[index] for job, index in taken], on_row)
        except _AbandonedError:
            return False
        except Exception as error:  # whatever it is, it must not end the thread that all others wait for
            jobs = list(dict.fromkeys(job for job, _ in taken))
            if len(jobs) == 1:
                jobs[0].fail(error)
            else:  # one of them is the cause, and the others shall not suffer for it
                for one in jobs:
                    if not one.over:
                        self._paint([(job, index) for job, index in taken if job is one])
            return False
        for (job, index), picture in zip(taken, pictures, strict=True):
            job.deliver(index, picture)
        return True
