"""Connections on which the head of a request does not arrive in time are closed.

uvicorn waits without end for a head that was begun, or for the first of a connection; between requests alone it closes,
after its keep-alive. The time runs from the connection for the first head, from its first byte for later ones, and
bytes that trickle in do not prolong it. Bodies have as long again, which `Gate` sees to.
"""

import asyncio
import json

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .api import ApiError


class TimelyProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, with `sending_seconds` for a head: 408 for who began one, no word for who never did."""

    sending_seconds: float
    _late: asyncio.TimerHandle | None = None
    _begun = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        if self._is_between_requests:
            self._begun = True
            if self._late is None:
                self._await_head()
        super().data_received(data)

    def handle_events(self) -> None:
        super().handle_events()
        if not self._is_between_requests:
            self._head_is_done()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_is_done()
        super().connection_lost(exc)

    @property
    def _is_between_requests(self) -> bool:
        return self.conn.their_state is h11.IDLE

    def _await_head(self) -> None:
        self._late = self.loop.call_later(self.sending_seconds, self._close)

    def _head_is_done(self) -> None:
        if self._late is not None:
            self._late.cancel()
        self._late, self._begun = None, False

    def _close(self) -> None:
        if self.transport.is_closing():
            return
        if self._begun:
            late = ApiError(408, f"the head did not arrive within {self.sending_seconds:g} s", code="head_timeout")
            body = json.dumps(late.body).encode()
            headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
            for event in (
                h11.Response(status_code=late.status, headers=list(headers.items()), reason=b"Request Timeout"),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
