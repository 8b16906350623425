"""`accuquant-sample BUNDLE`: run the full sampling loop on this machine's integer kernels and save the pictures."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from .bundle import Bundle, NetworkName
from .conditions import read_conditions
from .console import bar, command, console, machine_facts
from .engines.base import Rest
from .errors import AccuQuantError
from .files import atomic
from .pictures import grid
from .pipeline import Pipeline
from .plan import SamplingPlan


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
    threads: Annotated[int, typer.Option(min=0, help="0: all cores; of a worker of Ray, one.")] = 0,
    ray: Annotated[
        int,
        typer.Option(min=0, help="Sample on so many workers of Ray, here or on the cluster that RAY_ADDRESS names."),
    ] = 0,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Sample pictures from a bundle. Needs no torch."""
    if out.suffix not in {".png", ".npy", ""}:
        raise AccuQuantError(f"--out {out}: write .png (one grid), .npy (raw latents) or a folder name")
    opened = Bundle(bundle)
    network: NetworkName = "twin" if fp else "denoiser"
    other = SamplingPlan.load(plan) if plan else None
    opening: dict[str, Any] = {
        "network": network, "engine": engine, "batch": min(batch, n), "threads": threads, "rest": rest,
        "guidance": guidance, "plan": other,
    }  # fmt: skip
    wishes: dict[str, Sequence[Any]] = {"seeds": range(seed, seed + n)}
    if classes:
        wishes["classes"] = _classes(classes, n)
    if prompt:
        wishes["prompts"] = [prompt[i % len(prompt)] for i in range(n)]
    if negative:
        wishes["unwanted"] = [negative] * n
    given = read_conditions(opened, conditions) if conditions else None
    manifest = opened.manifest
    precision = rest if fp else manifest.scheme + ("" if rest == "float32" else f" with {rest}")
    sampler, calls = (other.sampler, len(other)) if other else (manifest.sampler, len(opened.plan))
    said = f"{precision}, {sampler}, {calls} network calls"
    latents = out.suffix == ".npy"
    with ExitStack() as held:
        if ray:
            console.print(f"{said}, on {ray} workers of Ray")
            if given is not None:
                wishes["rows"] = [i % len(given) for i in range(n)]
            painted = _on_ray(opened, opening | {"conditions": conditions}, wishes, latents, ray)
        else:
            pipeline = held.enter_context(Pipeline(opened, **opening))
            console.print(f"{said}, on {pipeline.engine.name}")
            painted = _here(pipeline, wishes, latents, None if given is None else given.of(range(n)))
        begun = time.perf_counter()
        _save(painted, out, seed)
        seconds = time.perf_counter() - begun
    facts = machine_facts()
    console.print(
        f"{n} pictures, seeds {seed}..{seed + n - 1}, in {seconds:.1f} s "
        f"({seconds / n * 1e3:.0f} ms each; {facts['cpu']}, {facts['cores']} cores): {out}"
    )


def _here(
    pipeline: Pipeline, wishes: dict[str, Sequence[Any]], latents: bool, rows: dict[str, np.ndarray] | None
) -> Iterator[np.ndarray]:
    """Latents or pictures from a pipeline in this process."""
    steps, chunks = len(pipeline.plan), -(-len(wishes["seeds"]) // pipeline.batch)
    with bar() as show:

        def on_step(first: int, done: int, _: np.ndarray) -> None:
            show("sampling", first // pipeline.batch * steps + done, chunks * steps, "")

        made = pipeline.generate(on_step=on_step, rows=rows, **wishes)  # type: ignore[arg-type]
    yield made if latents else pipeline.pictures(made)


def _on_ray(
    bundle: Bundle, opening: dict[str, Any], wishes: dict[str, Sequence[Any]], latents: bool, workers: int
) -> Iterator[np.ndarray]:
    """The same from workers, batch by batch."""
    from .serve.on_ray import Opening, sample

    asked = Opening(bundle.folder, **opening | {"threads": opening["threads"] or 1})
    done, n = 0, len(wishes["seeds"])
    with bar() as show:
        for batch in sample(asked, wishes, workers, decoded=not latents):
            yield batch
            done += len(batch)
            show("sampling", done, n, "")


def _save(painted: Iterator[np.ndarray], out: Path, seed: int) -> None:
    """Files of a folder as the pictures come, a grid or an array from all of them."""
    if out.suffix == "":
        for batch in painted:
            for picture in batch:
                with atomic(out / f"{seed:08d}.png") as part:
                    grid(picture[None], scale=1, gap=0).save(part, format="PNG")
                seed += 1
        return
    made = np.concatenate(list(painted))
    with atomic(out) as part:
        if out.suffix == ".npy":
            with part.open("wb") as file:
                np.save(file, made)
        else:
            grid(made).save(part, format="PNG")


def _classes(text: str, n: int) -> list[int]:
    """One class for each of n pictures, in turn."""
    try:
        named = [int(part) for part in text.split(",")]
    except ValueError:
        raise AccuQuantError(f"--class {text!r}: write whole numbers separated by commas, such as 207,360") from None
    return [named[i % len(named)] for i in range(n)]


main = command(sample)
