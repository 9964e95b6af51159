"""Percentiles of many measurements of one quantity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import UsageError

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True)
class Distribution:
    """Percentiles of `count` measurements; p99 of few is their largest."""

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Distribution:
        """UsageError: there are no values."""
        if not values:
            raise UsageError("measurements", got="none", accepted="at least one")
        ordered = sorted(values)
        return cls(len(values), math.fsum(values) / len(values), *(percentile(ordered, p) for p in PERCENTILES))


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Of ascending values: the smallest that at least `percent` % of them do not exceed (nearest rank)."""
    return ordered[max(math.ceil(percent / 100 * len(ordered)) - 1, 0)]
