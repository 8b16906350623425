"""Load on a front end of a bundle: what it carries, what it refuses, how long people wait, and its memory.

    python tools/bench_serving.py fashion-w8a8 --seconds 30 --out tools/results/serving.json
    ACCUQUANT_TRITON=PYTHON python tools/bench_serving.py fashion-w8a8 --front triton

Starts `accuquant-serve http BUNDLE`, or Triton with what `accuquant-serve triton` writes, on the loopback and asks it
for single pictures. First in a closed loop: as many clients as fill two batches ask again as soon as they are answered,
or as a refusal allows; its throughput is called capacity. Then in open loops: requests arrive at random (Poisson) at
0.5, 1 and 2 times that rate, whether or not others are answered. Latency counts from the moment a request was due. It
must hold, or the exit code is 1, that every request was answered; that those which got no picture were refused as the
front end promises (front_http.py, front_triton.py); and that the slowest hundredth of the accepted was within the
deadline. The load's own process shares the machine, and so does whatever else runs: the load average stands in the
JSON.

    python tools/bench_serving.py fashion-w8a8 --soak 3600 --out soak.json

keeps the closed loop up for that long instead, and fits a line to the server's memory after the first fifth, in which
allocators and caches fill up: it must hold that nothing was lost and that the line does not rise.
"""

import asyncio
import json
import os
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import front_http
import numpy as np
import typer
from accuquant.runtime.bundle import Bundle
from accuquant.runtime.console import command, console, machine_facts
from accuquant.runtime.errors import AccuQuantError
from accuquant.runtime.files import write_text
from front import Answer, Front
from rich.table import Table

WARMING = 0.2  # the share of a soak in which memory may grow
RISES = 16.0  # MiB over a soak that its line may rise, and three standard errors of it
POINTS = 600  # of memory, at most, in the JSON


@dataclass
class Tally:
    """What became of the requests of one phase, and how long it took."""

    statuses: Counter[str] = field(default_factory=Counter)
    accepted: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    failed: Counter[str] = field(default_factory=Counter)

    def add(self, answer: Answer, seconds: float) -> None:
        self.statuses[answer.said] += 1
        if answer.outcome == "picture":
            self.accepted.append(seconds)
        elif answer.outcome == "refused":
            self.refused.append(seconds)
        else:
            self.failed[answer.said] += 1


async def closed_loop(front: Front, clients: int, seconds: float) -> Tally:
    """Every client asks again as soon as it has its picture, or after as long as a refusal says."""
    tally, end, seeds = Tally(), time.monotonic() + seconds, iter(range(10**9))

    async def client() -> None:
        while time.monotonic() < end:
            begun = time.monotonic()
            answer = await front.picture(next(seeds))
            tally.add(answer, time.monotonic() - begun)
            if answer.outcome != "picture":
                await asyncio.sleep(answer.again or 1.0)

    await asyncio.gather(*(client() for _ in range(clients)))
    return tally


async def open_loop(front: Front, rate: float, seconds: float, seed: int) -> Tally:
    """Requests arrive at random, `rate` a second on average; returns when the last is answered."""
    tally, draw, begun = Tally(), random.Random(seed), time.monotonic()

    async def one(due: float, number: int) -> None:
        answer = await front.picture(number)
        tally.add(answer, time.monotonic() - due)

    due, asked = begun, []
    while (due := due + draw.expovariate(rate)) < begun + seconds:
        await asyncio.sleep(due - time.monotonic())
        asked.append(asyncio.create_task(one(due, len(asked))))
    await asyncio.gather(*asked)
    return tally


@asynccontextmanager
async def watched(front: Front) -> AsyncIterator[list[tuple[float, float]]]:
    """Seconds and the server's memory in MiB, once a second while the block runs."""
    seen: list[tuple[float, float]] = []
    begun = time.monotonic()

    async def watch() -> None:
        while True:
            used = await front.memory()
            seen.append((time.monotonic() - begun, used / 2**20))
            await asyncio.sleep(1.0)

    watching = asyncio.create_task(watch())
    try:
        yield seen
    finally:
        watching.cancel()


