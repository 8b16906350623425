"""Comparisons of methods, and what an iteration costs, as markdown: from the JSON of the tools that measured them."""

from typing import Any

from accuquant.calibrate.scheme import QuantScheme
from draw_comparison import by_time
from tables import machine

# What the first column of a comparison holds.
TITLES = {
    "methods": "calibration",
    "m": "group",
    "gradient": "gradient",
    "start": "groups start from",
    "sharing": "activation parameters",
    "learned": "what is learned",
    "correction": "calibration",
    "budget": "learner, share of the budget",
}


def methods_table(report: dict[str, Any]) -> str:
    """The entries of a comparison side by side, as markdown."""
    lines = [
        f"| {TITLES[report['sweep']]} | M | iterations | PSNR to fp, mean (p10) "
        "| SSIM | MSE, mean (median) | CPU time |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in report["rows"]:
        spec = row["spec"]
        steps = spec["warmup"] + spec["iterations"]
        whole = row["kind"] == "learned" and steps > 0
        back = f", best after {row['kept']}" if whole and row["kept"] < steps else ""
        lines.append(
            f"| {row['method']} | {spec['group'] if whole else '-'} | {steps or '-'}{back} "
            f"| {row['psnr_mean']:.2f} ({row['psnr_p10']:.2f}) dB | {row['ssim_mean']:.4f} "
            f"| {row['mse']:.2e} ({row['mse_median']:.2e}) | {row.get('cpu_seconds', row['seconds']):.0f} s |"
        )
    scheme = QuantScheme.model_validate(report["scheme"])
    where = machine(report["machine"])
    caption = (
        f"{scheme.name}, policy {scheme.described}, {report['checkpoint']['name']}, "
        f"sampler: {report['sampler']}, {report['steps']} steps, "
        f"n = {report['n']} held-out seeds, sampled on {engines(report['rows'])}; learners have "
        f"{report['budget_calls'] / 1e3:.0f} thousand network calls each; {where}."
    )
    found = [time_to_equal(report)] if report["sweep"] == "budget" else []
    return "\n".join([*lines, "", " ".join([caption, *found])])


def engines(rows: list[dict[str, Any]]) -> str:
    """The engine of all rows; where there are several, each with the rows that it sampled."""
    by_engine: dict[str, list[str]] = {}
    for row in rows:
        by_engine.setdefault(row["sampled_on"], []).append(row["method"])
    if len(by_engine) == 1:
        return next(iter(by_engine))
    return ", ".join(f"{engine} ({', '.join(methods)})" for engine, methods in by_engine.items())


def time_to_equal(report: dict[str, Any]) -> str:
    """How long the other learners of a sweep of budgets need to be as close as block-wise reconstruction ever gets."""
    learners = by_time(report["rows"])
    rival = next(name for name in learners if name.startswith("block-wise"))
    after, bar = min(learners.pop(rival), key=lambda point: point[1])
    told = []
    for name, points in learners.items():
        enough = [seconds for seconds, error in points if error <= bar]
        told.append(f"{name} after {min(enough):.0f} s" if enough else f"{name} is not within its budget")
    return f"As close as {rival} comes at best (median {bar:.2e}, after {after:.0f} s): {', '.join(told)}."


def cost_table(report: dict[str, Any]) -> str:
    """Peak memory and time of an iteration by M, as markdown."""
    depths = sorted({row["group"] for row in report["rows"]})
    lines = [
        "| gradient | " + " | ".join(f"M = {m}" for m in depths) + " |",
        "|---|" + "---:|" * len(depths),
    ]
    for gradient in dict.fromkeys(row["gradient"] for row in report["rows"]):
        cells = {row["group"]: row for row in report["rows"] if row["gradient"] == gradient}
        shown = [
            f"{cells[m]['peak_bytes'] / 2**30:.2f} GiB, {cells[m]['seconds']:.1f} s"
            if m in cells and "peak_bytes" in cells[m]
            else (f"> {cells[m]['beyond_bytes'] / 2**30:.0f} GiB" if m in cells else "")
            for m in depths
        ]
        lines.append(f"| {gradient} | " + " | ".join(shown) + " |")
    caption = (
        f"Peak memory of the process and time of one iteration, {report['model']}, {report['scheme']}, batch "
        f"{report['batch']}, {report['threads']} threads{'; ' + report['note'] if report.get('note') else ''}; "
        f"{machine(report['machine'])}."
    )
    return "\n".join([*lines, "", caption])
