"""The server's life: listen, serve, and on SIGTERM or Ctrl-C drain and end.

While it drains it still listens, and answers new requests with 503, so that a balancer hears why and asks elsewhere.
"""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn

from ..errors import AccuQuantError
from .app import application
from .arrival import TimelyProtocol
from .departure import ReadProtocol
from .server import Server

LAST_BYTES = 10  # seconds that slow readers have to take their answers, once everything is painted


class _Uvicorn(uvicorn.Server):
    """Leaves signals to `listen`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen(server: Server, host: str, port: int, api_key: str | None, listening: Callable[[str], None]) -> None:
    """Serve until SIGTERM or Ctrl-C, then finish what was accepted; a second signal ends it at once.

    `listening(address)` is called once, when every engine has painted a first picture.

    Raises:
        AccuQuantError: the address cannot be listened on, or an engine does not paint.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise AccuQuantError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --port"
        ) from None
    with listener:
        asyncio.run(_until_signalled(server, listener, api_key, listening))


async def serve(
    server: Server, listener: socket.socket, api_key: str | None, listening: Callable[[str], None], told: asyncio.Event
) -> None:
    """Serve on `listener` until `told` is set, then drain and return."""

    class Http(TimelyProtocol, ReadProtocol):  # uvicorn takes a class, without arguments of ours
        sending_seconds, reading_seconds = server.limits.sending_seconds, server.limits.reading_seconds
        on_unread = server.metrics.unread.inc

    await server.warm_up()
    config = uvicorn.Config(
        application(server, api_key), http=Http, log_level="warning", access_log=False, server_header=False,
        lifespan="off", timeout_graceful_shutdown=LAST_BYTES,
    )  # fmt: skip
    http = _Uvicorn(config)
    serving, waiting = asyncio.create_task(http.serve(sockets=[listener])), asyncio.create_task(told.wait())
    name, port = listener.getsockname()[:2]
    listening(f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}")
    await asyncio.wait({serving, waiting}, return_when=asyncio.FIRST_COMPLETED)
    await server.drain()
    http.should_exit = True
    await serving


async def _until_signalled(
    server: Server, listener: socket.socket, api_key: str | None, listening: Callable[[str], None]
) -> None:
    told, loop = asyncio.Event(), asyncio.get_running_loop()

    def stop(*_: object) -> None:
        if told.is_set():
            raise KeyboardInterrupt
        loop.call_soon_threadsafe(told.set)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        await serve(server, listener, api_key, listening, told)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
