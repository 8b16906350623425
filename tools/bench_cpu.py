"""Steps on a CPU: our integers beside the best float engine, beside bfloat16 and beside NNCF, on four networks.

    python tools/bench_cpu.py --out tools/results/cpu.json

Of every network (cpu_networks.py) one run holds the float twin on OpenVINO and on ONNX Runtime, in bfloat16 where the
CPU has it, our W8A8 and W4A8, and NNCF's presets as tools/peers/ runs them; all of them in turn, step by step, at
every batch size. Seconds are those of the process on the CPU, which other work disturbs less than the clock's. Beside
speed stands what it costs, on calls along trajectories that nobody was calibrated on:

    SQNR = 10 log10( sum ||o_fp||^2 / sum ||o - o_fp||^2 )

The share of the limit is how fast a network's multiplications went, against those of one large product in 8 bits.
"""

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from accuquant.export.build import JUDGE_SEEDS
from accuquant.export.facts import versions
from accuquant.runtime.bundle import Bundle
from accuquant.runtime.console import bar, command, console, machine_facts
from accuquant.runtime.engines import open_engine
from accuquant.runtime.engines.base import Engine, EngineOptions, Rest
from accuquant.runtime.engines.openvino import OpenVINOEngine
from accuquant.runtime.errors import AccuQuantError
from accuquant.runtime.files import write_text
from accuquant.runtime.interleave import RUN_UP, interleaved, spread
from calls import recorded
from cpu_networks import NETWORKS, bundle_of, plain_graph
from cpu_ratios import ON_OURS, ratios
from products import large_product, multiplications
from rich.table import Table
from yardsticks import CANDIDATES, Contestant, calibration_data, peers

BITS = ("8/8", "4/8")
JUDGED = 64  # calls
WARM_UP = 3
SAMPLES = 256  # that NNCF calibrates with
PRESETS = [c for c in CANDIDATES if c.library == "nncf" and c.settings["fast_bias_correction"]]


@dataclass(frozen=True)
class Side:
    """A graph on an engine: whose it is, and what it computes in besides integers."""

    graph: Path
    engine: str
    whose: str  # fp32, bf16, ours, nncf, or nncf on ours
    rest: Rest = "float32"
    target: str = ""

    def open(self, batch: int, threads: int) -> Engine:
        return open_engine(self.graph, EngineOptions(batch, threads, self.rest), self.engine, self.target)


def sides_of(bundles: Sequence[Bundle], others: Mapping[str, tuple[str, Contestant]]) -> dict[str, Side]:
    """All that run beside each other for one network; `others`, with whose they are, failed or have a graph."""
    rests = OpenVINOEngine.rests()
    twin, short = bundles[0].graph("twin"), {"float32": "fp32 rest", "bfloat16": "bf16 rest"}
    found = {
        "fp32, OpenVINO": Side(twin, "openvino", "fp32"),
        "fp32, ONNX Runtime": Side(twin, "onnxruntime", "fp32"),
    }
    if "bfloat16" in rests:
        found["bf16, OpenVINO"] = Side(twin, "openvino", "bf16", "bfloat16")
    for rest in rests:
        for bundle in bundles:
            made = Side(bundle.graph("denoiser"), "openvino", "ours", rest, bundle.manifest.target)
            found[f"AccuQuant {bundle.manifest.scheme}, {short[rest]}"] = made
        for name, (whose, one) in others.items():
            if "failed" not in one.row:
                found[f"{name}, {short[rest]}"] = Side(one.graph, "openvino", whose, rest)
    return found


def quantized_by_others(
    name: str, bundle: Bundle, folder: Path, environments: Path, made: Path
) -> dict[str, tuple[str, Contestant]]:
    """NNCF's presets from both float graphs, by name, with whose they are."""
    data, found = calibration_data(bundle, SAMPLES, made), {}
    graphs = (("nncf", "", plain_graph(name, folder)), ("nncf on ours", ON_OURS, bundle.graph("twin")))
    for whose, told, graph in graphs:
        place = made / whose.replace(" ", "-")
        place.mkdir()
        theirs = peers(bundle, graph, PRESETS, SAMPLES, data, environments, place)
        found |= {f"{preset}{told}": (whose, one) for preset, one in theirs.items()}
    return found


def outputs(engine: Engine, calls: Mapping[str, np.ndarray]) -> np.ndarray:
    """Of calls whose number the engine's batch divides."""
    batch, count = engine.options.batch, len(calls["t"])
    fed = ({name: value[i : i + batch] for name, value in calls.items()} for i in range(0, count, batch))
    return np.concatenate([engine.run(some).copy() for some in fed])


def sqnr(out: np.ndarray, reference: np.ndarray) -> float:
    """In dB."""
    fp = reference.astype(np.float64)
    return float(10 * np.log10(np.square(fp).sum() / max(np.square(out - fp).sum(), 1e-300)))


