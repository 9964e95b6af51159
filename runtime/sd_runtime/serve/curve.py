"""What an evaluation of the UNet costs, by its rows: measured at warm-up, and kept true by what is run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

WEIGHT = 0.1  # of the newest observation
Shape = tuple[int, ...]


class StepCurve:
    """Seconds of one evaluation by its number of rows: between measured points a straight line, beyond the last one on
    with the last slope, below the first the first."""

    def __init__(self, points: Mapping[int, float]) -> None:
        """`points`: rows → seconds, one or more."""
        if not points or any(rows < 1 or not seconds > 0 for rows, seconds in points.items()):
            raise ValueError(f"points of a curve: {points}")
        self._points = dict(sorted(points.items()))

    @property
    def points(self) -> dict[int, float]:
        return dict(self._points)

    def seconds(self, rows: int) -> float:
        if rows in self._points:
            return self._points[rows]
        known = list(self._points.items())
        if len(known) == 1 or rows < known[0][0]:
            return known[0][1]
        right = next((n for n, (at, _) in enumerate(known) if at > rows), len(known) - 1)
        (low, before), (high, after) = known[right - 1], known[right]
        if rows > high:
            return after + max(after - before, 0.0) / (high - low) * (rows - high)
        return before + (after - before) / (high - low) * (rows - low)

    def observe(self, rows: int, seconds: float) -> None:
        """Take what an evaluation took into account; a slow one, of a machine that was busy, moves it a little."""
        before = self.seconds(rows)
        self._points[rows] = before + WEIGHT * (min(seconds, 4 * before) - before)
        self._points = dict(sorted(self._points.items()))


def measure(evaluate: Callable[[int], object], rows: Iterable[int], repeats: int = 3) -> StepCurve:
    """Run `evaluate(rows)` once to warm up and then `repeats` times for each number of rows; the medians."""
    points = {}
    for count in rows:
        evaluate(count)
        points[count] = statistics.median(_timed(evaluate, count) for _ in range(repeats))
    return StepCurve(points)


def _timed(evaluate: Callable[[int], object], rows: int) -> float:
    started = time.perf_counter()
    evaluate(rows)
    return time.perf_counter() - started


class Curves:
    """A curve for each shape of latents (C, h, w): shapes that were not measured begin as the measured one, scaled by
    their area, and learn."""

    def __init__(self, shape: Shape, measured: StepCurve) -> None:
        self._shape, self._curves = shape, {shape: measured}

    def of(self, shape: Shape) -> StepCurve:
        if shape not in self._curves:
            scale = _area(shape) / _area(self._shape)
            points = self._curves[self._shape].points
            self._curves[shape] = StepCurve({rows: scale * seconds for rows, seconds in points.items()})
        return self._curves[shape]


def _area(shape: Shape) -> int:
    return shape[-1] * shape[-2]


def widths(allowed: Sequence[int]) -> list[int]:
    """Which numbers of rows to measure: of those that the UNet takes 1, 2, 4, 8 … and the largest."""
    doubled = {1 << n for n in range(max(allowed).bit_length())}
    return sorted({rows for rows in allowed if rows in doubled} | {min(allowed), max(allowed)})
