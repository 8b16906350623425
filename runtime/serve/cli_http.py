"""`accuquant-serve http BUNDLE...`: bundles behind the OpenAI images API, with a page to try them."""

import importlib.util
import os
from pathlib import Path
from typing import Annotated

import typer

from ..bundle import Bundle, NetworkName
from ..console import console
from ..errors import AccuQuantError
from .painter import Painter

API_KEY = "ACCUQUANT_API_KEY"
LOOPBACK = ("127.0.0.1", "::1", "localhost")

# Options of every command that serves over HTTP.
Host = Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every one.")]
Twin = Annotated[bool, typer.Option("--twin", help="Serve full-precision twins too, as NAME:fp.")]
EngineName = Annotated[str, typer.Option(help="auto, openvino or onnxruntime.")]
Batch = Annotated[int, typer.Option(min=1, help="Pictures in one call; a lone one costs as much as all.")]
Guidance = Annotated[
    float | None, typer.Option(help="Usual guidance; other than 1, requests may choose [the bundle's].")
]
Queue = Annotated[int, typer.Option(min=1, help="Most pictures waiting for an engine; more get 429.")]
Deadline = Annotated[float, typer.Option(min=0.1, help="Most seconds that a request may take.")]
Sending = Annotated[
    float, typer.Option(min=0.1, help="Most seconds that a request's head may take to arrive, and as many its body.")
]
Reading = Annotated[
    float, typer.Option(min=0.1, help="Most seconds that an answer, or an event of a stream, may wait to be read.")
]
MostPictures = Annotated[int, typer.Option(min=1, help="Most pictures of one request.")]


def http(
    bundles: Annotated[
        list[Path], typer.Argument(help="Folders written by accuquant-export; models have their names.")
    ],
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8000,
    twin: Twin = False,
    engine: EngineName = "auto",
    batch: Batch = 4,
    threads: Annotated[int, typer.Option(min=0, help="Of each engine; 0: all cores.")] = 0,
    guidance: Guidance = None,
    queue: Queue = 64,
    deadline: Deadline = 60.0,
    sending: Sending = 10.0,
    reading: Reading = 60.0,
    max_n: MostPictures = 10,
    max_body: Annotated[int, typer.Option(min=1, help="Most KiB of a request's body.")] = 64,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Serve bundles over HTTP. With ACCUQUANT_API_KEY set, requests must carry that key."""
    installed("serve", "fastapi", "uvicorn", "prometheus_client")
    from .listen import listen
    from .server import Limits, Server

    networks: tuple[NetworkName, ...] = ("denoiser", "twin") if twin else ("denoiser",)
    opened = [
        Painter(bundle, network, engine=engine, batch=batch, threads=threads, guidance=guidance)
        for bundle in map(Bundle, bundles)
        for network in networks
    ]
    key = os.environ.get(API_KEY) or None
    limits = Limits(
        waiting=queue, deadline=deadline, pictures=max_n, body_bytes=max_body * 2**10,
        sending_seconds=sending, reading_seconds=reading,
    )  # fmt: skip

    def listening(address: str) -> None:
        for painter in opened:
            console.print(
                f"{painter.name}  {painter.precision}, {painter.size}, {painter.steps} steps, takes {painter.takes}, "
                f"batch {batch}, on {painter.pipeline.engine.name}"
            )
        if host not in LOOPBACK and key is None:
            console.print(f"anyone who reaches {host} may use it: set {API_KEY} to ask for a key")
        console.print(f"listening on {address} (a page to try it; the API is {address}/v1)")

    listen(Server(opened, limits), host, port, key, listening)
    console.print("stopped: all that was accepted is answered")


def installed(extra: str, *names: str) -> None:
    """Raises AccuQuantError naming the first library that is missing, and the extra that brings it."""
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        raise AccuQuantError(f"{missing[0]} is not installed; install it with: pip install 'accuquant[{extra}]'")