def step_seconds(
    engines: Mapping[str, Engine], calls: Mapping[str, np.ndarray], repeats: int, tell: Callable[[int, int], None]
) -> dict[str, list[float]]:
    """CPU seconds of every engine's steps, in turn."""

    def steps(engine: Engine) -> Callable[[], object]:
        batch = engine.options.batch
        fed = cycle(
            {key: value[i : i + batch] for key, value in calls.items()} for i in range(0, len(calls["t"]), batch)
        )
        return lambda: engine.run(next(fed))

    of_engines = {name: steps(engine) for name, engine in engines.items()}
    return interleaved(of_engines, repeats, tell, warm_up=WARM_UP, clock=time.process_time)


def measure(
    name: str, folder: Path, batches: Sequence[int], repeats: int, threads: int, environments: Path
) -> dict[str, Any]:
    """One network: a row for every side, with its seconds by batch size and its SQNR, or why it failed."""
    bundles = [bundle_of(name, bits, folder) for bits in BITS]
    judged = recorded(bundles[0], range(JUDGE_SEEDS, JUDGE_SEEDS + 8), JUDGED)
    most = max(batches)
    with tempfile.TemporaryDirectory() as made, bar() as show:
        others = quantized_by_others(name, bundles[0], folder, environments, Path(made))
        sides = sides_of(bundles, others)
        rows: dict[str, Any] = {key: {"whose": s.whose, "rest": s.rest, "seconds": {}} for key, s in sides.items()}
        for key, (whose, one) in others.items():
            if "failed" in one.row:
                rows[key] = {"whose": whose, "failed": one.row["failed"]}
        for batch in batches:
            with ExitStack() as held:
                engines = {}
                for key, side in sides.items():
                    engines[key] = side.open(batch, threads)
                    held.callback(engines[key].close)
                if batch == most:
                    reference = outputs(engines["fp32, ONNX Runtime"], judged)
                    for key, engine in engines.items():
                        rows[key] |= {"engine": engine.name, "sqnr": sqnr(outputs(engine, judged), reference)}
                taken = step_seconds(engines, judged, repeats, partial(show, f"{name}, batch {batch}"))
                for key, seconds in taken.items():
                    rows[key]["seconds"][str(batch)] = spread(seconds)
    return {
        "told": NETWORKS[name].told,
        "found": bundles[0].manifest.found,
        "multiplications": multiplications(bundles[0].graph("twin")),
        "calibration": bundles[0].manifest.provenance["calibration"],
        "rows": rows,
    }


def table(report: Mapping[str, Any]) -> Table:
    """Our faster rest against everyone's fastest."""
    made = Table(title=f"median CPU time of {report['repeats']} interleaved steps")
    heads = "batch|fp32|W8A8|vs fp32|vs bf16|vs NNCF|on our graph|SQNR|NNCF's|W4A8|of limit"
    for column in ("", *heads.split("|")):
        made.add_column(column, justify="left" if not column else "right")
    for row in ratios(report):
        made.add_row(
            row.network, str(row.batch), f"{row.fp_seconds * 1e3:.2f} ms", f"{row.seconds * 1e3:.2f} ms",
            f"{row.vs_fp:.2f}x", f"{row.vs_bf16:.2f}x" if row.vs_bf16 else "-", f"{row.vs_peer:.2f}x",
            f"{row.vs_peer_on_ours:.2f}x", f"{row.sqnr:.1f} dB", f"{row.peer_sqnr:.1f} dB", f"{row.four:.2f}",
            f"{row.share:.0%}",
        )  # fmt: skip
    return made


def main(
    networks: Annotated[str, typer.Option(help=f"Of {', '.join(NETWORKS)}.")] = ",".join(NETWORKS),
    batch: Annotated[str, typer.Option(help="Batch sizes that divide 64, separated by commas.")] = "1,8",
    repeats: Annotated[int, typer.Option(min=8, help="Timed steps of every side and batch size.")] = 60,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    folder: Annotated[Path, typer.Option(help="Where bundles are exported to, or lie already.")] = Path("build/cpu"),
    environments: Annotated[Path, typer.Option(help="Where the peers are installed.")] = Path("build/yardsticks"),
    out: Annotated[Path, typer.Option(help="Where the JSON goes.")] = Path("build/cpu.json"),
    note: Annotated[str, typer.Option(help="What a reader of the numbers should know, such as other work.")] = "",
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Measure and write the table."""
    wanted, batches = networks.split(","), [int(size) for size in batch.split(",")]
    if unknown := set(wanted) - NETWORKS.keys():
        raise AccuQuantError(f"--networks {', '.join(sorted(unknown))}: there is {', '.join(NETWORKS)}")
    if any(size < 1 or JUDGED % size for size in batches):
        raise AccuQuantError(f"--batch {batch}: sizes that divide {JUDGED} are allowed")
    report: dict[str, Any] = {
        "schema_version": 1,
        "repeats": repeats,
        "run_up_s": RUN_UP,
        "batches": batches,
        "threads": threads,
        "note": note,
        "machine": machine_facts(),
        "versions": versions(),
        "limit": large_product(threads),
        "networks": {},
    }
    for name in wanted:
        report["networks"][name] = measure(name, folder, batches, repeats, threads, environments.resolve())
        write_text(out, json.dumps(report, indent=1) + "\n")
    console.print(table(report))


if __name__ == "__main__":
    command(main)()
