"""Plots: well-formed, within their frame, true to the numbers."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sd_runtime.bench.charts import WIDTH, Axis, Bar, Line, bar_chart, line_chart, standalone

values = st.floats(-1e12, 1e12) | st.sampled_from([0.0, math.inf, -math.inf, math.nan])
positive = st.floats(1e-12, 1e12)


def parse(chart: str) -> ElementTree.Element:
    return ElementTree.fromstring(chart)


def numbers(chart: str) -> list[float]:
    """Every coordinate along x."""
    root = parse(chart)
    found = [float(e.attrib[name]) for e in root.iter() for name in ("x", "x1", "x2", "cx") if name in e.attrib]
    lines = [e.attrib["points"] for e in root.iter() if "points" in e.attrib]
    return found + [float(pair.split(",")[0]) for line in lines for pair in line.split()]


@given(st.lists(st.tuples(values, values), max_size=12), st.booleans())
def test_line_charts_stay_in_their_frame(points: list[tuple[float, float]], log: bool) -> None:
    placed = [(float(i), y) for i, (_, y) in enumerate(points)]
    chart = line_chart("A < B", [Line("a & b", placed)], x_label="x", y_label="y", log=log, limit=1.0)
    assert all(0 <= x <= WIDTH for x in numbers(chart))
    assert "nan" not in chart and "inf" not in chart


@given(st.lists(values, max_size=12), st.booleans())
def test_bar_charts_stay_in_their_frame(lengths: list[float], log: bool) -> None:
    chart = bar_chart("bars", [Bar(f"bar {i}", v, "x", limit=2.0) for i, v in enumerate(lengths)], log=log)
    assert all(0 <= x <= WIDTH for x in numbers(chart))
    widths = [float(e.attrib["width"]) for e in parse(chart).iter() if e.tag == "rect"]
    assert len(widths) == len(lengths) and all(0 < width < WIDTH for width in widths)


@given(positive, positive)
def test_a_longer_bar_is_more(a: float, b: float) -> None:
    for log in (False, True):
        axis = Axis.over([a, b], 0, 100, log=log)
        assert (axis(a) < axis(b)) == (a < b) or math.isclose(axis(a), axis(b), abs_tol=1e-6)


def test_linear_bars_are_proportional() -> None:
    chart = bar_chart("bars", [Bar("one", 1, ""), Bar("two", 2, ""), Bar("four", 4, "")])
    one, two, four = (float(width) for width in re.findall(r'<rect x="8"[^>]* width="([\d.]+)"', chart))
    assert two == pytest.approx(2 * one, abs=0.2) and four == pytest.approx(4 * one, abs=0.3)


def test_ticks() -> None:
    decades = [text for _, text in Axis.over([3e-7, 2e-3], 0, 1, log=True).ticks]
    assert decades == ["10⁻⁷", "10⁻⁶", "10⁻⁵", "10⁻⁴", "10⁻³", "10⁻²"]
    assert [value for value, _ in Axis.over([0, 10], 0, 1).ticks] == [0, 5, 10]
    assert [text for _, text in Axis.over([0.7], 0, 1).ticks] == ["0", "0.2", "0.4", "0.6"]
    assert len(Axis.over([1e-30, 1e30], 0, 1, log=True).ticks) <= 6


def test_text_is_escaped_and_series_are_told_apart() -> None:
    chart = bar_chart('<i> & "x"', [Bar("<b>", 1, "&", 0), Bar("<b>", 2, "&", 1)], series=("ours", "theirs"))
    text = "".join(parse(chart).itertext())
    assert text.count("<b>") == 1  # one label for both bars
    assert "ours" in text and "theirs" in text and '<i> & "x"' in text
    assert chart.count("var(--series-0") == chart.count("var(--series-1") == 2


def test_standalone_stacks_charts() -> None:
    one = bar_chart("one", [Bar("a", 1, "1")])
    both = parse(standalone([one, one]))
    height = float(parse(one).attrib["viewBox"].split()[3])
    assert float(both.attrib["viewBox"].split()[3]) == 2 * height
    places = [element.attrib["transform"] for element in both if element.tag.endswith("g")]
    assert places == ["translate(0 0)", f"translate(0 {height:g})"]
