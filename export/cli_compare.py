"""`accuquant-compare BUNDLE`: is what the engine samples what the graph says? Step by step and layer by layer."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.table import Table

from ..runtime.bundle import Bundle
from ..runtime.console import bar, command, console, machine_facts
from ..runtime.files import write_text
from .compare import LEAST, LEAST_IN_16_BITS, Departure, compare, expected_of
from .verify import SQNR_TOLERANCE

ROWS, WORST = 10, 5  # shown steps and layers


def compare_(
    bundle: Annotated[Path, typer.Argument(help="Folder written by accuquant-export.")],
    engine: Annotated[str, typer.Option(help="auto, openvino or onnxruntime.")] = "auto",
    n: Annotated[int, typer.Option("-n", "--number", min=1, help="How many chains, all in one batch.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first chain.")] = 0,
    layers: Annotated[int, typer.Option(min=1, help="Steps at which every layer is compared alone.")] = 3,
    least: Annotated[
        float | None,
        typer.Option(help=f"dB of a layer on its own input [{LEAST:g}; of graphs in 16 bits {LEAST_IN_16_BITS:g}]."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where the JSON goes, if wanted.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Hold an engine against the ONNX standard along the chain. Exit code 2 if they part, naming the first layer."""
    opened = Bundle(bundle)
    least = expected_of(opened) if least is None else least
    with bar() as show:
        found = compare(
            opened, engine, range(seed, seed + n), layers, lambda done, total: show("comparing", done, total, "")
        )
    console.print(_steps(found, [step.timestep for step in opened.plan.steps]))
    first, loss = found.first(least), _loss(found)
    departing = [name for name, (db, _) in found.layers.items() if not db >= least]
    worst = sorted(found.layers.items(), key=lambda item: item[1])[: max(WORST, len(departing))]
    table = Table(title=f"layers of {found.engine_name} on their own input, worst of {layers} steps")
    for column in ("layer", "SQNR to the standard", "at step"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    for name, (db, step) in worst[: 2 * WORST]:
        table.add_row(name, f"{db:.1f} dB", str(step))
    console.print(table)
    facts = machine_facts()
    console.print(f"{facts['cpu']}, {facts['cores']} cores; seeds {seed}..{seed + n - 1}")
    if out is not None:
        report = {"schema_version": 1, "machine": facts, "seeds": [seed, n], "first": first, "loss_db": loss}
        write_text(out, json.dumps(report | asdict(found), indent=1) + "\n")
    if first is not None:
        db, step = found.layers[first]
        console.print(
            f"layer {first} is the first that departs: {db:.0f} dB at step {step}, at least {least:.0f} is expected; "
            f"{len(departing)} of {len(found.layers)} do. Sample with another --engine until it is repaired"
        )
    elif loss > SQNR_TOLERANCE:
        console.print(f"every layer is right alone, and yet the engine's output is {loss:.1f} dB further from fp32")
    else:
        console.print(f"{found.engine_name} computes what the graph says: all {len(found.layers)} layers agree")
        return
    raise typer.Exit(2)


def _loss(found: Departure) -> float:
    """dB by which the engine is further from fp32 than the standard, on the same latents, mean over steps."""
    return float(np.mean(found.standard.alone) - np.mean(found.engine.alone))


def _steps(found: Departure, timesteps: list[float]) -> Table:
    table = Table(title=f"{found.engine_name} and the standard, both against fp32")
    for column in ("step", "timestep", "alone: standard", "engine", "accumulated: standard", "engine"):
        table.add_column(column, justify="right")
    for i in sorted(set(np.linspace(0, len(timesteps) - 1, min(ROWS, len(timesteps))).round().astype(int).tolist())):
        sides = (found.standard, found.engine)
        alone, along = ([getattr(side, part)[i] for side in sides] for part in ("alone", "accumulated"))
        table.add_row(str(i + 1), f"{timesteps[i]:g}", *(f"{db:.1f} dB" for db in alone), *(f"{d:.2%}" for d in along))
    return table


main = command(compare_)
