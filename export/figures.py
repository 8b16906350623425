"""The report's plots and contact sheets, as data URIs: nothing outside the page is needed to show them."""

import base64
import io
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from ..runtime.pictures import grid, near_square

INK, MUTED, RULE = "#1f2933", "#667380", "#dde3e9"
MAIN, MARK = "#2f6690", "#c4622d"
SERIES = (MAIN, MARK, "#5b8c5a", "#8a5a9e", "#b3892d", "#4a4e69", "#3aa6a6", "#9aa5b1")
SIZE = (4.7, 2.9)  # inches; small, so that the text stays readable when a phone shrinks it

SHEET_PIXELS = 700  # width of a sheet: twice what the page gives it, for dense screens
MOST_COLUMNS, MOST_PIXELS = 8, 1024  # before enlarging; large pictures are shown in smaller number instead of shrunk

FEW_POINTS, FEW_SERIES = 20, 4  # up to which points are marked, and a legend finds room inside

# A fixed salt gives the same facts the same bytes.
STYLE: dict[Any, Any] = {"svg.hashsalt": "accuquant", "svg.fonttype": "path"}


def shown_columns(pictures: np.ndarray) -> int:
    """Columns of a sheet of uint8 (N, H, W, C); it shows at most their square of pictures."""
    fits = max(2, MOST_PIXELS // pictures.shape[2])
    return min(MOST_COLUMNS, fits, near_square(len(pictures)))


def sheet(pictures: np.ndarray) -> str:
    """The first pictures of uint8 (N, H, W, C), near-square and at most 8 x 8, as a PNG data URI."""
    columns = shown_columns(pictures)
    scale = max(1, round(SHEET_PIXELS / (columns * pictures.shape[2])))
    return png(grid(pictures[: columns**2], columns, scale=scale, gap=4))


def difference(fp: np.ndarray, quantized: np.ndarray) -> tuple[np.ndarray, int]:
    """|fp - quantized| times a power of two that uses the range but clips at most one pixel in a thousand.

    Two uint8 (N, H, W, C) to one of the same kind, and the gain (1 if there is nothing to enlarge).
    """
    apart = np.abs(fp.astype(np.int16) - quantized)
    high = float(np.quantile(apart, 0.999))
    gain = 1 if high < 1 else min(64, max(1, 2 ** int(np.log2(255.0 / high))))
    return np.minimum(apart * gain, 255).astype(np.uint8), gain


def histogram(values: Sequence[float], title: str, unit: str, form: str) -> str:
    """How many pictures fall where, with the mean marked (written in format `form`); an SVG data URI."""
    figure, axes = _axes(title, unit, "pictures")
    kept = np.array([v for v in values if np.isfinite(v)])
    if kept.size:
        bins = int(np.clip(2.0 * np.sqrt(kept.size), 5, 24))
        axes.hist(kept, bins=bins, color=MAIN, edgecolor="white", linewidth=0.8)
        axes.axvline(float(kept.mean()), color=MARK, linewidth=1.6, label=f"mean {kept.mean():{form}}")
        _legend(axes)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.ticklabel_format(axis="x", useOffset=False)
    return svg(figure)


def drift(steps: Sequence[int], median: Sequence[float], p10: Sequence[float], p90: Sequence[float], title: str) -> str:
    """Relative error (as a fraction) by sampling step, drawn in percent; an SVG data URI."""
    figure, axes = _axes(title, "sampling step", "relative error (%)")
    low, middle, high = (100.0 * np.asarray(v) for v in (p10, median, p90))
    few = "o" if len(steps) < 4 else None  # a line of one point cannot be seen
    axes.fill_between(steps, low, high, color=MAIN, alpha=0.2, linewidth=0, label="p10 to p90")
    axes.plot(steps, middle, color=MAIN, linewidth=2, marker=few, label="median")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    _legend(axes)
    return svg(figure)


def calibration(held_out: Mapping[int, float], kept: int, title: str) -> str:
    """Held-out error by iteration on a logarithmic axis, the kept iteration marked; an SVG data URI."""
    figure, axes = _axes(title, "iteration", "mean squared error")
    iterations = sorted(held_out)
    axes.plot(iterations, [held_out[i] for i in iterations], color=MAIN, linewidth=1.6, marker="o", markersize=4)
    if kept in held_out:
        label = f"kept: iteration {kept}, {held_out[kept]:.2e}"
        axes.plot([kept], [held_out[kept]], "o", color=MARK, markersize=9, label=label)
        _legend(axes)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return svg(figure)


def svg(figure: Figure) -> str:
    """A figure as an SVG data URI."""
    return _uri("image/svg+xml", markup(figure).encode())


def markup(figure: Figure) -> str:
    """A figure as SVG text; letters are drawn as outlines, so no font is needed."""
    with io.BytesIO() as file, mpl.rc_context(STYLE):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
        return file.getvalue().decode()


def png(image: Image.Image) -> str:
    """An image as a PNG data URI."""
    with io.BytesIO() as file:
        image.save(file, format="PNG", optimize=True)
        return _uri("image/png", file.getvalue())


def lines(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]], title: str, x: str, y: str, log: str = ""
) -> Figure:
    """Several named curves, each as (xs, ys), in the house style; `log` names the axes that are logarithmic."""
    figure, axes = _axes(title, x, y)
    for (name, (xs, ys)), colour in zip(series.items(), itertools.cycle(SERIES)):
        marker = "o" if len(xs) <= FEW_POINTS else None
        axes.plot(xs, ys, color=colour, linewidth=1.8, marker=marker, markersize=4, label=name)
    if "x" in log:
        axes.set_xscale("log", base=2)
        ticks = sorted({v for xs, _ in series.values() for v in xs})
        axes.set_xticks(ticks, [f"{v:g}" for v in ticks])
        axes.minorticks_off()
    if "y" in log:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    if len(series) <= FEW_SERIES:
        _legend(axes)
    else:  # they would lie on the curves
        figure.set_size_inches(SIZE[0] + 1.5, SIZE[1])
        figure.legend(loc="outside right center", frameon=False, fontsize=9.5, labelcolor=INK, handlelength=1.4)
    return figure


