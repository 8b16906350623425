"""Beyond one machine, with Ray Serve: pictures on request, from replicas that come and go with the load.

    serve.run(deployment("model-w4a8", most_replicas=8))    # then POST {"seed": 7, "n": 2}, as to the OpenAI images API

Every replica opens the bundle from its folder, which all machines must see under the same path, and fills its batches
from whatever waits there. A picture depends on its own wish alone, so what died with a replica is asked of another. In
front of them stands a small deployment that carries bodies to replicas and answers back: JSON, or with
`Accept: image/png` the picture itself. Streams are not served here.
"""

import asyncio
import json
import time
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..bundle import Bundle, NetworkName
from ..errors import AccuQuantError
from .api import ApiError, GenerateRequest, base64_of, encoded, validation_error
from .batching import Job
from .painter import Painter
from .server import Limits, Server

try:
    from ray import serve
    from ray.exceptions import RayActorError
    from ray.serve.exceptions import BackPressureError
    from starlette.requests import Request
    from starlette.responses import Response
except ImportError:
    raise AccuQuantError("Ray Serve is not installed; install it with: pip install 'accuquant[ray]'") from None

Answer = tuple[int, dict[str, str], bytes]  # status, headers, body
TRIES = 5  # replicas that may die under one request


class _Painters:
    """A replica: the bundle on an engine, with the queue and the batches that the HTTP server has."""

    def __init__(self, folder: Path, opening: dict[str, Any], limits: Limits) -> None:
        self._server = Server([Painter(Bundle(folder), **opening)], limits)

    async def answer(self, body: bytes, accept: str) -> Answer:
        """Of a request's body; refusals are answers too, in the API's form."""
        try:
            return await self._pictures(GenerateRequest.model_validate_json(body), accept)
        except ValidationError as error:
            refusal = validation_error([dict(found) for found in error.errors()])
        except ApiError as error:
            refusal = error
        return _json(refusal.body, refusal.status, refusal.headers)

    async def _pictures(self, asked: GenerateRequest, accept: str) -> Answer:
        if asked.stream or asked.response_format == "url":
            raise ApiError(400, "neither streams nor addresses are served here; leave them out", parameter="stream")
        server, painter = self._server, self._server.choose(asked.model)
        wishes, deadline = server.wishes(painter, asked), server.deadline(asked)
        job = Job(wishes)
        server.submit(painter, job, deadline)
        try:
            pictures = await asyncio.wait_for(asyncio.wrap_future(job.pictures), deadline)
        except TimeoutError:
            raise ApiError(504, f"not ready within {deadline:g} s", "server_error", code="deadline_exceeded") from None
        except AccuQuantError as error:
            raise ApiError(500, f"the pictures could not be painted: {error}", "server_error") from error
        files = [encoded(picture, asked.output_format, asked.output_compression) for picture in pictures]
        if accept.startswith("image/") and len(files) == 1:
            return 200, {"Content-Type": f"image/{asked.output_format}", "X-Seed": str(wishes[0].seed)}, files[0]
        data = [{"b64_json": base64_of(file), "seed": wish.seed} for file, wish in zip(files, wishes, strict=True)]
        return _json(
            {"created": int(time.time()), "data": data, "size": painter.size, "output_format": asked.output_format}
        )

    def check_health(self) -> None:
        """Ray replaces a replica in which this raises."""
        if not self._server.ready:
            raise AccuQuantError("the engine's thread has ended")


class _Front:
    """Carries bodies to replicas, and once more where one died under them."""

    def __init__(self, painters: Any, limits: Limits) -> None:
        self._painters, self._limits = painters, limits

    async def __call__(self, request: Request) -> Response:
        try:
            status, headers, body = await self._answer(request)
        except ApiError as error:
            status, headers, body = _json(error.body, error.status, error.headers)
        return Response(body, status, headers)

    async def _answer(self, request: Request) -> Answer:
        if request.method != "POST" or not request.headers.get("content-type", "").startswith("application/json"):
            raise ApiError(415, "POST JSON, with Content-Type: application/json", code="no_json")
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > self._limits.body_bytes:
                raise ApiError(413, f"the body is larger than {self._limits.body_bytes} bytes", code="body_too_large")
        accept = request.headers.get("accept", "")
        for _ in range(TRIES):  # what a picture depends on is in the body, so that asking twice does no harm
            try:
                return await self._painters.answer.remote(bytes(body), accept)  # type: ignore[no-any-return]
            except BackPressureError:
                again = {"Retry-After": "1"}
                raise ApiError(
                    429, "too many requests are waiting; try again in 1 s", "rate_limit_error", code="queue_full",
                    headers=again,
                ) from None  # fmt: skip
            except RayActorError:
                continue
        raise ApiError(503, f"{TRIES} replicas died under this request", "server_error", headers={"Retry-After": "5"})


def deployment(
    bundle: Path | str,
    *,
    network: NetworkName = "denoiser",
    engine: str = "auto",
    batch: int = 4,
    threads: int = 1,
    guidance: float | None = None,
    least_replicas: int = 1,
    most_replicas: int = 4,
    limits: Limits | None = None,
) -> serve.Application:
    """The application, for `serve.run`; arguments from `network` to `guidance` are Painter's.

    Replicas are added while more than `batch` requests wait at each on average, and taken away when fewer do, between
    `least_replicas` and `most_replicas`. A replica takes `threads` cores, or one GPU where the bundle is for GPUs.

    Raises:
        AccuQuantError: as `Bundle`, before any replica starts.
    """
    folder, limits = Path(bundle).resolve(), limits or Limits()
    on_gpu = Bundle(folder).manifest.target == "tensorrt"
    opening = {"network": network, "engine": engine, "batch": batch, "threads": threads, "guidance": guidance}
    painters = serve.deployment(
        name="painters",
        ray_actor_options={"num_gpus": 1} if on_gpu else {"num_cpus": threads},
        max_ongoing_requests=4 * batch,
        max_queued_requests=limits.waiting,
        autoscaling_config={
            "min_replicas": least_replicas, "max_replicas": most_replicas, "target_ongoing_requests": batch,
        },
        graceful_shutdown_timeout_s=limits.deadline,
    )(_Painters).bind(folder, opening, limits)  # fmt: skip
    front = serve.deployment(name="front", ray_actor_options={"num_cpus": 0}, max_ongoing_requests=1000)(_Front)
    return front.bind(painters, limits)


def _json(body: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Answer:
    return status, {"Content-Type": "application/json"} | (headers or {}), json.dumps(body).encode()
