"""What the sections of scripts/gpu_check.py share: settings, rows, and the timing of whole pictures."""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
MOST_RUNS = 100
DEMO = ROOT / "export" / "sd_export" / "demo_checkpoint"


def digest(*folders: str) -> str:
    """Of the Python code in these folders of the repository."""
    content = hashlib.sha256()
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            content.update(path.read_bytes())
    return content.hexdigest()[:10]


@dataclass(frozen=True)
class CheckOptions:
    """Where everything is kept, and whether this is only a rehearsal on a CPU."""

    root: Path
    dry: bool

    @cached_property
    def work(self) -> Path:
        """Bundles and pictures of the code as it is."""
        return self.root / f"{'rehearsal' if self.dry else 'bundles'}-{digest('runtime', 'export')}"

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        return "cpu" if self.dry else "cuda"

    @property
    def sides(self) -> int:
        return 128 if self.dry else 512

    @property
    def steps(self) -> tuple[int, int, int]:
        return (2, 3, 4) if self.dry else (20, 30, 50)

    @property
    def batches(self) -> tuple[int, int]:
        return (1, 2) if self.dry else (1, 4)

    def seconds(self, steps: int, batch: int) -> float:
        """How long one latency may be measured: the one that promises are about long enough for a 99th percentile."""
        if self.dry:
            return 1.0
        return 45.0 if (steps, batch) == (self.steps[-1], 1) else 4.0

    @property
    def checkpoint(self) -> Path:
        """Of Stable Diffusion 1.5's sizes; the rehearsal makes do with the demo's."""
        return DEMO if self.dry else self.root / "checkpoint"


@dataclass(frozen=True)
class Row:
    """One line of the table; `limit` is the most (or with `at_least` the least) that is right.  Where the value is the
    median of some runs, p95 and p99 are their other percentiles."""

    what: str
    value: float
    unit: str
    limit: float | None = None
    at_least: bool = False
    runs: int = 1
    p95: float | None = None
    p99: float | None = None

    @property
    def good(self) -> bool | None:
        if self.limit is None:
            return None
        return self.value >= self.limit if self.at_least else self.value <= self.limit


def latencies(
    settings: CheckOptions, label: str, draw: Callable[[int, int], object], batches: Sequence[int] = ()
) -> Iterator[Row]:
    """Percentiles for every number of steps and batch; from their differences, what one step takes."""
    few, _, many = settings.steps
    for batch in batches or settings.batches:
        walls, hosts = {}, {}
        for steps in settings.steps:
            draw(steps, batch)  # memory for these shapes, recordings
            times, host = repeat(partial(draw, steps, batch), settings.seconds(steps, batch))
            walls[steps], hosts[steps] = times, host
            p50, p95, p99 = (float(p) for p in np.quantile(times, (0.5, 0.95, 0.99)))
            yield Row(f"{label}: {steps} steps, batch {batch}", p50, "s", runs=len(times), p95=p95, p99=p99)
        step = (statistics.median(walls[many]) - statistics.median(walls[few])) / (many - few)
        on_host = (hosts[many] - hosts[few]) / (many - few)
        if step > 0:  # a rehearsal of a few steps may be all noise
            yield Row(f"{label}: one step, batch {batch}", step * 1e3, "ms")
            yield Row(f"{label}: host time of a step, batch {batch}", max(on_host, 0) / step * 100, "% of it")


def repeat(work: Callable[[], object], seconds: float) -> tuple[list[float], float]:
    """Wall-clock times of 5 to 100 runs, and the mean processor time that this thread spent on one."""
    times: list[float] = []
    begun, host = time.perf_counter(), time.thread_time()
    while len(times) < 5 or (time.perf_counter() - begun < seconds and len(times) < MOST_RUNS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return times, (time.thread_time() - host) / len(times)
