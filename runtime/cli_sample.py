"""`accuquant-sample BUNDLE`: run the full sampling loop on this machine's integer kernels and save the pictures."""

import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from .bundle import Bundle, ByRows, NetworkName
from .console import bar, command, console, machine_facts
from .engines.base import Rest
from .errors import AccuQuantError
from .files import atomic
from .pictures import grid
from .pipeline import Pipeline
from .plan import SamplingPlan
from .rows import read_rows


def sample(
    bundle: Annotated[Path, typer.Argument(help="Folder written by accuquant-export.")],
    n: Annotated[int, typer.Option("-n", "--number", min=1, help="How many pictures.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first picture; the next ones count up.")] = 0,
    out: Annotated[Path, typer.Option(help="A .png for one grid, a .npy for raw latents, or a folder.")] = Path(
        "grid.png"
    ),
    fp: Annotated[bool, typer.Option("--fp", help="Run the full-precision twin instead.")] = False,
    classes: Annotated[
        str, typer.Option("--class", help="Of class-conditional models: one, or several with commas, in turn [all].")
    ] = "",
    prompt: Annotated[
        list[str], typer.Option("--prompt", help="Of text-to-image models; several are taken in turn [its examples].")
    ] = [],  # noqa: B006
    negative: Annotated[str, typer.Option("--negative-prompt", help="What guidance leads away from.")] = "",
    conditions: Annotated[
        Path | None,
        typer.Option(help="Of models without a text encoder: a file of embeddings, taken in turn [its examples]."),
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Classifier-free guidance; 1 is none [what the bundle was calibrated for].")
    ] = None,
    engine: Annotated[str, typer.Option(help="auto, openvino or onnxruntime.")] = "auto",
    rest: Annotated[Rest, typer.Option(help="What is not integer; bfloat16 where the CPU has it.")] = "float32",
    batch: Annotated[int, typer.Option(min=1)] = 8,
    plan: Annotated[Path | None, typer.Option(help="Another plan.json than the bundle's own.")] = None,
    threads: Annotated[int, typer.Option(min=0, help="0: all cores.")] = 0,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Sample pictures from a bundle. Needs no torch."""
    if out.suffix not in {".png", ".npy", ""}:
        raise AccuQuantError(f"--out {out}: write .png (one grid), .npy (raw latents) or a folder name")
    opened = Bundle(bundle)
    network: NetworkName = "twin" if fp else "denoiser"
    size = min(batch, n)
    other = SamplingPlan.load(plan) if plan else None
    wanted, rows = _classes(classes, n), _rows(opened, conditions, n)
    texts = [prompt[i % len(prompt)] for i in range(n)] if prompt else None
    with Pipeline(
        opened, network=network, engine=engine, batch=size, threads=threads, rest=rest, plan=other, guidance=guidance
    ) as pipeline:
        manifest, steps = opened.manifest, len(pipeline.plan)
        precision = rest if fp else manifest.scheme + ("" if rest == "float32" else f" with {rest}")
        sampler = other.sampler if other else manifest.sampler
        console.print(f"{precision}, {sampler}, {steps} network calls, on {pipeline.engine.name}")
        begun = time.perf_counter()
        with bar() as show:

            def on_step(first: int, done: int, _: np.ndarray) -> None:
                chunks = -(-n // pipeline.batch)
                show("sampling", first // pipeline.batch * steps + done, chunks * steps, "")

            latents = pipeline.generate(
                range(seed, seed + n), on_step, classes=wanted, prompts=texts, rows=rows, unwanted=negative
            )
        if out.suffix != ".npy":
            pictures = pipeline.pictures(latents)
        seconds = time.perf_counter() - begun
    if out.suffix == ".npy":
        with atomic(out) as part, part.open("wb") as file:
            np.save(file, latents)
    elif out.suffix == ".png":
        with atomic(out) as part:
            grid(pictures).save(part, format="PNG")
    else:
        for s, picture in zip(range(seed, seed + n), pictures, strict=True):
            with atomic(out / f"{s:08d}.png") as part:
                grid(picture[None], scale=1, gap=0).save(part, format="PNG")
    facts = machine_facts()
    console.print(
        f"{n} pictures, seeds {seed}..{seed + n - 1}, in {seconds:.1f} s "
        f"({seconds / n * 1e3:.0f} ms each; {facts['cpu']}, {facts['cores']} cores): {out}"
    )


def _classes(text: str, n: int) -> list[int] | None:
    """One class for each of n pictures, in turn; None if none was named."""
    if not text:
        return None
    try:
        named = [int(part) for part in text.split(",")]
    except ValueError:
        raise AccuQuantError(f"--class {text!r}: write whole numbers separated by commas, such as 207,360") from None
    return [named[i % len(named)] for i in range(n)]


def _rows(bundle: Bundle, path: Path | None, n: int) -> dict[str, np.ndarray] | None:
    """The rows of a file for n pictures, in turn; None if no file was named."""
    if path is None:
        return None
    known = bundle.manifest.conditioning
    if not isinstance(known, ByRows):
        raise AccuQuantError(f"--conditions {path}: the network takes no rows of a file; leave it out")
    return read_rows(path, known).of(range(n))


main = command(sample)
