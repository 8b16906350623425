"""Calibration methods side by side: same checkpoint, grids, layer policy, trajectories, budget and seeds.

    methods     min-max, percentile, mse, SmoothQuant, GPTQ (nothing learned); block-wise; per-step; multi-step
    m           groups of M = 1 .. the whole chain
    gradient    exact, and the injected forms
    start       groups that start from the teacher or where the student is, and what they must end in
    sharing     one set of activation parameters, or one for each stretch of the chain
    learned     what is learned beside activation ranges: nothing, rounding, weight scales, biases
    correction  what correcting the output by timestep adds to GPTQ, per-step and multi-step
    budget      block-wise, per-step and multi-step on a quarter, a half and all of the budget: quality by time

Whoever learns has the budget of the default entry in network calls (contest.py says how they are counted); seconds are
measured. For every sweep and bits a JSON comes out, SWEEP-wXaY.json, with its plots: error along the chain, error of
single steps, quality by entry; and quality by method and bits over all of --out.

    python tools/compare_methods.py tools/reference/fashion-ddim.ckpt --bits 4/8,8/8 --out tools/results
    python tools/compare_methods.py tools/reference/fashion-ddim.ckpt --sweep methods,m,gradient,start,sharing,learned
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accuquant.calibrate.scheme import QuantScheme, parse_precision
from accuquant.calibrate.spec import CalibrationSpec, parse_settings
from accuquant.export.facts import versions
from accuquant.runtime.console import bar, command, console, machine_facts
from accuquant.runtime.errors import AccuQuantError
from accuquant.runtime.files import sha256, write_text
from contest import Arena, Entry, cost, within
from draw_comparison import draw, draw_by_bits
from rich.table import Table

NOTHING: Mapping[str, Any] = {"iterations": 0, "warmup": 0, "rounding": "nearest", "compensate": "never", "correct": 0}
GPTQ: Mapping[str, Any] = {"initialisation": "min-max", "compensate": "always"}
LEARNERS = ("block-wise from gptq", "per-step", "multi-step")  # that begin alike
PER_STEP: Mapping[str, Any] = {"group": 1, "warmup": 0, "start": "teacher", "gradient": "exact", "correct": 0}


def methods(spec: CalibrationSpec) -> list[Entry]:
    made = [
        Entry("min-max", changed(spec, **NOTHING, initialisation="min-max")),
        Entry("percentile", changed(spec, **NOTHING, initialisation="percentile")),
        Entry("mse", changed(spec, **NOTHING, initialisation="mse")),
        Entry("smoothquant", changed(spec, **NOTHING, initialisation="min-max", smoothing=0.5)),
        Entry("gptq", changed(spec, **NOTHING | GPTQ)),
        Entry("block-wise", changed(spec, batch=16, warmup=0, initialisation="mse", compensate="never"), "block-wise"),
        Entry("block-wise from gptq", changed(spec, batch=16, warmup=0, **GPTQ), "block-wise"),
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
        Entry("student's latent to the teacher's end", changed(spec, start="student", aim="trajectory")),
        Entry("student's latent to its own end", changed(spec, start="student", aim="local")),
    ]


def sharing(spec: CalibrationSpec) -> list[Entry]:
    return [Entry(f"{k} set{'s' if k > 1 else ''}", changed(spec, table=k)) for k in (1, 2, 5, 10)]


def learned(spec: CalibrationSpec) -> list[Entry]:
    bare = {"rounding": "nearest", "weight_scale_rate": 0.0, "bias_rate": 0.0}
    scales, biases = {"weight_scale_rate": spec.weight_scale_rate or 2e-5}, {"bias_rate": spec.bias_rate or 3e-4}
    return [
        Entry("activations", changed(spec, **bare)),
        Entry("+ rounding", changed(spec, **{**bare, "rounding": "offset"})),
        Entry("+ AdaRound instead", changed(spec, **{**bare, "rounding": "adaround"})),
        Entry("+ rounding, weight scales", changed(spec, **{**bare, "rounding": "offset", **scales})),
        Entry("+ rounding, biases", changed(spec, **{**bare, "rounding": "offset", **biases})),
    ]


def corrections(spec: CalibrationSpec) -> list[Entry]:
    corrected = {"correct": spec.correct or 32}
    return [
        Entry("gptq", changed(spec, **NOTHING | GPTQ)),
        Entry("gptq corrected", changed(spec, **NOTHING | GPTQ | corrected)),
        Entry("per-step", changed(spec, **PER_STEP)),
        Entry("per-step corrected", changed(spec, **PER_STEP | corrected)),
        Entry("multi-step", changed(spec, correct=0)),
        Entry("multi-step corrected", changed(spec, **corrected)),
    ]


def budgets(spec: CalibrationSpec) -> list[Entry]:
    learners = [entry for entry in methods(spec) if entry.name in LEARNERS]
    parts = {"1/4": 0.25, "1/2": 0.5, "1": 1.0}
    return [replace(e, name=f"{e.name} at {part}", share=share) for e in learners for part, share in parts.items()]


SWEEPS = {
    "methods": methods,
    "m": group_sizes,
    "gradient": gradients,
    "start": starts,
    "sharing": sharing,
    "learned": learned,
    "correction": corrections,
    "budget": budgets,
}


def changed(spec: CalibrationSpec, **settings: Any) -> CalibrationSpec:
    """The specification with other settings, checked like the first."""
    return CalibrationSpec.model_validate(spec.model_dump() | settings)


def main(
    checkpoint: Annotated[Path, typer.Argument()],
    sweep: Annotated[str, typer.Option(help=f"Of {', '.join(SWEEPS)}; several with commas.")] = "methods",
    bits: Annotated[str, typer.Option(help="Weights/activations; several with commas.")] = "4/8",
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("build/comparison"),
    target: Annotated[str, typer.Option()] = "cpu",
    policy: Annotated[str, typer.Option()] = "standard",
    reserve: Annotated[float, typer.Option(help="Share of the low-bit weights that keeps 8 bits.")] = 0.1,
    split: Annotated[bool, typer.Option("--split", help="A scale for each part of a concatenation.")] = False,
    sampler: Annotated[str, typer.Option(help="The family's own if left out.")] = "",
    steps: Annotated[int, typer.Option(help="The family's own if left out.")] = 0,
    n: Annotated[int, typer.Option(help="Held-out seeds compared.")] = 256,
    drift: Annotated[int, typer.Option(help="Of them, those whose errors are followed step by step.")] = 32,
    only: Annotated[str, typer.Option(help="Entries by name, separated by commas; all if left out.")] = "",
    set_: Annotated[list[str], typer.Option("--set", help="Calibration setting, such as group=10.")] = [],  # noqa: B006
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves torch's choice.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Take over what --out already holds of the same.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Run the entries of the sweeps at the given bits, and write their JSON and plots."""
    if threads:
        torch.set_num_threads(threads)
    spec = CalibrationSpec(**parse_settings(set_))
    sweeps = {name: chosen(name, spec, only) for name in sweep.split(",")}
    schemes = [scheme_of(pair, target, policy, reserve, split) for pair in bits.split(",")]
    arena = Arena(checkpoint, sampler, steps, n, min(n, drift), spec)
    circumstances = {
        "schema_version": 3,
        "checkpoint": {"name": checkpoint.name, "sha256": sha256(checkpoint)},
        "sampler": sampler or "the family's own",
        "steps": len(arena.plan),
        "n": n,
        "seeds": [0, n - 1],
        "drift_n": arena.drift_n,
        "machine": {**machine_facts(), "threads": torch.get_num_threads()},
        "versions": versions(),
    }
    for scheme in schemes:
        graph = arena.graph(scheme)
        budget = cost(Entry("multi-step", spec), graph, len(arena.plan))
        for name, entries in sweeps.items():
            header = circumstances | {"sweep": name, "scheme": scheme.model_dump(), "budget_calls": budget}
            path = out / f"{name}-{scheme.name.lower()}.json"
            rows = held_rows(path, header, resume)
            known = kept_rows(out, header) if resume else []
            ready = [within(e, budget, graph, len(arena.plan)) for e in entries]
            run(arena, ready, scheme, graph, header, path, rows, known)
    draw_by_bits(out)


