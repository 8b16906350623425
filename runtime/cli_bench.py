"""`accuquant-bench BUNDLE`: the fp twin and the int engine, measured against each other in one run.

Where the machine computes in bfloat16, both are measured in it too: that is the speed-up that integers have to beat.
Steps of all sides are interleaved, so that whatever else the machine does falls on all alike; a ratio is printed only
because its sides were measured in the same run. Medians and the 10th to 90th percentile, with n.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
from rich.table import Table

from . import noise
from .bundle import Bundle, NetworkName
from .console import bar, command, console, machine_facts
from .engines import rests
from .engines.base import Rest
from .errors import AccuQuantError
from .files import write_text
from .pipeline import Pipeline


class Side(NamedTuple):
    """One of the things compared: a network of the bundle and what it computes in besides integers."""

    name: str
    network: NetworkName
    rest: Rest


def sides_of(bundle: Bundle, engine: str) -> list[Side]:
    """fp32 first, that all others are compared with."""
    short = {"float32": "fp32", "bfloat16": "bf16"}
    known = rests(engine, bundle.manifest.target)
    twins = [Side(short[rest], "twin", rest) for rest in known]
    scheme = bundle.manifest.scheme
    return [*twins, *(Side(f"{scheme}, {short[rest]} rest", "denoiser", rest) for rest in known)]


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
    """Measure step latency and whole-sample time of the fp twin and the int engine, interleaved."""
    sizes = _sizes(batch)
    opened = Bundle(bundle)
    sides = sides_of(opened, engine)
    results = []
    with bar() as show:
        for size in sizes:

            def progress(done: int, total: int, size: int = size) -> None:
                show(f"batch {size}", done, total, "")

            results.append(measure(opened, sides, size, repeats, samples, threads, engine, progress))
    report = {
        "schema_version": 2,
        "scheme": opened.manifest.scheme,
        "sampler": opened.manifest.sampler,
        "network_calls": len(opened.plan),
        "threads": threads or "all",
        "machine": machine_facts(),
        "bytes": {side: opened.weight_bytes(side) for side in ("twin", "denoiser")},
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
    bundle: Bundle,
    sides: Sequence[Side],
    batch: int,
    repeats: int,
    samples: int,
    threads: int,
    engine: str,
    progress: Any,
) -> dict[str, Any]:
    """Seconds per network step and per sampling run of every side at one batch size, and ratios to the first."""
    pipelines = {
        s.name: Pipeline(bundle, network=s.network, engine=engine, batch=batch, threads=threads, rest=s.rest)
        for s in sides
    }
    try:
        x = noise.batch(range(batch), -1, bundle.manifest.sample_shape)
        t = np.full(batch, bundle.plan.steps[0].timestep, np.float32)
        steps: dict[str, list[float]] = {name: [] for name in pipelines}
        runs: dict[str, list[float]] = {name: [] for name in pipelines}
        warm_up, total = 10, 10 + repeats + samples
        for i in range(warm_up + repeats):
            for name in _in_turn(list(pipelines), i):
                begun = time.perf_counter()
                pipelines[name].engine.run({"x": x, "t": t})
                if i >= warm_up:
                    steps[name].append(time.perf_counter() - begun)
            progress(i + 1, total)
        for i in range(samples):
            for name in _in_turn(list(pipelines), i):
                begun = time.perf_counter()
                pipelines[name].generate(range(batch))
                runs[name].append(time.perf_counter() - begun)
            progress(warm_up + repeats + i + 1, total)
        first = sides[0].name
        return {
            "batch": batch,
            "engine": pipelines[first].engine.name,
            "sides": {
                name: {
                    "step_seconds": _spread(steps[name]),
                    "sample_seconds": _spread(runs[name]),
                    "step_speedup": float(np.median(steps[first]) / np.median(steps[name])),
                    "sample_speedup": float(np.median(runs[first]) / np.median(runs[name])),
                }
                for name in pipelines
            },
        }
    finally:
        for pipeline in pipelines.values():
            pipeline.close()


def _in_turn(names: list[str], i: int) -> list[str]:
    """Who goes first changes every time, so that no one always finds the same other's caches."""
    turned = i % len(names)
    return names[turned:] + names[:turned]


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
    for column in ("batch", "", "step", "to fp32", "whole run", "to fp32", "pictures/s"):
        table.add_column(column, justify="left" if not column else "right")
    for row in report["results"]:
        for n, (name, side) in enumerate(row["sides"].items()):
            step, run = side["step_seconds"], side["sample_seconds"]
            table.add_row(
                "" if n else str(row["batch"]),
                name,
                f"{step['median'] * 1e3:.2f} ms [{step['p10'] * 1e3:.2f}..{step['p90'] * 1e3:.2f}]",
                f"{side['step_speedup']:.2f}x",
                f"{run['median']:.2f} s",
                f"{side['sample_speedup']:.2f}x",
                f"{row['batch'] / run['median']:.2f}",
                end_section=n == len(row["sides"]) - 1,
            )
    return table


main = command(bench)
