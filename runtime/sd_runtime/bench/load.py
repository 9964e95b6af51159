"""Latency under an open load: requests come when they come, whether or not the last one is done.

A closed loop, which asks again when it was answered, never sees a queue and flatters a slow server; here every latency
counts from the moment that the request was due (Tene, How NOT to Measure Latency: coordinated omission).
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from .distribution import Distribution

Arrivals = Literal["poisson", "fixed"]
PATIENCE = 3.0  # a load that takes this many times as long as it should is given up


@dataclass(frozen=True)
class LoadPoint:
    """What one rate of requests came to.

    offered, served  requests a second: what was sent, and what was answered
    requests         how many were sent; `unserved` of them were given up
    busy             share of the time in which a picture was drawn
    latency          seconds from when a request was due to its answer
    """

    offered: float
    served: float
    requests: int
    unserved: int
    busy: float
    latency: Distribution


def due_times(rate: float, duration: float, arrivals: Arrivals, seed: int = 0) -> list[float]:
    """When requests are due, in seconds from the start: evenly, or as a Poisson process of that rate.

    At least one; the draws depend on `seed` alone."""
    if arrivals == "fixed":
        return [i / rate for i in range(max(math.floor(rate * duration), 1))]
    draw, times, now = random.Random(seed), [], 0.0
    while (now := now + draw.expovariate(rate)) < duration:
        times.append(now)
    return times or [0.0]


def measure_load(
    due: Sequence[float],
    rate: float,
    serve: Callable[[int], object],
    *,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], object] = time.sleep,
) -> LoadPoint:
    """Serve requests one after another, none before it is due; `serve` is given the request's number."""
    begun = clock()
    latencies: list[float] = []
    busy = 0.0
    for number, moment in enumerate(due):
        now = clock() - begun
        if now > PATIENCE * due[-1] + moment and latencies:
            break
        if now < moment:
            sleep(moment - now)
        started = clock()
        serve(number)
        finished = clock()
        busy += finished - started
        latencies.append(finished - begun - moment)
    total = clock() - begun
    return LoadPoint(
        rate, len(latencies) / total, len(due), len(due) - len(latencies), busy / total, Distribution.of(latencies)
    )