def chosen(sweep: str, spec: CalibrationSpec, only: str) -> list[Entry]:
    """A sweep's entries, or those of them that are named, in the order of their names."""
    if sweep not in SWEEPS:
        raise AccuQuantError(f"--sweep {sweep!r}: there is {', '.join(SWEEPS)}")
    entries = {entry.name: entry for entry in SWEEPS[sweep](spec)}
    wanted = only.split(",") if only else list(entries)
    if unknown := set(wanted) - set(entries):
        raise AccuQuantError(f"--only {', '.join(sorted(unknown))}: there is {', '.join(entries)}")
    return [entries[name] for name in wanted]


def scheme_of(bits: str, target: str, policy: str, reserve: float, split: bool) -> QuantScheme:
    asked = {"target": target, "policy": policy, "reserve": reserve, "split": split}
    return QuantScheme.model_validate(parse_precision(bits) | asked)


def held_rows(path: Path, header: Mapping[str, Any], resume: bool) -> list[dict[str, Any]]:
    """What the file about to be written holds already; hours of work are not written over.

    Raises:
        AccuQuantError: it is there and not to be resumed, or was measured under other circumstances.
    """
    if not path.exists():
        return []
    if not resume:
        raise AccuQuantError(f"{path} holds results; take them over with --resume, or choose another --out")
    found = read(path)
    rows: list[dict[str, Any]] = found.pop("rows", [])
    now = json.loads(json.dumps(header))
    differ = [f"{k}: {found.get(k)} then, {v} now" for k, v in now.items() if found.get(k) != v]
    if differ or found.keys() - now.keys():
        raise AccuQuantError(
            f"--resume: {path} was measured under other circumstances ({'; '.join(differ)}); choose another --out"
        )
    return rows


