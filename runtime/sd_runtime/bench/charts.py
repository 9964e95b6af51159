"""Small charts as SVG, made by hand: bars and lines, on linear or logarithmic axes, readable at a phone's width.

A chart is 360 units wide and scales with its place.  Text takes the page's colour; series colours are the CSS variables
--series-0, --series-1, …, with fallbacks.  `standalone` makes a file of its own of one or more charts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 360
LEFT, RIGHT, TOP, BOTTOM = 48, 14, 30, 40  # margins around the plot of a line chart
PLOT = 150  # its height
ROW, LABEL_ROW = 16, 17  # heights of a bar and of the label above it
COLOURS = ("#2f6fb3", "#c8641e", "#3c8c4f", "#8d5aa8")
LIMIT = "#c0322b"
STYLE = (
    "svg.chart{width:100%;height:auto;font:11px system-ui,sans-serif}svg.chart text{fill:currentColor}"
    "svg.chart .title{font-size:13px;font-weight:600}svg.chart .axis{stroke:currentColor;stroke-opacity:.25}"
    "svg.chart .faint{fill-opacity:.7}"
)


@dataclass(frozen=True)
class Bar:
    """One bar: what it stands for, how long it is, what is written at its end, which series it belongs to, and a limit
    that is marked across it."""

    label: str
    value: float
    text: str
    series: int = 0
    limit: float | None = None


@dataclass(frozen=True)
class Line:
    """One curve; points from left to right."""

    label: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Axis:
    """A range of values on a stretch of the chart, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @classmethod
    def over(cls, values: Iterable[float], start: float, end: float, *, log: bool = False) -> Axis:
        """The axis that holds all finite `values`: whole decades, or from 0 (or the least, if negative) up."""
        finite = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
        if not log:
            return cls(min([0.0, *finite]), max(finite, default=0) or 1.0, start, end)
        low = math.floor(math.log10(min(finite, default=1)))
        high = math.ceil(math.log10(max(finite, default=1)))
        return cls(low, max(high, low + 1), start, end, log=True)

    def __call__(self, value: float) -> float:
        """Where `value` lies, held to the axis: NaN and infinity at its end, what has no logarithm at its start."""
        if math.isnan(value):
            value = math.inf
        if self.log:
            value = math.log10(value) if value > 0 else -math.inf
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Values worth a label: at most six, decades or round numbers."""
        if self.log:
            stride = math.ceil((self.high - self.low) / 5)
            return [(10.0**e, _power(e)) for e in range(int(self.low), int(self.high) + 1, stride)]
        step = _round_step((self.high - self.low) / 4)
        first, last = math.ceil(self.low / step), math.floor(self.high / step * (1 + 1e-9))
        return [(i * step, f"{i * step:g}") for i in range(first, last + 1)]


def _power(exponent: int) -> str:
    return "1" if exponent == 0 else "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _round_step(step: float) -> float:
    """The next 1, 2 or 5 times a power of ten."""
    decade = 10.0 ** math.floor(math.log10(step))
    return next(factor * decade for factor in (1, 2, 5, 10) if factor * decade >= step * (1 - 1e-9))


def bar_chart(title: str, bars: Sequence[Bar], *, series: Sequence[str] = (), log: bool = False) -> str:
    """Horizontal bars, each below its label; on a logarithmic axis they start at a power of ten.  `series` names the
    bars' colours."""
    values = [v for bar in bars for v in (bar.value, bar.limit) if v is not None]
    axis = Axis.over(values, 8, WIDTH - 70, log=log)
    parts, y = [], TOP
    for i, bar in enumerate(bars):
        if i == 0 or bar.label != bars[i - 1].label:
            y += LABEL_ROW
            parts.append(_text(8, y - 5, bar.label))
        length = max(axis(bar.value) - axis.start, 1.5)
        parts.append(f'<rect x="8" y="{y}" width="{length:.1f}" height="{ROW - 5}" fill="{_colour(bar.series)}"/>')
        if bar.limit is not None:
            x = axis(bar.limit)
            line = (
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y - 3}" y2="{y + ROW - 2}" stroke="{LIMIT}" stroke-width="2"/>'
            )
            parts.append(line)
        end = max(axis(v) for v in (bar.value, bar.limit if bar.limit is not None else bar.value))
        parts.append(_text(end + 6, y + 10, bar.text, "faint"))
        y += ROW
    return _svg(title, y + 8, parts + _legend(series))


def line_chart(
    title: str, lines: Sequence[Line], *, x_label: str, y_label: str, log: bool = False, limit: float | None = None
) -> str:
    """Curves over a common x axis; `limit` is a horizontal line."""
    points = [point for line in lines for point in line.points]
    height = TOP + 18 + PLOT + BOTTOM
    low, high = min((x for x, _ in points), default=0), max((x for x, _ in points), default=1)
    across = Axis(low, high if high > low else low + 1, LEFT, WIDTH - RIGHT)
    up = Axis.over([*(y for _, y in points), *([] if limit is None else [limit])], TOP + 18 + PLOT, TOP + 18, log=log)
    parts = [_text(8, TOP + 2, y_label, "faint")]
    for value, text in up.ticks:
        y = up(value)
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(LEFT - 5, y + 4, text, "faint", "end"))
    for value, text in across.ticks:
        parts.append(_text(across(value), TOP + 18 + PLOT + 16, text, "faint", "middle"))
    parts.append(_text(WIDTH / 2, height - 6, x_label, "faint", "middle"))
    if limit is not None:
        y = up(limit)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="{LIMIT}"/>')
        parts.append(_text(WIDTH - RIGHT, y - 4, "limit", "faint", "end"))
    for series, line in enumerate(lines):
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in line.points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{_colour(series)}" stroke-width="2"/>')
        dots = line.points if len(line.points) < 30 else []
        parts += [f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="3" fill="{_colour(series)}"/>' for x, y in dots]
    return _svg(title, height, parts + _legend([line.label for line in lines]))


def standalone(charts: Sequence[str]) -> str:
    """Charts below each other as one SVG file, dark on white."""
    heights = [float(chart.split('viewBox="0 0 ', 1)[1].split('"', 1)[0].split()[1]) for chart in charts]
    placed = [
        f'<g transform="translate(0 {sum(heights[:i]):g})">{chart.split(">", 1)[1].removesuffix("</svg>")}</g>'
        for i, chart in enumerate(charts)
    ]
    total = sum(heights)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="0 0 {WIDTH} {total:g}" '
        f'width="{2 * WIDTH}" height="{2 * total:g}" color="#1c1c1c"><style>{STYLE}</style>'
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(placed)}</svg>\n'
    )


def _legend(labels: Sequence[str]) -> list[str]:
    """What the colours of several series mean, to the right of the title."""
    parts: list[str] = []
    if len(labels) < 2:
        return parts
    x = WIDTH - 4.0 - sum(28 + 6 * len(label) for label in labels)
    for series, label in enumerate(labels):
        parts.append(f'<rect x="{x}" y="{TOP - 22}" width="10" height="10" fill="{_colour(series)}"/>')
        parts.append(_text(x + 14, TOP - 13, label))
        x += 28 + 6 * len(label)
    return parts


def _svg(title: str, height: float, parts: Sequence[str]) -> str:
    label = escape(title, quote=True)
    head = f'<svg class="chart" viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{label}">'
    return head + _text(8, 17, title, "title") + "".join(parts) + "</svg>"


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    style = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{style} text-anchor="{anchor}">{escape(text)}</text>'


def _colour(series: int) -> str:
    index = series % len(COLOURS)
    return f"var(--series-{index},{COLOURS[index]})"
