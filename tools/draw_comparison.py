"""Plots of comparisons, drawn from the JSON that compare_methods.py writes.

Beside every SWEEP-wXaY.json: the latent's error along the chain (.drift.svg), that of single steps (.single.svg), the
quality of every entry (.quality.svg) and, where learners have several budgets, their errors by time (.time.svg).
Over all methods-*.json: quality by method and bits (methods.svg).

    python tools/draw_comparison.py tools/results
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from accuquant.export.figures import dots, lines, markup
from accuquant.runtime.files import write_text

SWEEPS = ("methods", "m", "gradient", "start", "sharing", "learned", "correction", "budget", "terrain")


def draw(path: Path) -> None:
    """The plots of one comparison, as SVG beside its JSON."""
    report = json.loads(path.read_text())
    rows, bits = report["rows"], bits_of(report)
    steps = list(range(1, len(rows[0]["accumulated_mse"]) + 1))
    for key, what in (("accumulated", "along the chain"), ("single", "of single steps")):
        curves = {row["method"]: (steps, row[f"{key}_mse_median"]) for row in rows}
        title = f"{bits}: error {what}, n = {report['drift_n']}"
        figure = lines(curves, title, "sampling step", "squared error, median", log="y")
        write_text(path.with_suffix({"accumulated": ".drift.svg", "single": ".single.svg"}[key]), markup(figure))
    if report["sweep"] == "budget":
        title = f"{bits}: end of the chain by time, n = {report['n']}"
        curves = {learner: tuple(zip(*points, strict=True)) for learner, points in by_time(rows).items()}
        figure = lines(curves, title, "CPU seconds", "squared error, median", log="y")
        write_text(path.with_suffix(".time.svg"), markup(figure))
    panels = {name: {bits: [value(row) for row in rows]} for name, value in MEASURES.items()}
    names = [row["method"] for row in rows]
    write_text(path.with_suffix(".quality.svg"), markup(dots(panels, names, f"{bits}, n = {report['n']}")))


def by_time(rows: list[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """(CPU seconds, median error) of every learner of a sweep of budgets."""
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        points = series.setdefault(row["method"].rpartition(" at ")[0], [])
        points.append((row["cpu_seconds"], row["mse_median"]))
    return series


def draw_by_bits(folder: Path) -> None:
    """Quality by method and bits over the comparisons of methods in `folder`, if there are several."""
    reports = [json.loads(path.read_text()) for path in sorted(folder.glob("methods-*.json"), reverse=True)]
    if len(reports) < 2:
        return
    names = list(dict.fromkeys(row["method"] for report in reports for row in report["rows"]))
    found = {bits_of(report): {row["method"]: row for row in report["rows"]} for report in reports}
    panels = {
        unit: {bits: [value(rows[n]) if n in rows else None for n in names] for bits, rows in found.items()}
        for unit, value in MEASURES.items()
    }
    title = f"{reports[0]['checkpoint']['name']} by method and bits, n = {reports[0]['n']}"
    write_text(folder / "methods.svg", markup(dots(panels, names, title)))


def bits_of(report: dict[str, Any]) -> str:
    return f"W{report['scheme']['weight_bits']}A{report['scheme']['activation_bits']}"


MEASURES: dict[str, Any] = {
    "PSNR to fp (dB)": lambda row: row["psnr_mean"],
    "SSIM to fp": lambda row: row["ssim_mean"],
    "KID to fp (x 1000)": lambda row: None if row["kid_to_fp"] is None else row["kid_to_fp"] * 1e3,
}


def main(folder: Annotated[Path, typer.Argument(help="Where the JSON lies.")]) -> None:
    """Draw every comparison of a folder anew."""
    for sweep in SWEEPS:
        for path in sorted(folder.glob(f"{sweep}-w*.json")):
            draw(path)
    draw_by_bits(folder)


if __name__ == "__main__":
    typer.run(main)
