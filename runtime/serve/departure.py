"""Connections on which nobody reads what is written are cut off.

uvicorn waits without end for a reader: a stream at its next event, a connection that is over at its last byte, since
closing sends first what was written. Every write has a time of its own, until the system has taken all of it, and a
reader who takes a little now and then does not prolong it.
"""

import asyncio
from collections.abc import Callable

from uvicorn.protocols.http.h11_impl import H11Protocol


class ReadProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, with `reading_seconds` for every write; `on_unread()` is called when one was not taken."""

    reading_seconds: float
    on_unread: Callable[[], None]
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        transport.set_write_buffer_limits(high=0)  # otherwise we would not hear of the last 64 KiB
        super().connection_made(transport)

    def pause_writing(self) -> None:
        self._unread = self.loop.call_later(self.reading_seconds, self._cut_off)
        super().pause_writing()

    def resume_writing(self) -> None:
        self._was_read()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._was_read()
        super().connection_lost(exc)

    def _was_read(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _cut_off(self) -> None:
        self.on_unread()
        self.transport.abort()  # closing would wait for the reader again
