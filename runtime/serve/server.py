"""What one server holds: painters with a worker each, limits, and the rules by which requests are let in."""

import asyncio
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import AccuQuantError
from .api import ApiError, GenerateRequest
from .batching import DrainingError, Job, QueueFullError, Wish, Worker
from .metrics import Metrics
from .painter import Painter, UnfitError
from .store import PictureStore

RANDOM_BITS = 53  # of seeds that nobody chose: JavaScript reads larger ones wrong


@dataclass(frozen=True)
class Limits:
    """What one server bears: pictures waiting for each engine, seconds and pictures of a request, its body.

    `sending_seconds` is how long the head of a request may take to arrive, and its body as long again;
    `reading_seconds`, how long an answer, or an event of a stream, may wait to be read.
    """

    waiting: int = 64
    deadline: float = 60.0
    pictures: int = 10
    body_bytes: int = 64 * 2**10
    sending_seconds: float = 10.0
    reading_seconds: float = 60.0
    kept_bytes: int = 64 * 2**20
    kept_seconds: float = 600.0
    addresses: bool = True  # of pictures, beside b64_json


class Server:
    """Painters by name, a worker for each, and what they share. Painters are closed by `drain`.

    Raises:
        AccuQuantError: two painters have one name.
    """

    def __init__(self, painters: Sequence[Painter], limits: Limits | None = None) -> None:
        self.limits, self.metrics = limits or Limits(), Metrics()
        self.painters: Mapping[str, Painter] = {painter.name: painter for painter in painters}
        if len(self.painters) < len(painters):
            raise AccuQuantError("two bundles have the same name; rename the folder of one, since it names the model")
        self.workers: dict[str, Worker] = {}
        for name, painter in self.painters.items():
            worker = Worker(painter, name, self.limits.waiting, self.metrics.on_batch(name))
            self.metrics.watch(name, lambda w=worker: w.waiting, lambda w=worker: w.painting)  # type: ignore[misc]
            self.workers[name] = worker
        self.store = PictureStore(self.limits.kept_bytes, self.limits.kept_seconds)
        self.created, self.draining = int(time.time()), False

    async def warm_up(self) -> None:
        """Paint a first picture with every engine, which also tells how long a batch takes."""
        jobs = []
        for name, worker in self.workers.items():
            jobs.append(Job(self.painters[name].wishes(self._any_prompt(name), [0])))
            worker.submit(jobs[-1])
        await asyncio.gather(*(asyncio.wrap_future(job.pictures) for job in jobs))

    async def drain(self) -> None:
        """Accept nothing more and wait until all that was accepted is painted."""
        self.draining = True
        for worker in self.workers.values():
            worker.drain()
        while any(worker.alive for worker in self.workers.values()):
            await asyncio.sleep(0.02)

    @property
    def ready(self) -> bool:
        return not self.draining and all(worker.alive for worker in self.workers.values())

    def choose(self, model: str | None) -> Painter:
        """The painter of that name, or the first if none is named."""
        name = next(iter(self.painters)) if model is None else model
        if name not in self.painters:
            known = ", ".join(self.painters)
            raise ApiError(404, f"no model {name!r}; served: {known}", parameter="model", code="model_not_found")
        return self.painters[name]

    def wishes(self, painter: Painter, asked: GenerateRequest) -> list[Wish]:
        """One for every picture of the request; seeds count up."""
        if asked.n > self.limits.pictures:
            most = self.limits.pictures
            raise ApiError(400, f"n is {asked.n}; at most {most} pictures a request", parameter="n", code="too_many")
        if asked.response_format == "url" and not self.limits.addresses:
            said = "pictures have no addresses here, where several servers answer; take b64_json"
            raise ApiError(400, said, parameter="response_format")
        if asked.stream and asked.response_format == "url":
            raise ApiError(400, "streams carry b64_json; leave response_format out", parameter="response_format")
        try:
            painter.check_size(asked.size)
            painter.check_steps(asked.num_inference_steps)
            first = secrets.randbits(RANDOM_BITS) if asked.seed is None else asked.seed
            seeds = [(first + k) % 2**64 for k in range(asked.n)]
            return painter.wishes(asked.prompt, seeds, asked.negative_prompt, asked.guidance_scale)
        except UnfitError as error:
            raise ApiError(400, str(error), parameter=error.parameter, code="invalid_value") from None

    def deadline(self, asked: GenerateRequest) -> float:
        return min(self.limits.deadline, asked.deadline or self.limits.deadline)

    def submit(self, painter: Painter, job: Job, deadline: float) -> None:
        try:
            self.workers[painter.name].submit(job, deadline)
        except QueueFullError as error:
            again = {"Retry-After": str(error.retry_after)}
            raise ApiError(429, str(error), "rate_limit_error", code="queue_full", headers=again) from None
        except DrainingError as error:
            raise ApiError(503, str(error), "server_error", code="draining", headers={"Retry-After": "5"}) from None

    def _any_prompt(self, name: str) -> str:
        return "a" if self.painters[name].takes == "text" else ""
