"""`accuquant-serve ray BUNDLE...`: the HTTP server in replicas, on this machine or on a cluster of Ray."""

import importlib.util
import os
import signal
import threading
from pathlib import Path
from typing import Annotated

import typer

from ..console import console
from ..errors import AccuQuantError
from .cli_http import API_KEY


def ray(
    bundles: Annotated[list[Path], typer.Argument(help="Folders that all machines see; models have their names.")],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every one.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    least: Annotated[int, typer.Option(min=1, help="Replicas there are always.")] = 1,
    most: Annotated[int, typer.Option(min=1, help="Replicas there are under load.")] = 2,
    twin: Annotated[bool, typer.Option("--twin", help="Serve full-precision twins too, as NAME:fp.")] = False,
    engine: Annotated[str, typer.Option(help="auto, openvino or onnxruntime.")] = "auto",
    batch: Annotated[int, typer.Option(min=1, help="Pictures in one call; a lone one costs as much as all.")] = 4,
    threads: Annotated[int, typer.Option(min=1, help="Of each engine, and cores that a replica takes.")] = 1,
    guidance: Annotated[
        float | None, typer.Option(help="Usual guidance; other than 1, requests may choose [the bundle's].")
    ] = None,
    queue: Annotated[int, typer.Option(min=1, help="Most pictures waiting for an engine; more get 429.")] = 64,
    deadline: Annotated[float, typer.Option(min=0.1, help="Most seconds that a request may take.")] = 60.0,
    max_n: Annotated[int, typer.Option(min=1, help="Most pictures of one request.")] = 10,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Serve bundles by replicas of the HTTP server, on Ray. RAY_ADDRESS names a cluster, ACCUQUANT_API_KEY a key."""
    if importlib.util.find_spec("ray") is None:
        raise AccuQuantError("Ray Serve is not installed; install it with: pip install 'accuquant[ray]'")
    from .ray_serve import Serving, start, stop
    from .server import Limits

    serving = Serving(
        bundles, least, most, ("denoiser", "twin") if twin else ("denoiser",), engine, batch, threads, guidance,
        Limits(waiting=queue, deadline=deadline, pictures=max_n), os.environ.get(API_KEY) or None,
    )  # fmt: skip
    start(serving, host, port)
    told = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):  # which Ray took for itself while it started
        signal.signal(number, lambda *_: told.set())
    console.print(f"listening on http://{host}:{port} (the API is /v1; {least} to {most} replicas)")
    while not told.wait(1.0):  # a wait without end would keep signals from being heard
        pass
    stop()
    console.print("stopped: all that was accepted is answered")
