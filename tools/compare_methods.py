"""Calibration methods side by side: same checkpoint, grids, layer policy, trajectories, budget and seeds.

    methods     min-max, percentile, mse, SmoothQuant (nothing learned); block-wise reconstruction; per-step; multi-step
    m           groups of M = 1 .. the whole chain
    gradient    exact, and the injected forms
    start       groups that start from the teacher or where the student is, and what they must end in
    sharing     one set of activation parameters, or one for each stretch of the chain
    learned     what is learned beside activation ranges: nothing, rounding, weight scales, biases

Whoever learns has the budget of the first multi-step entry in network calls (contest.py says how they are counted);
seconds are measured. One JSON and its plots come out.

    python tools/compare_methods.py tools/reference/fashion-ddim.ckpt --bits 4/8 --out tools/results/methods-w4a8.json
    python tools/compare_methods.py tools/reference/fashion-ddim.ckpt --sweep m --out tools/results/m-w4a8.json
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accuquant.calibrate.scheme import QuantScheme, parse_bits
from accuquant.calibrate.spec import CalibrationSpec, parse_settings
from accuquant.export.build import versions
from accuquant.export.figures import lines, markup
from accuquant.runtime.console import bar, command, console, machine_facts
from accuquant.runtime.errors import AccuQuantError
from accuquant.runtime.files import sha256, write_text
from contest import DRIFT_SEEDS, Arena, Entry, cost, within
from rich.table import Table

NOTHING: Mapping[str, Any] = {"iterations": 0, "warmup": 0, "rounding": "nearest"}
PER_STEP: Mapping[str, Any] = {"group": 1, "warmup": 0, "start": "teacher", "gradient": "exact"}


def methods(spec: CalibrationSpec) -> list[Entry]:
    made = [
        Entry("min-max", changed(spec, **NOTHING, initialisation="min-max")),
        Entry("percentile", changed(spec, **NOTHING, initialisation="percentile")),
        Entry("mse", changed(spec, **NOTHING)),
        Entry("smoothquant", changed(spec, **NOTHING, initialisation="min-max", smoothing=0.5)),
        Entry("block-wise", changed(spec, batch=16, warmup=0), "block-wise"),
        Entry("per-step", changed(spec, **PER_STEP)),
        Entry("multi-step", spec),
    ]
    return made


def group_sizes(spec: CalibrationSpec) -> list[Entry]:
    return [Entry(f"M = {m}", changed(spec, group=m)) for m in (1, 2, 5, 10, 25, 50)]


def gradients(spec: CalibrationSpec) -> list[Entry]:
    kinds = ("exact", "injected-a", "injected-1", "injected-v", "measured")
    return [Entry(kind, changed(spec, gradient=kind)) for kind in kinds]


def starts(spec: CalibrationSpec) -> list[Entry]:
    return [
        Entry("teacher's latent", changed(spec, start="teacher")),
        Entry("student's, back to the trajectory", changed(spec, start="student", aim="trajectory")),
        Entry("student's, local target", changed(spec, start="student", aim="local")),
    ]


def sharing(spec: CalibrationSpec) -> list[Entry]:
    return [Entry(f"{k} set{'s' if k > 1 else ''}", changed(spec, table=k)) for k in (1, 2, 5, 10)]


def learned(spec: CalibrationSpec) -> list[Entry]:
    bare = {"rounding": "nearest", "weight_scale_rate": 0.0, "bias_rate": 0.0}
    scales, biases = {"weight_scale_rate": spec.weight_scale_rate or 2e-4}, {"bias_rate": spec.bias_rate or 3e-4}
    return [
        Entry("activations", changed(spec, **bare)),
        Entry("+ rounding", changed(spec, **{**bare, "rounding": "offset"})),
        Entry("+ AdaRound instead", changed(spec, **{**bare, "rounding": "adaround"})),
        Entry("+ rounding, weight scales", changed(spec, **{**bare, "rounding": "offset", **scales})),
        Entry("+ rounding, biases", changed(spec, **{**bare, "rounding": "offset", **biases})),
    ]


SWEEPS = {
    "methods": methods,
    "m": group_sizes,
    "gradient": gradients,
    "start": starts,
    "sharing": sharing,
    "learned": learned,
}


def changed(spec: CalibrationSpec, **settings: Any) -> CalibrationSpec:
    """The specification with other settings, checked like the first."""
    return CalibrationSpec.model_validate(spec.model_dump() | settings)


def main(
    checkpoint: Annotated[Path, typer.Argument()],
    sweep: Annotated[str, typer.Option(help=", ".join(SWEEPS))] = "methods",
    bits: Annotated[str, typer.Option()] = "4/8",
    out: Annotated[Path, typer.Option()] = Path("build/methods.json"),
    target: Annotated[str, typer.Option()] = "cpu",
    policy: Annotated[str, typer.Option()] = "standard",
    split: Annotated[bool, typer.Option("--split", help="A scale for each part of a concatenation.")] = False,
    sampler: Annotated[str, typer.Option(help="The family's own if left out.")] = "",
    n: Annotated[int, typer.Option(help="Held-out seeds compared.")] = 256,
    only: Annotated[str, typer.Option(help="Entries by name, separated by commas; all if left out.")] = "",
    set_: Annotated[list[str], typer.Option("--set", help="Calibration setting, such as group=10.")] = [],  # noqa: B006
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves torch's choice.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Keep the entries that --out already holds.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Run the entries of a sweep and write one JSON."""
    if threads:
        torch.set_num_threads(threads)
    if sweep not in SWEEPS:
        raise AccuQuantError(f"--sweep {sweep!r}: there is {', '.join(SWEEPS)}")
    spec = CalibrationSpec(**parse_settings(set_))
    weight_bits, activation_bits = parse_bits(bits)
    scheme = QuantScheme.model_validate(
        {
            "weight_bits": weight_bits,
            "activation_bits": activation_bits,
            "target": target,
            "policy": policy,
            "split": split,
        }
    )
    asked = {entry.name: entry for entry in SWEEPS[sweep](spec)}
    wanted = only.split(",") if only else list(asked)
    if unknown := set(wanted) - set(asked):
        raise AccuQuantError(f"--only {', '.join(sorted(unknown))}: there is {', '.join(asked)}")
    arena = Arena(checkpoint, scheme, sampler, n, spec)
    budget = cost(Entry("multi-step", spec), arena.graph)
    named = {name: within(entry, budget, arena.graph) for name, entry in asked.items()}
    header = {
        "schema_version": 2,
        "sweep": sweep,
        "checkpoint": {"name": checkpoint.name, "sha256": sha256(checkpoint)},
        "scheme": scheme.model_dump(),
        "sampler": sampler or "the family's own",
        "steps": len(arena.plan),
        "budget_calls": budget,
        "n": n,
        "seeds": [0, n - 1],
        "drift_n": DRIFT_SEEDS,
        "machine": {**machine_facts(), "threads": torch.get_num_threads()},
        "versions": versions(),
    }
    rows = kept_rows(out, header, named) if resume else []
    wanted = [name for name in wanted if name not in {row["method"] for row in rows}]
    order = list(named)
    for name in wanted:  # in the order asked for, listed in the sweep's own
        entry = named[name]
        with bar() as show:
            row = arena.run(entry, show)
        rows = sorted([*rows, row], key=lambda r: order.index(r["method"]))
        console.print(f"{entry.name}: {row['psnr_mean']:.2f} dB, MSE {row['mse']:.2e}, {row['seconds']:.0f} s")
        write_text(out, json.dumps(header | {"rows": rows}, indent=1) + "\n")  # a long sweep may be cut short
    draw(out, scheme.name, rows)
    console.print(table(f"{checkpoint.name} at {scheme.name}, n = {n}, budget {budget:.0f} calls", rows))


