"""`accuquant-bench BUNDLE`: the fp twin and the int engine, measured against each other in one run.

Steps of both are interleaved, so that whatever else the machine does falls on both alike; a ratio is printed only
because both sides were measured in the same run. Medians and the 10th to 90th percentile, with n.
"""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table

from . import noise
from .bundle import Bundle, NetworkName
from .console import bar, command, console, machine_facts
from .errors import AccuQuantError
from .files import write_text
from .pipeline import Pipeline

SIDES: tuple[NetworkName, NetworkName] = ("twin", "denoiser")


def bench(
    bundle: Annotated[Path, typer.Argument(help="Folder written by accuquant-export.")],
    batch: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1,8",
    repeats: Annotated[int, typer.Option(min=3, help="Timed steps per side and batch size.")] = 100,
    samples: Annotated[int, typer.Option(min=1, help="Timed whole sampling runs per side and batch size.")] = 3,
    threads: Annotated[int, typer.Option(min=0, help="0: all cores.")] = 0,
    engine: Annotated[str, typer.Option(help="auto, openvino or onnxruntime; the same for both sides.")] = "auto",
    out: Annotated[Path, typer.Option(help="Where the JSON goes.")] = Path("bench.json"),
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Measure step latency and whole-sample time of fp32 and int8, interleaved."""
    sizes = _sizes(batch)
    opened = Bundle(bundle)
    results = []
    with bar() as show:
        for size in sizes:
            results.append(
                measure(
                    opened, size, repeats, samples, threads, engine, lambda d, t, s=size: show(f"batch {s}", d, t, "")
                )
            )
    report = {
        "schema_version": 1,
        "scheme": opened.manifest.scheme,
        "sampler": opened.manifest.sampler,
        "network_calls": len(opened.plan),
        "threads": threads or "all",
        "machine": machine_facts(),
        "bytes": {side: opened.weight_bytes(side) for side in SIDES},
        "results": results,
    }
    write_text(out, json.dumps(report, indent=1) + "\n")
    console.print(_table(report))
    facts = report["machine"]
    console.print(
        f"{facts['cpu']}, {facts['cores']} cores, {facts['instructions']}; medians \\[p10..p90] of {repeats} "  # type: ignore[index]
        f"interleaved steps, {samples} sampling runs; written to {out}"
    )


def measure(
    bundle: Bundle, batch: int, repeats: int, samples: int, threads: int, engine: str, progress: Any
) -> dict[str, Any]:
    """Seconds per network step and per sampling run of both sides at one batch size, and the loop's own share."""
    pipelines = {side: Pipeline(bundle, network=side, engine=engine, batch=batch, threads=threads) for side in SIDES}
    try:
        x = noise.batch(range(batch), -1, bundle.manifest.sample_shape)
        t = np.full(batch, bundle.plan.steps[0].timestep, np.float32)
        steps: dict[str, list[float]] = {side: [] for side in SIDES}
        runs: dict[str, list[float]] = {side: [] for side in SIDES}
        warm_up, total = 10, 10 + repeats + samples
        for i in range(warm_up + repeats):
            for side in _alternating(i):
                begun = time.perf_counter()
                pipelines[side].engine.run({"x": x, "t": t})
                if i >= warm_up:
                    steps[side].append(time.perf_counter() - begun)
            progress(i + 1, total)
        for i in range(samples):
            for side in _alternating(i):
                begun = time.perf_counter()
                pipelines[side].generate(range(batch))
                runs[side].append(time.perf_counter() - begun)
            progress(warm_up + repeats + i + 1, total)
        return {
            "batch": batch,
            "engine": pipelines["denoiser"].engine.name,
            "step_seconds": {side: _spread(v) for side, v in steps.items()},
            "sample_seconds": {side: _spread(v) for side, v in runs.items()},
            "step_speedup": float(np.median(steps["twin"]) / np.median(steps["denoiser"])),
            "sample_speedup": float(np.median(runs["twin"]) / np.median(runs["denoiser"])),
        }
    finally:
        for pipeline in pipelines.values():
            pipeline.close()


def _alternating(i: int) -> tuple[NetworkName, ...]:
    """Who goes first changes every time, so that neither always finds the other's caches."""
    return SIDES if i % 2 == 0 else SIDES[::-1]


def _spread(seconds: list[float]) -> dict[str, float]:
    p10, median, p90 = np.percentile(seconds, [10, 50, 90])
    return {"median": float(median), "p10": float(p10), "p90": float(p90), "n": len(seconds)}


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise AccuQuantError(f"--batch {text!r}: write positive whole numbers separated by commas, such as 1,8")
    return sizes


def _table(report: dict[str, Any]) -> Table:
    table = Table(
        title=f"{report['scheme']} against fp32, {report['sampler']}, {report['network_calls']} network calls"
    )
    for column in ("batch", "fp32 step", "int step", "speed-up", "fp32 run", "int run", "speed-up", "int pictures/s"):
        table.add_column(column, justify="right")
    for row in report["results"]:
        step, run = row["step_seconds"], row["sample_seconds"]

        def spread(v: dict[str, float]) -> str:
            return f"{v['median'] * 1e3:.2f} ms [{v['p10'] * 1e3:.2f}..{v['p90'] * 1e3:.2f}]"

        table.add_row(
            str(row["batch"]),
            spread(step["twin"]),
            spread(step["denoiser"]),
            f"{row['step_speedup']:.2f}x",
            f"{run['twin']['median']:.2f} s",
            f"{run['denoiser']['median']:.2f} s",
            f"{row['sample_speedup']:.2f}x",
            f"{row['batch'] / run['denoiser']['median']:.2f}",
        )
    return table


main = command(bench)
