"""Ratios of scripts/benchmark.py then and now.

Ratios are compared rather than seconds: both sides are measured in turns, so a slow day of the machine hits both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sd_runtime.bundle.schema import from_json, parse_json
from sd_runtime.errors import UsageError

TOLERANCE = 0.2  # of a ratio: two measurements on one machine differ by as much


@dataclass(frozen=True)
class Baseline:
    """Ratios by name, diffusers' median by ours, and the machine and libraries that they were measured with."""

    machine: dict[str, str]
    libraries: dict[str, str]
    ratios: dict[str, float]


@dataclass(frozen=True)
class Change:
    """One ratio then and now; None where it was not measured."""

    name: str
    before: float | None
    now: float | None

    @property
    def verdict(self) -> str:
        """`worse` and `better` are beyond what noise explains."""
        if self.before is None or self.now is None:
            return "new" if self.before is None else "not measured"
        change = self.now / self.before
        return "worse" if change < 1 - TOLERANCE else "better" if change > 1 / (1 - TOLERANCE) else "as before"


def read_baseline(path: Path) -> Baseline:
    """UsageError: the file cannot be read; BundleError: it is no baseline."""
    try:
        return from_json(Baseline, parse_json(path.read_bytes(), path.name), path.name)
    except OSError as error:
        raise UsageError(f"cannot read {path} ({error.strerror})", remedy="make one with `write_baseline`") from error


def changes(before: Baseline, now: Baseline) -> list[Change]:
    """Every ratio of either, in the baseline's order."""
    names = dict.fromkeys([*before.ratios, *now.ratios])
    return [Change(name, before.ratios.get(name), now.ratios.get(name)) for name in names]


def table(found: Sequence[Change], before: Baseline, now: Baseline) -> str:
    """The changes for people, and how the machines differ if they do."""
    rows = [f"{c.name:14}{_ratio(c.before)}{_ratio(c.now)}   {c.verdict}" for c in found]
    then, today = {**before.machine, **before.libraries}, {**now.machine, **now.libraries}
    differing = [
        f"{key} {then.get(key)} → {today.get(key)}" for key in {**then, **today} if then.get(key) != today.get(key)
    ]
    note = [f"the baseline was measured on something else: {', '.join(differing)}"] if differing else []
    return "\n".join([f"{'ratio':14}{'baseline':>10}{'now':>10}", *rows, *note])


def _ratio(value: float | None) -> str:
    return f"{'–' if value is None else f'{value:.2f}':>10}"
