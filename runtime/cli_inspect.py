"""`accuquant-inspect BUNDLE`: for every operator that can be quantized the precision asked, and the precision got.

"Got" is what the engine's own execution graph says on this machine, and with --gpu what NVIDIA's compiler says it made
for such a GPU: ahead of time, on a CPU, not run.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .bundle import Bundle
from .console import command, console, machine_facts
from .engine_cache import EngineCache
from .engines import open_engine
from .engines.base import EngineOptions
from .engines.compile_plan import TARGETS, CompileRequest
from .engines.plans import cached_plan
from .files import cache_folder, write_text
from .inspection import Verdict, judge, operator_precisions


def inspect(
    bundle: Annotated[Path, typer.Argument(help="Folder written by accuquant-export.")],
    engine: Annotated[str, typer.Option(help="auto, openvino or onnxruntime.")] = "auto",
    gpu: Annotated[
        str, typer.Option(help=f"Compile for GPUs with TensorRT-RTX instead: of {', '.join(TARGETS)}, with commas.")
    ] = "",
    every: Annotated[bool, typer.Option("--all", help="Every operator, not only those that differ.")] = False,
    out: Annotated[Path | None, typer.Option(help="Where the JSON goes, if wanted.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Show what became of every quantized operator. Exit code 2 if one of them does not run in integers."""
    opened = Bundle(bundle)
    found = [_on_gpu(opened, target) for target in gpu.split(",")] if gpu else [_here(opened, engine)]
    for result in found:
        verdicts = result["verdicts"]
        shown = [v for v in verdicts if every or v.why] + (result["in_float"] if every else [])
        if shown:
            console.print(_table(result["engine"], shown))
        counts = Counter(v.got for v in verdicts)
        console.print(
            f"{result['engine']}: {len(verdicts)} operators at {opened.manifest.scheme}: "
            + ", ".join(f"{n} {precision}" for precision, n in counts.most_common())
        )
        if result["in_float"]:
            counts = Counter(v.got for v in result["in_float"])
            console.print(
                f"{len(result['in_float'])} more were left in float: "
                + ", ".join(f"{n} {precision}" for precision, n in counts.most_common())
            )
        if result["weights_bytes"]:
            console.print(f"weights in memory {result['weights_bytes'] / 2**20:.2f} MiB ({result['note']})")
    if out is not None:
        plain = [r | {kind: [asdict(v) for v in r[kind]] for kind in ("verdicts", "in_float")} for r in found]
        write_text(
            out, json.dumps({"schema_version": 1, "machine": machine_facts(), "results": plain}, indent=1) + "\n"
        )
    if any(v.why for r in found for v in r["verdicts"]):
        raise typer.Exit(2)


def _here(bundle: Bundle, name: str) -> dict[str, Any]:
    engine = open_engine(bundle.graph("denoiser"), EngineOptions(batch=1), name, bundle.manifest.target)
    try:
        manifest = bundle.manifest
        got = operator_precisions(engine, [*manifest.operators, *manifest.in_float])
        verdicts = judge(manifest.operators, got, engine.kept_in_float)
        in_float = _left(bundle, got)
        return {"engine": engine.name, "verdicts": verdicts, "in_float": in_float, "weights_bytes": 0, "note": ""}
    finally:
        engine.close()


def _on_gpu(bundle: Bundle, target: str) -> dict[str, Any]:
    compiled = cached_plan(CompileRequest(bundle.graph("denoiser"), target), EngineCache(cache_folder())).compiled
    manifest = bundle.manifest
    got = compiled.precisions([*manifest.operators, *manifest.in_float])
    return {
        "engine": f"TensorRT-RTX for {target}",
        "verdicts": judge(manifest.operators, got),
        "in_float": _left(bundle, got),
        "weights_bytes": compiled.weights_bytes,
        "note": "compiled ahead of time, not run",
    }


def _left(bundle: Bundle, got: Mapping[str, str]) -> list[Verdict]:
    """Of the operators that the export left in float, which asks for nothing."""
    return [
        Verdict(name, f"float ({why})", "float", got.get(name, "not reported"), "")
        for name, why in bundle.manifest.in_float.items()
    ]


def _table(title: str, verdicts: list[Verdict]) -> Table:
    table = Table(title=title)
    for column in ("operator", "asked", "stored", "got", "why"):
        table.add_column(column)
    for v in verdicts:
        table.add_row(v.operator, v.asked, v.stored, v.got, v.why)
    return table


main = command(inspect)
