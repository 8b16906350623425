"""One table of step latency: a bundle beside its peers on the same network, all of them in turn in one run.

    python tools/bench_peers.py BUNDLE --checkpoint model.ckpt --out build/peers.json

Peers are ONNX Runtime's dynamic and static quantizers and NNCF, as tools/peers/ runs them in environments of their own
(see yardsticks.py, which measures quality as well), and with a checkpoint torch on the float network, eager and
compiled. A peer that cannot be installed, fails or is refused by its engine is a row that says why. Of other graphs

    accuquant-bench BUNDLE --compare NAME=GRAPH@ENGINE

makes the same table.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch's threads would go on spinning in the next one's turn

import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from accuquant.export.facts import versions
from accuquant.runtime.benchmark import sides_of
from accuquant.runtime.bundle import Bundle
from accuquant.runtime.cli_bench import batch_sizes, peer_table
from accuquant.runtime.console import bar, command, console, machine_facts
from accuquant.runtime.engines import open_engine
from accuquant.runtime.engines.base import Engine, EngineOptions
from accuquant.runtime.errors import AccuQuantError
from accuquant.runtime.files import sha256, write_text
from accuquant.runtime.peers import OpenPeer, beside
from yardsticks import CANDIDATES, Candidate, contestants

DYNAMIC = tuple(
    Candidate(
        f"ONNX Runtime dynamic, {what}", "onnxruntime", {"convolutions": both}, engine="onnxruntime",
        script="onnxruntime_dynamic.py",
    )
    for what, both in (("matmuls", False), ("convolutions too", True))
)  # fmt: skip
GROUPS = {
    "nncf": [c for c in CANDIDATES if c.library == "nncf" and c.settings["fast_bias_correction"]],
    "onnxruntime": [*DYNAMIC, *(c for c in CANDIDATES if c.library == "onnxruntime" and not c.settings["symmetric"])],
}


def torch_peers(checkpoint: Path, config: Path | None, bundle: Bundle) -> dict[str, OpenPeer]:
    """The float network eager and compiled.

    Raises:
        AccuQuantError: it is not the checkpoint that the bundle was made from.
    """
    from accuquant.calibrate.families import load_model
    from torch_engine import TorchEngine

    if sha256(checkpoint) != bundle.manifest.provenance.get("checkpoint_sha256"):
        raise AccuQuantError(f"{checkpoint} is not what {bundle.folder} was made from; name that checkpoint, or none")

    def opened(options: EngineOptions, *, compiled: bool) -> TorchEngine:
        return TorchEngine(load_model(checkpoint, config), options, checkpoint, compiled=compiled)

    return {"torch eager": partial(opened, compiled=False), "torch.compile": partial(opened, compiled=True)}


def main(
    bundle: Annotated[Path, typer.Argument(help="Folder written by accuquant-export.")],
    checkpoint: Annotated[
        Path | None, typer.Option(help="What it was made from; without it torch is left out.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="The checkpoint's YAML, if it does not lie beside it.")] = None,
    peers: Annotated[str, typer.Option(help=f"Of {', '.join(GROUPS)}.")] = ",".join(GROUPS),
    batch: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1,8",
    repeats: Annotated[int, typer.Option(min=8, help="Timed steps of everyone and batch size.")] = 100,
    threads: Annotated[int, typer.Option(min=0, help="0: all cores.")] = 1,
    samples: Annotated[int, typer.Option(help="Calibration data of the peers, along trajectories.")] = 64,
    environments: Annotated[Path, typer.Option(help="Where the peers are installed.")] = Path("build/yardsticks"),
    out: Annotated[Path, typer.Option(help="Where the JSON goes.")] = Path("build/peers.json"),
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Measure a step of our sides and of every peer, interleaved."""
    wanted = peers.split(",") if peers else []
    if unknown := set(wanted) - GROUPS.keys():
        raise AccuQuantError(f"--peers {', '.join(sorted(unknown))}: there is {', '.join(GROUPS)}")
    opened, sizes = Bundle(bundle), batch_sizes(batch)
    if checkpoint is not None and opened.manifest.conditioning is not None:
        raise AccuQuantError(
            f"{bundle} is of a conditional network, which torch is not measured on; leave --checkpoint out"
        )
    with tempfile.TemporaryDirectory() as folder:
        found = contestants(
            [opened], [c for group in wanted for c in GROUPS[group]], samples, environments.resolve(), Path(folder)
        )
        chosen = {name: one for name, one in found.items() if "settings" in one.row}
        openers: dict[str, OpenPeer] = {
            name: partial(_open, one.graph, one.engine) for name, one in chosen.items() if "failed" not in one.row
        }
        if checkpoint is not None:
            openers |= torch_peers(checkpoint, config, opened)
        rows = []
        with bar() as show:
            for size in sizes:
                row = beside(
                    opened, sides_of(opened, "auto"), openers, "auto", EngineOptions(size, threads), repeats,
                    lambda done, total, size=size: show(f"batch {size}", done, total, ""),  # type: ignore[misc]
                )  # fmt: skip
                failed = {n: {"ours": False, "failed": o.row["failed"]} for n, o in chosen.items() if "failed" in o.row}
                rows.append(row | {"rows": row["rows"] | failed})
    report = {
        "schema_version": 1,
        "bundle": opened.manifest.found,
        "scheme": opened.manifest.scheme,
        "threads": threads or "all",
        "machine": machine_facts(),
        "versions": versions(),
        "peers": {name: one.row for name, one in chosen.items()},
        "results": rows,
    }
    write_text(out, json.dumps(report, indent=1) + "\n")
    for row in rows:
        console.print(peer_table(row))
    console.print(f"medians [p10..p90] of {repeats} interleaved steps, {threads or 'all'} threads; written to {out}")


def _open(graph: Path, engine: str, options: EngineOptions) -> Engine:
    return open_engine(graph, options, engine)


if __name__ == "__main__":
    command(main)()
