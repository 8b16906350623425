"""`accuquant-serve triton BUNDLE --out REPOSITORY`: a bundle as models that Triton Inference Server loads."""

import re
from pathlib import Path
from typing import Annotated

import typer

from ..bundle import Bundle
from ..console import console
from ..errors import AccuQuantError
from .triton import Serving, write_repository


def triton(
    bundle: Annotated[Path, typer.Argument(help="Folder written by accuquant-export.")],
    out: Annotated[Path, typer.Option(help="Model repository; a model that is there gets its next version.")],
    name: Annotated[str, typer.Option(help="The model's name [the bundle's].")] = "",
    batch: Annotated[int, typer.Option(min=1, help="Pictures of one call; every call computes as many.")] = 8,
    instances: Annotated[int, typer.Option(min=1, help="Processes that sample at once, on GPUs: on each.")] = 1,
    delay_ms: Annotated[float, typer.Option(min=0, help="How long a request waits for others to join it.")] = 10.0,
    queue: Annotated[int, typer.Option(min=1, help="Waiting requests; more are refused.")] = 64,
    deadline: Annotated[float, typer.Option(min=0.1, help="Seconds a request may wait before it is refused.")] = 60.0,
    guidance: Annotated[
        float | None, typer.Option(help="Where a request names none; 1: none can be had [the bundle's].")
    ] = None,
    previews: Annotated[
        int, typer.Option(min=0, help="Add a model that streams what the network sees every so many steps; 0: none.")
    ] = 0,
    denoiser: Annotated[bool, typer.Option("--denoiser", help="Add the network alone, for ONNX Runtime.")] = False,
    plan: Annotated[
        list[str],
        typer.Option("--plan", help="Add the network alone, for TensorRT: 8.9=FILE, one of every compute capability."),
    ] = [],  # noqa: B006
    engine: Annotated[str, typer.Option(help="auto, or one of those that accuquant-doctor lists.")] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="Of each process; 0: all cores.")] = 0,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Write a model repository for Triton. The server's Python needs accuquant with an engine."""
    opened = Bundle(bundle)
    serving = Serving(
        name=name or bundle.resolve().name, batch=batch, instances=instances, delay=delay_ms / 1e3, queue=queue,
        deadline=deadline, threads=threads, engine=engine, guidance=guidance, previews=previews, denoiser=denoiser,
        plans=_plans(plan),
    )  # fmt: skip
    for version in write_repository(opened, out, serving):
        console.print(f"{version.parent.name}, version {version.name}")
    console.print(f"serve it with: tritonserver --model-repository={out.resolve()}")


def _plans(options: list[str]) -> dict[str, Path]:
    plans = {}
    for option in options:
        capability, _, path = option.partition("=")
        if not re.fullmatch(r"\d+\.\d", capability) or not path:
            raise AccuQuantError(f"--plan {option}: write a GPU's compute capability and a file, as in --plan 8.9=FILE")
        plans[capability] = Path(path)
    return plans
