"""The application: routes, and the way of a request from its body to its pictures.

The event loop never paints, encodes or waits for a lock that a painting thread holds for long: engines have threads of
their own, files are encoded in the loop's helpers.
"""

import asyncio
import base64
import hashlib
import logging
import re
import time
from collections.abc import AsyncIterator
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from ..errors import AccuQuantError
from .api import ApiError, GenerateRequest, base64_of, encoded, error_body, preview_rows, validation_error
from .batching import Job
from .gate import Gate
from .painter import FULL_PRECISION, Painter
from .server import Server
from .streaming import Glances, event


def application(server: Server, api_key: str | None = None) -> FastAPI:
    """The ASGI application in front of a server."""
    app = FastAPI(title="AccuQuant", docs_url=None, redoc_url=None, openapi_url=None)
    limits = server.limits
    app.add_middleware(Gate, api_key=api_key, most_bytes=limits.body_bytes, seconds=limits.sending_seconds)
    page, policy = _page()

    @app.post("/v1/images/generations")
    async def generate(asked: GenerateRequest, request: Request) -> Response:
        painter = server.choose(asked.model)
        status = 499  # what nginx calls a sender who left
        try:
            response = await _generate(server, painter, asked, request)
            status = response.status_code
        except ApiError as error:
            status = error.status
            raise
        except Exception:
            status = 500
            raise
        finally:
            server.metrics.requests.labels(painter.name, status).inc()
            if status == 499:
                server.metrics.disconnects.inc()
        return response

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(server, painter) for painter in server.painters.values()]}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        return _model(server, server.choose(name))

    @app.get("/images/{name}")
    async def picture(name: str) -> Response:
        kept = server.store.get(name)
        if kept is None:
            raise ApiError(404, "there is no such picture any more; they are kept for a while only", code="not_found")
        headers = {"Cache-Control": "private, no-store", "X-Content-Type-Options": "nosniff"}
        return Response(kept.data, media_type=kept.media_type, headers=headers)

    @app.get("/health/live")
    async def live() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/health/ready")
    async def ready() -> Response:
        status = "ready" if server.ready else "draining" if server.draining else "an engine's thread has ended"
        return JSONResponse({"status": status}, 200 if server.ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(server.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/")
    async def index() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    @app.exception_handler(ApiError)
    async def refuse(_: Request, error: ApiError) -> Response:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def misunderstood(_: Request, error: RequestValidationError) -> Response:
        found = validation_error(list(error.errors()))
        return JSONResponse(found.body, found.status)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return JSONResponse(error_body(message, "invalid_request_error"), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> Response:
        return JSONResponse(error_body("the server failed; its log says how", "server_error"), 500)

    return app


async def _generate(server: Server, painter: Painter, asked: GenerateRequest, request: Request) -> Response:
    wishes, deadline = server.wishes(painter, asked), server.deadline(asked)
    rows = preview_rows(asked.partial_images, painter.steps) if asked.stream else frozenset[int]()
    glances = Glances(asyncio.get_running_loop())
    job = Job(wishes, rows, glances.show)
    begun = time.monotonic()
    server.submit(painter, job, deadline)
    pictures = asyncio.wrap_future(job.pictures)
    if asked.stream:
        body = _events(server, painter, asked, job, pictures, glances, begun)
        return StreamingResponse(body, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
    leaving = asyncio.ensure_future(_left(request))
    try:
        either: set[asyncio.Future[Any]] = {pictures, leaving}
        await asyncio.wait(either, timeout=deadline, return_when=asyncio.FIRST_COMPLETED)
        if not pictures.done():
            if leaving.done():
                return Response(status_code=499)
            raise _too_late(deadline)
        files = await _files(asked, _painted(pictures))
    finally:
        leaving.cancel()
        pictures.cancel()  # takes it out of the queue, if it is not done
    server.metrics.answered(painter.name, len(files), time.monotonic() - begun)
    data = [_datum(server, asked, request, file) | {"seed": w.seed} for file, w in zip(files, wishes, strict=True)]
    return JSONResponse(
        {"created": int(time.time()), "data": data, "size": painter.size, "output_format": asked.output_format}
    )


async def _events(
    server: Server,
    painter: Painter,
    asked: GenerateRequest,
    job: Job,
    pictures: "asyncio.Future[Any]",
    glances: Glances,
    begun: float,
) -> AsyncIterator[str]:
    """Previews as they come, then the pictures; the events of the API's own streams, with `index` and `step` beside."""
    common = {"size": painter.size, "quality": "auto", "background": "opaque", "output_format": asked.output_format}
    until, shown, answered = begun + server.deadline(asked), 0, False
    try:
        while not pictures.done():
            fresh = await glances.next(pictures, until - time.monotonic())
            if not fresh and not pictures.done():
                answered = True
                yield event("error", _too_late(server.deadline(asked)).body)
                return
            for index, (row, pixels) in fresh.items():
                file = await asyncio.to_thread(encoded, pixels, asked.output_format, asked.output_compression)
                yield event(
                    "image_generation.partial_image",
                    common
                    | {"b64_json": base64_of(file), "partial_image_index": shown, "created_at": int(time.time())}
                    | {"index": index, "step": row + 1, "steps": painter.steps},
                )
                shown += 1
        try:
            files = await _files(asked, _painted(pictures))
        except ApiError as error:
            answered = True
            yield event("error", error.body)
            return
        for index, (file, wish) in enumerate(zip(files, job.wishes, strict=True)):
            yield event(
                "image_generation.completed",
                common
                | {"b64_json": base64_of(file), "created_at": int(time.time())}
                | {"index": index, "seed": wish.seed},
            )
        answered = True
        server.metrics.answered(painter.name, len(files), time.monotonic() - begun)
    finally:
        if not answered:
            server.metrics.disconnects.inc()
        pictures.cancel()


def _painted(pictures: "asyncio.Future[Any]") -> Any:
    """What the worker made, or its error in the API's form."""
    error = pictures.exception()
    if error is None:
        return pictures.result()
    # What others than we wrote may name files of this machine.
    said = str(error) if isinstance(error, AccuQuantError) else "the engine failed; the server's log says how"
    logging.getLogger(__name__).error("painting failed", exc_info=error)
    raise ApiError(500, f"the pictures could not be painted: {said}", "server_error", code="engine_failed")


async def _files(asked: GenerateRequest, pictures: Any) -> list[bytes]:
    def all_encoded() -> list[bytes]:
        return [encoded(picture, asked.output_format, asked.output_compression) for picture in pictures]

    return await asyncio.to_thread(all_encoded)


def _datum(server: Server, asked: GenerateRequest, request: Request, file: bytes) -> dict[str, Any]:
    if asked.response_format == "b64_json":
        return {"b64_json": base64_of(file)}
    return {"url": f"{request.base_url}images/{server.store.put(file, asked.output_format)}"}


async def _left(request: Request) -> None:
    """Returns when the sender has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _too_late(deadline: float) -> ApiError:
    return ApiError(504, f"not ready within {deadline:g} s", "server_error", code="deadline_exceeded")


def _model(server: Server, painter: Painter) -> dict[str, Any]:
    twin = painter.name + FULL_PRECISION
    about = {"id": painter.name, "object": "model", "created": server.created, "owned_by": "accuquant"}
    return about | painter.facts() | {"twin": twin if twin in server.painters else None}


def _page() -> tuple[str, str]:
    """The page, and the policy that lets nothing run or load in it but its own script and this server's answers."""
    text = resources.files(__package__).joinpath("page.html").read_text()
    found = re.search(r"<script>(.*?)</script>", text, re.DOTALL)
    assert found is not None
    digest = base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src 'self' data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text, policy
