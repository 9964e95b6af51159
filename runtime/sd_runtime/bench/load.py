"""Latency under an open load: requests arrive at a given rate, whether or not the last one is done.

A closed loop sends the next request after the last answer, so it never sees a queue and flatters a slow server.  Here
every latency counts from the moment that the request was due (Tene, How NOT to Measure Latency: coordinated omission).
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
PATIENCE = 3.0  # a load is given up after this many times its duration


@dataclass(frozen=True)
class LoadPoint:
    """One rate of requests and how they were served.

    offered, served  requests a second that were due, and that were answered
    requests         the number of requests due; `unserved` of them were given up
    busy             share of the time in which a picture was drawn, 0 … 1
    latency          seconds from when a request was due to its answer
    """

    offered: float
    served: float
    requests: int
    unserved: int
    busy: float
    latency: Distribution


def due_times(rate: float, duration: float, arrivals: Arrivals) -> list[float]:
    """When requests are due, in seconds from the start: evenly spaced, or a Poisson process of that rate.

    There is at least one; the times of a Poisson process are the same in every run."""
    if arrivals == "fixed":
        return [i / rate for i in range(max(math.floor(rate * duration), 1))]
    draw, times, now = random.Random(0), [], 0.0
    while (now := now + draw.expovariate(rate)) < duration:
        times.append(now)
    return times or [0.0]


def measure_load(due: Sequence[float], rate: float, serve: Callable[[int], object]) -> LoadPoint:
    """Serve requests one after another, none before it is due; `serve` is given the request's number."""
    begun = time.perf_counter()
    latencies: list[float] = []
    busy = 0.0
    for number, moment in enumerate(due):
        now = time.perf_counter() - begun
        if now > PATIENCE * due[-1] + moment and latencies:
            break
        if now < moment:
            time.sleep(moment - now)
        started = time.perf_counter()
        serve(number)
        finished = time.perf_counter()
        busy += finished - started
        latencies.append(finished - begun - moment)
    total = time.perf_counter() - begun
    return LoadPoint(
        rate, len(latencies) / total, len(due), len(due) - len(latencies), busy / total, Distribution.of(latencies)
    )