async def phase(name: str, front: Front, load: Callable[[], Awaitable[Tally]], offered: float | None) -> dict[str, Any]:
    begun = time.monotonic()
    async with watched(front) as memory:
        tally = await load()
    lasted = time.monotonic() - begun
    return {
        "phase": name,
        "offered_per_second": offered,
        "lasted_seconds": lasted,
        "requests": sum(tally.statuses.values()),
        "statuses": dict(sorted(tally.statuses.items())),
        "pictures_per_second": len(tally.accepted) / lasted,
        "accepted_seconds": percentiles(tally.accepted),
        "refused_seconds": percentiles(tally.refused),
        "failures": dict(tally.failed),
        "memory_mib": [round(mib, 1) for _, mib in memory[:: 1 + len(memory) // POINTS]],
        "memory_line": line(memory),
        "load_average": os.getloadavg()[0],
    }


def line(memory: list[tuple[float, float]]) -> dict[str, float]:
    """What memory rises in MiB over the whole phase by the line of least squares after WARMING, and its error."""
    kept = np.array(memory[int(WARMING * len(memory)) :])
    if len(kept) < 3:
        return {"n": len(kept)}
    (slope, _), covariance = np.polyfit(kept[:, 0], kept[:, 1], 1, cov="unscaled")
    centre = kept - kept.mean(axis=0)
    rest = centre[:, 1] - slope * centre[:, 0]
    error = float(np.sqrt(covariance[0, 0] * (rest @ rest) / (len(kept) - 2)))
    lasted = memory[-1][0]
    return {
        "n": len(kept), "rises_mib": float(slope) * lasted, "standard_error_mib": error * lasted,
        "mib_per_hour": float(slope) * 3600,
    }  # fmt: skip


def percentiles(seconds: list[float]) -> dict[str, float]:
    if not seconds:
        return {"n": 0}
    shown = {f"p{q}": float(np.percentile(seconds, q)) for q in (50, 95, 99)}
    return {"n": len(seconds)} | shown | {"max": max(seconds)}


def faults(results: list[dict[str, Any]], deadline: float) -> list[str]:
    """What did not hold, in words; empty if all did."""
    found = []
    for result in results:
        if result["failures"]:
            found.append(f"{result['phase']}: answers other than a picture or a proper refusal: {result['failures']}")
        if result["accepted_seconds"].get("p99", 0.0) > deadline:
            found.append(f"{result['phase']}: p99 of the accepted is beyond the deadline of {deadline:g} s")
        fitted = result.get("memory_line", {})
        if result["phase"].startswith("soak") and (
            fitted.get("rises_mib", 0.0) > RISES + 3 * fitted.get("standard_error_mib", 0.0)
        ):
            found.append(f"{result['phase']}: memory rises by {fitted['rises_mib']:.0f} MiB")
    return found


async def soak(front: Front, batch: int, seconds: float) -> list[dict[str, Any]]:
    clients = 2 * batch
    return [await phase(f"soak, {clients} clients", front, lambda: closed_loop(front, clients, seconds), None)]


async def measure(front: Front, batch: int, seconds: float, factors: list[float]) -> list[dict[str, Any]]:
    clients = 2 * batch
    results = [await phase(f"closed, {clients} clients", front, lambda: closed_loop(front, clients, seconds), None)]
    capacity = results[0]["pictures_per_second"]
    if not capacity:
        raise AccuQuantError(f"nothing was painted in {seconds:g} s ({results[0]['statuses']}); give more --seconds")
    for number, factor in enumerate(factors):
        rate = factor * capacity
        load = lambda rate=rate, number=number: open_loop(front, rate, seconds, number)  # noqa: E731
        results.append(await phase(f"open, {factor:g} x capacity", front, load, rate))
    return results


def started(front: str, bundle: Path, folder: Path, settings: dict[str, Any]) -> Front:
    if front == "http":
        return front_http.start(bundle, **settings)
    import front_triton  # needs psutil, which those who serve over HTTP alone may lack

    return front_triton.start(bundle, folder, **settings)


def bench(
    bundle: Annotated[Path, typer.Argument(help="Folder written by accuquant-export.")],
    front: Annotated[Literal["http", "triton"], typer.Option(help="Which front end.")] = "http",
    out: Annotated[Path, typer.Option(help="Where the JSON goes.")] = Path("serving.json"),
    seconds: Annotated[float, typer.Option(min=1, help="Of every phase.")] = 30.0,
    soaked: Annotated[float, typer.Option("--soak", min=0, help="Seconds of one closed loop; 0: the phases.")] = 0.0,
    factors: Annotated[str, typer.Option(help="Open loops, times the capacity, with commas.")] = "0.5,1,2",
    batch: Annotated[int, typer.Option(min=1)] = 4,
    queue: Annotated[int, typer.Option(min=1)] = 16,
    deadline: Annotated[float, typer.Option(min=0.1)] = 30.0,
    threads: Annotated[int, typer.Option(min=0, help="Of the engine; 0: all cores.")] = 0,
    note: Annotated[str, typer.Option(help="What a reader of the numbers should know, such as other work.")] = "",
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Measure a front end under load. Exit code 1 if a request was lost or refused without a word."""
    manifest = Bundle(bundle).manifest
    settings = {"batch": batch, "queue": queue, "deadline": deadline, "threads": threads}
    times = [float(part) for part in factors.split(",")]
    with TemporaryDirectory(prefix="accuquant-load-") as folder:
        server = started(front, bundle, Path(folder), settings)
        try:
            load = soak(server, batch, soaked) if soaked else measure(server, batch, seconds, times)
            results = asyncio.run(load)
        finally:
            stopped = server.stop()
    wrong = faults(results, deadline) + ([] if stopped == 0 else [f"SIGTERM ended it with {stopped}"])
    report = {
        "schema_version": 2, "machine": machine_facts(), "versions": server.versions, "front": front,
        "bundle": {"name": bundle.resolve().name, "scheme": manifest.scheme, "sampler": manifest.sampler},
        "settings": settings | {"seconds": soaked or seconds}, "note": note, "results": results, "faults": wrong,
    }  # fmt: skip
    write_text(out, json.dumps(report, indent=1) + "\n")
    console.print(_table(results))
    for sentence in wrong or ["every request was answered: with a picture, or refused as it should be"]:
        console.print(sentence)
    if wrong:
        raise typer.Exit(1)


def _table(results: list[dict[str, Any]]) -> Table:
    table = Table()
    for column in ("phase", "requests", "pictures/s", "refused", "p50", "p95", "p99", "memory", "rises"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    for r in results:
        waits = [f"{r['accepted_seconds'].get(q, float('nan')):.2f} s" for q in ("p50", "p95", "p99")]
        memory = f"{r['memory_mib'][0]:.0f} to {r['memory_mib'][-1]:.0f} MiB" if r["memory_mib"] else "-"
        refused = str(r["refused_seconds"]["n"])
        rises = f"{r['memory_line'].get('mib_per_hour', float('nan')):.1f} MiB/h"
        table.add_row(r["phase"], str(r["requests"]), f"{r['pictures_per_second']:.2f}", refused, *waits, memory, rises)
    return table


if __name__ == "__main__":
    command(bench)()