def read(path: Path) -> dict[str, Any]:
    """A JSON of the results' folder.

    Raises:
        AccuQuantError: it is none.
    """
    try:
        return dict(json.loads(path.read_text()))
    except (json.JSONDecodeError, ValueError, TypeError) as error:
        raise AccuQuantError(f"--resume: {path} is no comparison of this tool; choose another --out") from error


def kept_rows(folder: Path, header: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What earlier runs measured under the same circumstances, whatever the sweep: entries of two sweeps may be one."""
    same = {k: v for k, v in json.loads(json.dumps(header)).items() if k != "sweep"}
    rows: list[dict[str, Any]] = []
    for path in sorted(folder.glob("*.json")):
        earlier = read(path)
        if {k: v for k, v in earlier.items() if k not in ("sweep", "rows")} == same:
            rows += earlier["rows"]
    return rows


def run(
    arena: Arena,
    entries: Sequence[Entry],
    scheme: QuantScheme,
    graph: int,
    header: Mapping[str, Any],
    path: Path,
    rows: list[dict[str, Any]],
    known: Sequence[dict[str, Any]],
) -> None:
    """Run the entries that are not `known`, and write `path`, which holds `rows`, after every one of them."""
    sweep = header["sweep"]
    order = [entry.name for entry in SWEEPS[sweep](CalibrationSpec())]
    for entry in entries:
        same = (r for r in known if (r["kind"], r["spec"]) == (entry.method, entry.spec.model_dump()))
        row = next(same, None)
        if row is None:
            with bar() as show:
                row = arena.run(entry, scheme, graph, show)
        others = [r for r in rows if r["method"] != entry.name]
        rows = sorted([*others, row | {"method": entry.name}], key=lambda r: order.index(r["method"]))
        console.print(f"{entry.name}: {row['psnr_mean']:.2f} dB, MSE {row['mse']:.2e}, {row['seconds']:.0f} s")
        write_text(path, json.dumps({**header, "rows": rows}, indent=1) + "\n")
    draw(path)
    title = f"{sweep}, {header['checkpoint']['name']} at {scheme.name}, n = {header['n']}"
    console.print(table(f"{title}, budget {header['budget_calls']:.0f} calls", rows))


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
