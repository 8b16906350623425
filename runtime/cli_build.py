"""`accuquant-build BUNDLE --gpu sm89`: compile plans for NVIDIA GPUs on this machine, which needs none."""

import shutil
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from .bundle import Bundle
from .console import bar, command, console
from .engine_cache import EngineCache
from .engines.compile_plan import TARGETS, CompileRequest
from .engines.plans import CachedPlan, cached_plan
from .errors import AccuQuantError
from .files import atomic, cache_folder
from .inspection import judge


def build(
    bundle: Annotated[Path, typer.Argument(help="Folder written by accuquant-export --target tensorrt.")],
    gpu: Annotated[str, typer.Option(help=f"Of {', '.join(TARGETS)}, with commas; default runs on all.")] = "default",
    batch: Annotated[str, typer.Option(help="Least, best and most pictures at once.")] = "1,8,16",
    out: Annotated[Path | None, typer.Option(help="Folder to copy the plans into, as NAME.GPU.plan.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Compile a bundle's denoiser with TensorRT-RTX, or find the plan compiled before."""
    sizes = _batches(batch)
    opened, cache = Bundle(bundle), EngineCache(cache_folder())
    found: dict[str, tuple[CachedPlan, float]] = {}
    with bar() as show:
        targets = gpu.split(",")
        for done, target in enumerate(targets):
            show("compiling plans", done, len(targets), target)
            begun = time.perf_counter()
            plan = cached_plan(
                CompileRequest(opened.graph("denoiser"), target, sizes),
                cache,
                lambda target=target, done=done: show(  # type: ignore[misc]
                    "compiling plans", done, len(targets), f"{target}: another process is building it, waiting"
                ),
            )
            found[target] = plan, time.perf_counter() - begun
        show("compiling plans", len(targets), len(targets), "")
    console.print(_table(opened, found))
    for target, (plan, _) in found.items():
        if plan.engine.instead_of:
            console.print(f"{target}: built, since the nearest plan has {'; '.join(plan.engine.instead_of)}")
        path = plan.engine.path
        if out is not None:
            path = out / f"{opened.folder.resolve().name}.{target}.plan"
            with atomic(path) as part:
                shutil.copyfile(plan.engine.path, part)
        console.print(f"{target}: {path}")
    console.print("compiled ahead of time, not run")


def _batches(text: str) -> tuple[int, int, int]:
    try:
        least, best, most = (int(part) for part in text.split(","))
    except ValueError:
        least = best = most = 0
    if not 1 <= least <= best <= most:
        raise AccuQuantError(f"--batch {text!r}: write three rising numbers, the least, best and most, such as 1,8,16")
    return least, best, most


def _table(bundle: Bundle, found: dict[str, tuple[CachedPlan, float]]) -> Table:
    table = Table(title=f"{bundle.manifest.scheme} for {bundle.manifest.target}, TensorRT-RTX")
    for column in ("GPU", "", "plan", "weights", "operators as asked"):
        table.add_column(column, justify="left" if not column else "right")
    operators = bundle.manifest.operators
    for target, (plan, seconds) in found.items():
        verdicts = judge(operators, plan.compiled.precisions(operators))
        table.add_row(
            target,
            f"built in {seconds:.0f} s" if plan.engine.built else "from the cache",
            f"{plan.engine.path.stat().st_size / 2**20:.2f} MiB",
            f"{plan.compiled.weights_bytes / 2**20:.2f} MiB",
            f"{sum(not v.why for v in verdicts)} of {len(verdicts)}",
        )
    return table


main = command(build)