def dots(panels: Mapping[str, Mapping[str, Sequence[float | None]]], labels: Sequence[str], title: str) -> Figure:
    """Panels side by side, each {series: a value or None for every label}: labels down the side, one dot a series."""
    figure = Figure(figsize=(1.5 + 2.6 * len(panels), 1.3 + 0.27 * len(labels)), layout="constrained", facecolor="none")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold", color=INK)
    places = np.arange(len(labels))[::-1]
    for n, (unit, series) in enumerate(panels.items()):
        axes = _style(figure.add_subplot(1, len(panels), n + 1, facecolor="none"), unit, "", rule="both")
        for (name, values), colour in zip(series.items(), itertools.cycle(SERIES)):
            shown = [(v, y) for v, y in zip(values, places, strict=True) if v is not None]
            axes.plot([v for v, _ in shown], [y for _, y in shown], "o", color=colour, markersize=6.5, label=name)
        axes.set_yticks(places, labels if n == 0 else [""] * len(labels))
        axes.set_ylim(-0.6, len(labels) - 0.4)
        axes.margins(x=0.12)
        axes.xaxis.set_major_locator(MaxNLocator(4))
    if len(next(iter(panels.values()))) > 1:
        handles, names = figure.axes[0].get_legend_handles_labels()
        figure.legend(
            handles, names, loc="outside lower left", ncols=len(names), frameon=False, fontsize=9.5, labelcolor=INK
        )
    return figure


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _axes(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    """An empty plot in the house style. `Figure` directly: pyplot would keep every figure alive, and pick a backend."""
    figure = Figure(figsize=SIZE, layout="constrained", facecolor="none")
    axes = figure.add_subplot(facecolor="none")
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK, pad=10)
    return figure, _style(axes, x, y)


def _style(axes: Axes, x: str, y: str, rule: Literal["both", "x", "y"] = "y") -> Axes:
    axes.set_xlabel(x, fontsize=10, color=MUTED)
    axes.set_ylabel(y, fontsize=10, color=MUTED)
    axes.tick_params(which="both", colors=MUTED, labelsize=9.5, length=0)
    axes.grid(axis=rule, color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    return axes


def _legend(axes: Axes) -> None:
    axes.legend(frameon=False, fontsize=9.5, labelcolor=INK, loc="best", handlelength=1.4)
