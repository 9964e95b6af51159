"""Whether ratios to diffusers are what they were: reports, and never fails a build, for machines are noisy.

    python -m sd_runtime.bench.baseline benchmarks/baseline.json BUNDLE            measure, then compare
    python -m sd_runtime.bench.baseline benchmarks/baseline.json --results FILE    of `sd-bench --against … --json FILE`

Ratios are compared rather than seconds: both sides are measured in turns, so that they share what is slow that day.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..bundle.schema import from_json, parse_json, to_json
from ..cli.arguments import ArgumentParser
from ..cli.console import run
from ..errors import SDError, UsageError

TOLERANCE = 0.2  # of a ratio; two measurements on one machine differ by as much
ROUNDS = "7"


@dataclass(frozen=True)
class Baseline:
    """Ratios by name, diffusers' median by ours, and what they were measured on."""

    machine: dict[str, str]
    libraries: dict[str, str]
    ratios: dict[str, float]


@dataclass(frozen=True)
class Change:
    """One ratio then and now; None where one of the two was not measured."""

    name: str
    before: float | None
    now: float | None

    @property
    def verdict(self) -> str:
        """In a word; `worse` and `better` are beyond what noise explains."""
        if self.before is None or self.now is None:
            return "new" if self.before is None else "not measured"
        change = self.now / self.before
        return "worse" if change < 1 - TOLERANCE else "better" if change > 1 / (1 - TOLERANCE) else "as before"


def read_results(document: Mapping[str, Any]) -> Baseline:
    """The ratios in the JSON of sd-bench.  UsageError: it was measured beside nothing."""
    if not document.get("peer"):
        raise UsageError("results without a peer", remedy="measure with sd-bench --against diffusers --json FILE")
    ratios = {row["name"]: round(float(row["ratio"]), 2) for row in document["peer"]}
    return Baseline(document["machine"], document["peer_libraries"], ratios)


def changes(before: Baseline, now: Baseline) -> list[Change]:
    """Every ratio of either, in the baseline's order."""
    names = dict.fromkeys([*before.ratios, *now.ratios])
    return [Change(name, before.ratios.get(name), now.ratios.get(name)) for name in names]


def table(found: Sequence[Change], before: Baseline, now: Baseline) -> str:
    """For people; says so where the machines differ."""
    rows = [f"{c.name:18}{_ratio(c.before)}{_ratio(c.now)}   {c.verdict}" for c in found]
    then, today = {**before.machine, **before.libraries}, {**now.machine, **now.libraries}
    differing = [key for key in {**then, **today} if then.get(key) != today.get(key)]
    other = ", ".join(f"{key} {then.get(key)} → {today.get(key)}" for key in differing)
    note = ["", f"measured on something else: {other}"] if other else []
    return "\n".join([f"{'diffusers by ours':18}{'baseline':>10}{'now':>10}", *rows, *note])


def _ratio(value: float | None) -> str:
    return f"{'–' if value is None else f'{value:.2f}':>10}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser("bench_check", "Compare ratios to diffusers with a baseline; reports, never fails on them.")
    parser.add_argument("baseline", type=Path, metavar="BASELINE", help="a JSON file")
    parser.add_argument("bundle", nargs="?", metavar="BUNDLE", help="to measure now, of the demo checkpoint")
    parser.add_argument("--results", type=Path, metavar="FILE", help="what sd-bench measured")
    parser.add_argument("--update", action="store_true", help="make what is found now the baseline")
    return run("bench_check", lambda: _run(parser.parse_args(argv)))


def _run(args: argparse.Namespace) -> None:
    if (args.bundle is None) == (args.results is None):
        raise UsageError("what to compare", accepted="a bundle to measure, or --results FILE")
    now = read_results(_read(args.results) if args.results is not None else _measure(args.bundle))
    if args.update:
        args.baseline.write_text(json.dumps(to_json(now), indent=1) + "\n")
        print(f"{args.baseline}: {', '.join(f'{name} {ratio:g}' for name, ratio in now.ratios.items())}")
        return
    before = from_json(Baseline, _read(args.baseline), args.baseline.name)
    print(table(changes(before, now), before, now))


def _read(path: Path) -> Any:
    try:
        return parse_json(path.read_bytes(), path.name)
    except OSError as error:
        raise UsageError(f"cannot read {path} ({error.strerror})") from error


def _measure(bundle: str) -> Any:
    from .cli import main as bench

    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, "results.json")
        what = ["--against", "diffusers", "--device", "cpu", "--batches", "1", "--rounds", ROUNDS]
        if bench([bundle, *what, "--json", str(results), "--quiet"]):
            raise SDError("nothing was measured")
        return _read(results)


if __name__ == "__main__":
    sys.exit(main())
