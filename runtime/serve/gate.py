"""What every request passes first: the API key, the size of its body, and the time that its body may take to arrive.

Plain ASGI, before anything is parsed: who has no key sends no body, and bodies are whole before they cost more than
their bytes.
"""

import asyncio
import hmac
import json

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .api import ApiError

BEHIND_KEY = "/v1/"


class Gate:
    """Refuses requests below /v1/ without the key, bodies of more than `most_bytes`, or of more than `seconds`."""

    def __init__(self, app: ASGIApp, *, api_key: str | None, most_bytes: int, seconds: float) -> None:
        self._app, self._most, self._seconds = app, most_bytes, seconds
        self._key = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            headers = dict(scope["headers"])
            self._check_key(scope["path"], headers)
            if scope["method"] == "POST" and not headers.get(b"content-type", b"").startswith(b"application/json"):
                # Other kinds a browser sends for any page that asks it to, without asking us first.
                raise ApiError(415, "send JSON, with Content-Type: application/json", code="no_json")
            body = await self._body(headers, receive)
        except ApiError as error:
            await _answer(error, send)
            return
        if body is None:
            return
        first = True

        async def replay() -> Message:
            nonlocal first
            if first:
                first = False
                return {"type": "http.request", "body": body, "more_body": False}
            return await receive()

        await self._app(scope, replay, send)

    def _check_key(self, path: str, headers: dict[bytes, bytes]) -> None:
        if self._key is None or not path.startswith(BEHIND_KEY):
            return
        if not hmac.compare_digest(headers.get(b"authorization", b""), self._key):
            raise ApiError(
                401, "wrong or missing API key; send it as Authorization: Bearer KEY", code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes | None:
        """The whole body; None if the sender left meanwhile."""
        promised = headers.get(b"content-length", b"0")
        if promised.isdigit() and int(promised[:20]) > self._most:
            raise self._too_large()
        body = bytearray()
        try:
            async with asyncio.timeout(self._seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > self._most:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {self._seconds:g} s", code="body_timeout") from None

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self._most} bytes", code="body_too_large")


async def _answer(error: ApiError, send: Send) -> None:
    body = json.dumps(error.body).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
    headers |= {name.lower(): value for name, value in error.headers.items()}
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
