"""The report of a bundle: `report.json` for programs and one `index.html` for people, which needs no other file.

Every number on the page is computed from `ReportFacts`; the page says next to each how many pictures it stands on.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np

from ..calibrate.guard import verdict
from ..runtime.errors import AccuQuantError
from ..runtime.fidelity import PSNR_CAP
from ..runtime.files import write_text
from . import figures
from .report_facts import DriftPoint, LayerRow, ReportFacts
from .report_style import CSS
from .tuning import Tuning

NOT_INSPECTED = "not inspected"
LATENT = "; latents without a decoder, of which the first channel is shown"


def write_report(folder: Path, facts: ReportFacts, fp: np.ndarray, quantized: np.ndarray) -> Path:
    """Write `report.json` and `index.html` into `folder`; returns the latter's path.

    `fp` and `quantized` are uint8 (N, H, W, C): the same seeds in the same order. Of other than 1 or 3 channels, as
    latents without their decoder have, sheets show the first.

    Raises:
        AccuQuantError: the pictures do not belong together, or the folder cannot be written.
    """
    if fp.shape != quantized.shape:
        raise AccuQuantError(f"the report compares pictures pairwise, but got {fp.shape} and {quantized.shape}")
    page = folder / "index.html"
    # ASCII with character references: the page is the same under every locale's encoding.
    text = _page(facts, fp, quantized).encode("ascii", "xmlcharrefreplace").decode()
    write_text(folder / "report.json", facts.model_dump_json(indent=1) + "\n")
    write_text(page, text)
    return page


def _page(facts: ReportFacts, fp: np.ndarray, quantized: np.ndarray) -> str:
    body = (
        _header(facts)
        + _section("Pictures", _sheets(facts, fp, quantized))
        + _section("Fidelity to the full-precision twin", _plots(facts))
        + _section("Cost", f'<div class="pair">{_sizes(facts.sizes)}{_times(facts)}</div>')
        + _section("Operators", _layers(facts.layers))
        + ("" if facts.tuning is None else _section("Left in float for speed", _tuning(facts.tuning)))
        + _foot(facts)
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(facts.title)}</title><style>{CSS}</style></head>\n<body><main>{body}</main></body></html>\n"
    )


def _header(facts: ReportFacts) -> str:
    words = (facts.found, f"{facts.sampler}, {facts.steps} steps", f"target {facts.target}", f"policy {facts.policy}")
    return (
        f"<header><h1>{escape(facts.title)}</h1>\n<p class='lead'>{_summary(facts)}</p>\n"
        f"<p class='meta'>{' &middot; '.join(escape(w) for w in words)}</p></header>\n"
    )


def _summary(facts: ReportFacts) -> str:
    """The headline: fidelity with its n, and how much smaller the graph became."""
    text = (
        f"Sampled from the same seeds as its full-precision twin, <b>{escape(facts.scheme)}</b> reaches "
        f"<b>{_mean(facts.psnr):.2f} dB</b> PSNR and <b>{_mean(facts.ssim):.4f}</b> SSIM "
        f"(means, n = {facts.n}, seeds {_seeds(facts)})"
    )
    before, after = facts.sizes.get("fp32 graph"), facts.sizes.get("quantized graph")
    if before and after:
        text += f" with a graph of <b>{_bytes(after)}</b> instead of {_bytes(before)}, <b>{_smaller(before, after)}</b>"
    return text + "."


def _sheets(facts: ReportFacts, fp: np.ndarray, quantized: np.ndarray) -> str:
    undecoded = fp.shape[3] not in (1, 3)
    if undecoded:
        fp, quantized = fp[..., :1], quantized[..., :1]
    shown = min(len(fp), figures.shown_columns(fp) ** 2)
    apart, gain = figures.difference(fp[:shown], quantized[:shown])
    sheets = (
        (fp, "Full precision", f"fp32 twin, {shown} of n = {facts.n}" + LATENT * undecoded),
        (quantized, facts.scheme, "same seeds, same order"),
        (apart, "Difference", f"absolute, gain {gain}&times;"),
    )
    return '<div class="trio">{}</div>'.format(
        "".join(
            _figure(figures.sheet(pictures), f"{name}: sheet of {shown} pictures", f"<b>{escape(name)}</b> {note}")
            for pictures, name, note in sheets
        )
    )


def _plots(facts: ReportFacts) -> str:
    n = f"n = {facts.n}"
    capped = sum(v >= PSNR_CAP for v in facts.psnr)
    plots = [
        _figure(
            figures.histogram(facts.psnr, f"PSNR, {n}", "dB", ".2f"),
            f"Histogram of PSNR, {n}",
            f"{_spread(facts.psnr, '.2f', ' dB')}. Higher is better; capped at {PSNR_CAP:g} dB"
            + (f", which {capped} of {facts.n} reach." if capped else "."),
        ),
        _figure(
            figures.histogram(facts.ssim, f"SSIM, {n}", "SSIM", ".4f"),
            f"Histogram of SSIM, {n}",
            f"{_spread(facts.ssim, '.4f')}. 1 is identical (Wang et al., 2004).",
        ),
    ]
    if facts.drift:
        plots.append(_drift(facts.drift, n))
    held_out = {i: v for i, v in facts.held_out.items() if v > 0 and math.isfinite(v)}
    if len(held_out) > 1:
        plots.append(_calibration(facts, held_out))
    return f'<div class="pair">{"".join(plots)}</div>'


def _drift(drift: Sequence[DriftPoint], n: str) -> str:
    first, last = drift[0], drift[-1]
    picture = figures.drift(
        [p.step for p in drift],
        [p.median for p in drift],
        [p.p10 for p in drift],
        [p.p90 for p in drift],
        f"Drift along the chain, {n}",
    )
    return _figure(
        picture,
        f"Relative error by sampling step, {n}",
        f"&#8214;x&#771;<sub>t</sub> &minus; x<sub>t</sub>&#8214; / &#8214;x<sub>t</sub>&#8214; per picture. "
        f"Step {first.step} is timestep {first.timestep:g}, step {last.step} timestep {last.timestep:g}, where the "
        f"median ends at {last.median:.2%}.",
    )


def _calibration(facts: ReportFacts, held_out: Mapping[int, float]) -> str:
    judges = facts.calibration.get("held_out")
    n = f", n = {judges}" if isinstance(judges, int) else ""
    kept = held_out.get(facts.kept)
    begun = facts.begun or f"{held_out[min(held_out)]:.2e} before"
    change = f" {begun}, {kept:.2e} kept." if kept is not None else ""
    return _figure(
        figures.calibration(held_out, facts.kept, f"Calibration, held-out error{n}"),
        f"Held-out error by calibration iteration{n}",
        f"End-of-chain error of seeds that calibration never trains on.{change}"
        + (f" Begun from {escape(facts.beginning)}." if facts.beginning else "")
        + (f" Group by group, from the teacher's latents: {escape(verdict(facts.groups))}." if facts.groups else ""),
    )


def _sizes(sizes: Mapping[str, int]) -> str:
    rows = []
    for name, size in sizes.items():
        pair = name.replace("quantized", "fp32") if name.startswith("weights") else "fp32 graph"
        before = sizes.get(pair, 0) if "quantized" in name else 0
        rows.append((escape(SIZE_NAMES.get(name, name)), _bytes(size), _smaller(before, size) if before else ""))
    return _table("Size", ("", "size", "against fp32"), rows)


def _times(facts: ReportFacts) -> str:
    """Times, and the ratio of both samplings: only a pair measured in the same run may be compared."""
    fp, rows = facts.times.get("fp sampling"), []
    for name, seconds in facts.times.items():
        note = f"{facts.n} pictures" if name.endswith("sampling") else ""
        if name == "int sampling" and fp:
            note = f"{seconds / fp:.2f}&times; fp32, measured in the same run"
        rows.append((escape(TIME_NAMES.get(name, name)), _time(seconds), note))
    return _table("Time on this machine", ("", "wall clock", ""), rows)


def _layers(layers: Sequence[LayerRow]) -> str:
    heads = (
        "name",
        "kind",
        "role",
        "weight bits",
        "stored as",
        "inputs",
        "parameters",
        "stored",
        "runs as",
        "reference",
        "engine",
    )
    rows = (
        (
            f"<code>{escape(row.name)}</code>",
            row.kind,
            escape(row.role),
            "&ndash;" if row.weight_bits is None else str(row.weight_bits),
            escape(row.weight_container.replace("-", "–")),
            escape(row.inputs),
            f"{row.parameters:,}" if row.parameters else "&ndash;",
            _bytes(row.stored_bytes) if row.stored_bytes else "&ndash;",
            escape(row.runs_as),
            *("&ndash;" if db is None else f"{db:.0f} dB" for db in (row.reference_db, row.engine_db)),
        )
        for row in layers
    )
    table = _table("", heads, rows, "layers")
    return f"<p>{_counted(layers)} {_alike(layers)}</p>\n<div class='scroll'>{table}</div>"


def _counted(layers: Sequence[LayerRow]) -> str:
    """How many operators there are at each precision, and in which precisions the engine runs them."""
    if not layers:
        return "<b>Nothing is quantized.</b>"
    stored = Counter((row.weight_bits, row.weight_container) for row in layers)
    kinds = [
        f"{count} with {bits}-bit weights ({escape(container)})"
        if bits
        else f"{count} product{'s' * (count > 1)} of activations"
        for (bits, container), count in sorted(stored.items(), key=lambda item: item[0][0] or 99)
    ]
    text = f"<b>{len(layers)} quantized operators</b>: {', '.join(kinds)}."
    ran = Counter(row.runs_as for row in layers if row.runs_as != NOT_INSPECTED)
    missing = len(layers) - ran.total()
    words = [f"{count} as <b>{escape(word)}</b>" for word, count in ran.most_common()]
    words += [f"{missing} {NOT_INSPECTED}"] if missing else []
    kept = Counter(row.why for row in layers if row.why)
    reasons = "".join(f" {count} kept in float: {escape(why)}." for why, count in kept.items())
    return f"{text} Kernels, in the engine's own words: {', '.join(words)}.{reasons}"


def _alike(layers: Sequence[LayerRow]) -> str:
    """How far any layer alone is from its simulation, at most."""
    sides = {"graph": [row.reference_db for row in layers], "engine": [row.engine_db for row in layers]}
    least = {side: min(known) for side, many in sides.items() if (known := [db for db in many if db is not None])}
    if not least:
        return ""
    words = " and the ".join(f"{side} computes every one to at least <b>{db:.0f} dB</b>" for side, db in least.items())
    apart = "where no value lies on a rounding boundary"
    return f"Given the simulation's input, the {words} of what calibration simulated, {apart}."


def _tuning(tuning: Tuning) -> str:
    rows = (
        (
            escape(g.form),
            str(len(g.layers)),
            escape(str(g.saves)),
            str(g.saves.n),
            "float" if g.in_float else "integers",
        )
        for g in sorted(tuning.groups, key=lambda g: -g.saves.median)
    )
    heads = ("layers", "how many", "a step saves with them in float", "n", "run in")
    return f"<p>{escape(tuning.told)}.</p>\n<div class='scroll'>{_table('', heads, rows, 'layers')}</div>"


def _foot(facts: ReportFacts) -> str:
    lists = (
        ("Machine", {**facts.machine, "engine": facts.engine}),
        ("Versions", facts.versions),
        ("Calibration", facts.calibration),
    )
    return "<footer>{}</footer>\n".format(
        "".join(
            f"<section><h3>{title}</h3><dl>"
            + "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in entries.items())
            + "</dl></section>"
            for title, entries in lists
        )
    )


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>\n{content}</section>\n"


def _figure(uri: str, alternative: str, caption: str) -> str:
    """`alternative` is plain text, `caption` is HTML."""
    return f'<figure><img src="{uri}" alt="{escape(alternative)}"><figcaption>{caption}</figcaption></figure>\n'


def _table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[str]], style: str = "facts") -> str:
    """Cells are HTML already."""
    title = f"<caption>{caption}</caption>" if caption else ""
    top = "".join(f"<th scope='col'>{head}</th>" for head in heads)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f"<table class='{style}'>{title}<thead><tr>{top}</tr></thead>\n<tbody>{body}</tbody></table>\n"


def _seeds(facts: ReportFacts) -> str:
    return f"{facts.seeds_first}" + (f"&ndash;{facts.seeds_first + facts.n - 1}" if facts.n > 1 else "")


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan


def _spread(values: Sequence[float], form: str, unit: str = "") -> str:
    if not values:
        return "No pictures"
    low, high = np.percentile(values, [10, 90])
    return f"Mean {_mean(values):{form}}{unit}, p10 {low:{form}}, p90 {high:{form}}"


def _smaller(before: int, after: int) -> str:
    ratio = before / after if after else math.inf
    return f"{ratio:.2f}&times; smaller" if ratio >= 1 else f"{1 / ratio:.2f}&times; larger"


def _bytes(size: int) -> str:
    for unit, power in (("MiB", 20), ("KiB", 10)):
        if size >= 2**power:
            return f"{size / 2**power:.2f} {unit}" if power == 20 else f"{size / 2**power:.1f} {unit}"
    return f"{size} B"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


SIZE_NAMES = {
    "checkpoint": "Checkpoint, as found",
    "fp32 graph": "Graph, fp32 twin",
    "quantized graph": "Graph, quantized",
    "weights fp32": "Quantized operators' weights, fp32",
    "weights quantized": "The same weights, as stored",
}

TIME_NAMES = {
    "calibration": "Calibration",
    "export": "Export",
    "fp sampling": "Sampling, fp32 twin",
    "int sampling": "Sampling, quantized",
}
