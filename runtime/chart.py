"""A bar chart as SVG text, so that a machine without a plotting library draws what it measured."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

WIDTH, LEFT, RIGHT, ROW, HEAD = 720, 190, 90, 22, 34
COLOURS = ("#8a8f98", "#b9bdc4", "#1f6feb", "#79a9f5")
INK, FAINT = "#24292f", "#6e7781"


class Bar(NamedTuple):
    """A length with the stretch that most measurements fall in."""

    name: str
    value: float
    low: float
    high: float


def bars(groups: Mapping[str, Sequence[Bar]], *, title: str, caption: str, unit: str) -> str:
    """Groups one under the other, each on a scale of its own; every bar says its value in `unit`."""
    parts, y = [_text(16, 24, title, INK, 15)], HEAD + 12
    for heading, rows in groups.items():
        y += 14
        parts.append(_text(16, y, heading, FAINT, 12))
        y += 8
        longest = max(max(row.value, row.high) for row in rows)
        for n, row in enumerate(rows):
            to_x = (WIDTH - LEFT - RIGHT) / longest
            parts += _bar(row, y, to_x, COLOURS[n % len(COLOURS)], unit)
            y += ROW
        y += 8
    parts.append(_text(16, y + 14, caption, FAINT, 11))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y + 28}" viewBox="0 0 {WIDTH} {y + 28}">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="#ffffff"/>', *parts, "</svg>", ""])


def _bar(row: Bar, y: float, to_x: float, colour: str, unit: str) -> list[str]:
    middle, end = y + ROW / 2, LEFT + row.value * to_x
    low, high = LEFT + row.low * to_x, LEFT + row.high * to_x
    return [
        f'<text x="{LEFT - 8}" y="{middle + 4}" {_font(12)} fill="{INK}" text-anchor="end">{escape(row.name)}</text>',
        f'<rect x="{LEFT}" y="{y + 3}" width="{end - LEFT:.1f}" height="{ROW - 6}" fill="{colour}"/>',
        f'<path d="M{low:.1f} {middle}H{high:.1f}" stroke="{INK}" stroke-width="1.2"/>',
        _text(max(end, high) + 6, middle + 4, f"{row.value:.2f} {unit}", INK, 12),
    ]


def _text(x: float, y: float, text: str, colour: str, size: int) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {_font(size)} fill="{colour}">{escape(text)}</text>'


def _font(size: int) -> str:
    return f'font-family="system-ui, sans-serif" font-size="{size}"'
