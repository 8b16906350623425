"""`accuquant-doctor [BUNDLE]`: what this machine has, what each backend would use, and what to install."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from .bundle import Bundle
from .console import command, console, machine_facts
from .doctor import examine
from .engines import choose
from .files import write_text


def doctor(
    bundle: Annotated[Path | None, typer.Argument(help="Also say which engine would sample this bundle.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the JSON goes, if wanted.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Look at this machine. Exit code 1 if no engine is installed."""
    facts = machine_facts()
    console.print(
        f"{facts['cpu']}, {facts['cores']} cores, {facts['memory']}, {facts['instructions'] or 'no SIMD known to us'}"
    )
    console.print(f"{facts['system']}, Python {facts['python']}")
    found = examine(facts["instructions"])
    table = Table()
    for column in ("backend", "version", "computes in", "note"):
        table.add_column(column)
    for f in found:
        table.add_row(f.backend, f.version or "not installed", f.computes, f.advice.replace("[", r"\["))
    console.print(table)
    target = "cpu" if bundle is None else Bundle(bundle).manifest.target
    engine = choose("auto", target)
    console.print(f"{'bundles' if bundle is None else bundle} for target {target} would be sampled by {engine}")
    if out is not None:
        report = {"schema_version": 1, "machine": facts, "backends": [asdict(f) for f in found], "engine": engine}
        write_text(out, json.dumps(report, indent=1) + "\n")


main = command(doctor)
