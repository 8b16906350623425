"""`accuquant-bench BUNDLE`: how fast the int engine is beside its fp twin, how much memory each takes, and where.

Medians and the 10th to 90th percentile, with n; a table here, everything in a JSON, step times in a plot beside it.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from .benchmark import PROFILED, measure, sides_of, slower
from .bundle import Bundle
from .chart import Bar, bars
from .console import bar, command, console, machine_facts
from .engines.base import EngineOptions
from .errors import AccuQuantError
from .files import write_text
from .peers import beside, parse_peer

SHOWN = 5  # operators that integers make slower


def bench(
    bundle: Annotated[Path, typer.Argument(help="Folder written by accuquant-export.")],
    batch: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1,8",
    repeats: Annotated[int, typer.Option(min=3, help="Timed steps per side and batch size.")] = 100,
    samples: Annotated[int, typer.Option(min=1, help="Timed whole sampling runs per side and batch size.")] = 3,
    threads: Annotated[int, typer.Option(min=0, help="0: all cores.")] = 0,
    engine: Annotated[str, typer.Option(help="auto, openvino or onnxruntime; the same for both sides.")] = "auto",
    compare: Annotated[
        list[str], typer.Option(help="NAME=GRAPH[@ENGINE]: another quantizer's graph of this network; can be repeated.")
    ] = [],  # noqa: B006
    out: Annotated[Path, typer.Option(help="Where the JSON goes, and the plot beside it.")] = Path("bench.json"),
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Measure step latency, whole runs, memory and operators of the fp twin and the int engine, side by side."""
    sizes = batch_sizes(batch)
    opened = Bundle(bundle)
    sides, peers = sides_of(opened, engine), dict(map(parse_peer, compare))
    results, compared = [], []
    with bar() as show:
        for size in sizes:

            def progress(done: int, total: int, size: int = size) -> None:
                show(f"batch {size}", done, total, "")

            options = EngineOptions(size, threads)
            results.append(measure(opened, sides, engine, options, repeats, samples, progress))
            if peers:
                compared.append(
                    beside(
                        opened, sides, peers, engine, options, repeats,
                        lambda done, total, size=size: show(f"peers at batch {size}", done, total, ""),  # type: ignore[misc]
                    )
                )  # fmt: skip
    report: dict[str, Any] = {
        "schema_version": 3,
        "scheme": opened.manifest.scheme,
        "sampler": opened.manifest.sampler,
        "network_calls": len(opened.plan),
        "threads": threads or "all",
        "machine": machine_facts(),
        "bytes": {side: opened.weight_bytes(side) for side in ("twin", "denoiser")},
        "results": results,
        **({"peers": compared} if compared else {}),
    }
    write_text(out, json.dumps(report, indent=1) + "\n")
    write_text(out.with_suffix(".svg"), _plot(report))
    console.print(_table(report))
    for row in results:
        console.print(_losses(row))
    for found in compared:
        console.print(peer_table(found))
    facts = report["machine"]
    console.print(
        f"{facts['cpu']}, {facts['cores']} cores, {facts['instructions']}; medians [p10..p90] of {repeats} "
        f"interleaved steps, {samples} sampling runs, peak memory of a process each; written to {out}"
    )


def batch_sizes(text: str) -> list[int]:
    """The numbers of "1,8"; raises AccuQuantError if they are none."""
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
    for column in ("batch", "", "step", "to fp32", "whole run", "to fp32", "pictures/s", "loop", "memory"):
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
                f"+{side['loop_overhead']:.1%}",
                f"{side['peak_bytes'] / 2**20:.0f} MiB",
                end_section=n == len(row["sides"]) - 1,
            )
    return table


def peer_table(found: dict[str, Any]) -> Table:
    """Steps of all that were measured in one run by `beside`, the fastest first."""
    table = Table(title=f"one step at batch {found['batch']}, all in turn")
    by = found["by"]
    for column in ("", "engine", "step", f"to {found['to']}", f"{by} saves of it"):
        table.add_column(column, justify="left" if column in ("", "engine") else "right")
    measured = {name: row for name, row in found["rows"].items() if "failed" not in row}
    for name, row in sorted(measured.items(), key=lambda item: item[1]["step_seconds"]["median"]):
        step, saves = row["step_seconds"], row["saves"]
        told = "" if name == by else "too few repeats" if saves is None else _share(saves)
        table.add_row(
            Text(name, style="bold") if row["ours"] else name,
            row["engine"],
            f"{step['median'] * 1e3:.2f} ms [{step['p10'] * 1e3:.2f}..{step['p90'] * 1e3:.2f}]",
            f"{row['step_speedup']:.2f}x",
            told,
        )
    for name, row in found["rows"].items():
        if "failed" in row:
            table.add_row(name, row["failed"])
    return table


def _share(saves: dict[str, float]) -> str:
    return f"{saves['median']:+.0%} ({saves['low']:+.0%} to {saves['high']:+.0%})"


def _losses(row: dict[str, Any]) -> str:
    """Where integers lose to fp32 at this batch size, in a sentence."""
    sides = row["sides"]
    low = next(name for name in sides if name.endswith("fp32 rest"))
    lost = slower(sides, "fp32", low)
    count = len(sides[low]["profile"]["operators"])
    said = f"batch {row['batch']}: {len(lost)} of {count} operators take longer than in fp32"
    if not lost:
        return said
    named = (f"{name} {fp:.0f} -> {ours:.0f}" for name, (fp, ours) in list(lost.items())[:SHOWN])
    total = sum(ours - fp for fp, ours in lost.values())
    return f"{said}, {total:.0f} us together ({', '.join(named)}; medians of {PROFILED} profiled steps)"


def _plot(report: dict[str, Any]) -> str:
    groups = {
        f"batch {row['batch']}": [
            Bar(name, *(1e3 * side["step_seconds"][part] for part in ("median", "p10", "p90")))
            for name, side in row["sides"].items()
        ]
        for row in report["results"]
    }
    facts, n = report["machine"], report["results"][0]["sides"]["fp32"]["step_seconds"]["n"]
    return bars(
        groups,
        title=f"{report['scheme']}: one network call",
        caption=f"{facts['cpu']}, {facts['cores']} cores; medians, 10th to 90th percentile, n = {n}",
        unit="ms",
    )


main = command(bench)
