"""`accuquant-serve ray BUNDLE...`: the HTTP server in replicas, on this machine or on a cluster of Ray."""

import os
import signal
import threading
from pathlib import Path
from typing import Annotated

import typer

from ..console import console
from .cli_http import API_KEY, Batch, Deadline, EngineName, Guidance, Host, MostPictures, Queue, Twin, installed


def ray(
    bundles: Annotated[list[Path], typer.Argument(help="Folders that all machines see; models have their names.")],
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    least: Annotated[int, typer.Option(min=1, help="Replicas there are always.")] = 1,
    most: Annotated[int, typer.Option(min=1, help="Replicas there are under load.")] = 2,
    twin: Twin = False,
    engine: EngineName = "auto",
    batch: Batch = 4,
    threads: Annotated[int, typer.Option(min=1, help="Of each engine, and cores that a replica takes.")] = 1,
    guidance: Guidance = None,
    queue: Queue = 64,
    deadline: Deadline = 60.0,
    max_n: MostPictures = 10,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Serve bundles by replicas of the HTTP server, on Ray. RAY_ADDRESS names a cluster, ACCUQUANT_API_KEY a key."""
    installed("ray", "ray", "fastapi", "prometheus_client")
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