def kept_rows(out: Path, header: Mapping[str, Any], entries: Mapping[str, Entry]) -> list[dict[str, Any]]:
    """The rows of an earlier run that was asked the same and cut short; none if there was no such run.

    Raises:
        AccuQuantError: the file is of other circumstances, whose rows cannot stand beside new ones.
    """
    if not out.exists():
        return []
    try:
        earlier = json.loads(out.read_text())
        rows: list[dict[str, Any]] = earlier.pop("rows")
    except (json.JSONDecodeError, KeyError, AttributeError) as error:
        raise AccuQuantError(f"--resume: {out} is no comparison of this tool; choose another --out") from error
    same = json.loads(json.dumps(header))
    different = sorted(k for k in same.keys() | earlier.keys() if same.get(k) != earlier.get(k))
    different += [f"settings of {r['method']}" for r in rows if r["spec"] != entries[r["method"]].spec.model_dump()]
    if different:
        raise AccuQuantError(f"--resume: {out} was measured with another {', '.join(different)}; choose another --out")
    return rows


def draw(out: Path, scheme: str, rows: list[dict[str, Any]]) -> None:
    """Drift along the chain, and what single steps would add up to, as SVG beside the JSON."""
    count = len(rows[0]["accumulated_mse"])
    steps = list(range(1, count + 1))
    drift = {row["method"]: (steps, row["accumulated_mse"]) for row in rows}
    title = f"{scheme}: error of the latent along the chain, n = {DRIFT_SEEDS}"
    write_text(
        out.with_suffix(".drift.svg"), markup(lines(drift, title, "sampling step", "mean squared error", log="y"))
    )
    single = {row["method"]: (steps, row["single_mse"]) for row in rows}
    title = f"{scheme}: error of a step by itself, n = {DRIFT_SEEDS}"
    write_text(
        out.with_suffix(".single.svg"), markup(lines(single, title, "sampling step", "mean squared error", log="y"))
    )


def table(title: str, rows: list[dict[str, Any]]) -> Table:
    made = Table(title=title)
    for column in ("method", "M", "iterations", "PSNR dB", "p10", "SSIM", "MSE", "median", "KID to fp", "seconds"):
        made.add_column(column, justify="right")
    for row in rows:
        spec = row["spec"]
        kid = f"{row['kid_to_fp'] * 1e3:.2f}e-3" if row["kid_to_fp"] is not None else "-"
        made.add_row(
            row["method"], str(spec["group"]), str(spec["warmup"] + spec["iterations"]), f"{row['psnr_mean']:.2f}",
            f"{row['psnr_p10']:.2f}", f"{row['ssim_mean']:.4f}", f"{row['mse']:.2e}", f"{row['mse_median']:.2e}", kid,
            f"{row['seconds']:.0f}",
        )  # fmt: skip
    return made


if __name__ == "__main__":
    command(main)()
