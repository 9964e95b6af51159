"""Which evaluations share the next run of the UNet.

A run of more rows does more work a second and takes longer, so sharing helps those who would wait and hurts those who
already run.  Of n pictures with as much left to do each, run k at a time, the mean time to the end is proportional to

    cost(k) · (n + k) / k            cost(k): seconds of an evaluation of k of them, from the engine's own curve

for n/k groups follow each other and each takes cost(k) a step.  `latency` takes the k for which this is least, where n
counts those who wait COMING times, for others arrive meanwhile: one by one where rows gain little and few wait, wider
as more wait.  `throughput` takes the k with the most pictures a second.  In both, the shortest remaining work goes
first (Schrage 1968: it makes the mean least), with ageing, so that long requests are not passed for ever.

Both constants are those for which the mean time was least, over loads from 0.3 to 1.2, in scripts/serve_simulation.py.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Literal, Protocol, TypeVar

from .curve import StepCurve

PolicyName = Literal["latency", "throughput"]
POLICIES: tuple[PolicyName, ...] = ("latency", "throughput")
AGEING = 0.05  # seconds of remaining work that a second of waiting is worth
COMING = 3  # requests that will have waited for a group's end, for each that waits at its beginning


class Waiting(Protocol):
    """A batch of pictures that wants an evaluation.

    kind        those of one kind can share a run: equal shapes of latents and text
    rows        of its evaluation
    left        evaluations that its whole request has still to run
    priority    those of a higher one go before all of a lower one
    arrived     seconds, on the clock of `now`
    """

    @property
    def kind(self) -> Hashable: ...
    @property
    def rows(self) -> int: ...
    @property
    def left(self) -> int: ...
    @property
    def priority(self) -> int: ...
    @property
    def arrived(self) -> float: ...


W = TypeVar("W", bound=Waiting)


def choose(
    waiting: Sequence[W],
    curve: Callable[[W], StepCurve],
    now: float,
    policy: PolicyName,
    fits: Callable[[int], bool] = lambda rows: True,
) -> list[W]:
    """Which of `waiting` (one or more) share the next run, the one that goes first included.

    curve: of an evaluation's shape; fits: whether the UNet takes so many rows at once.
    """
    ordered = sorted(waiting, key=lambda one: (-one.priority, urgency(one, curve(one), now)))
    first = ordered[0]
    alike = [one for one in ordered if one.kind == first.kind and one.priority == first.priority]
    costs, rows = curve(first), 0
    best, chosen = float("inf"), 1
    for k, one in enumerate(alike, 1):
        rows += one.rows
        if k > 1 and not fits(rows):
            continue
        cost = costs.seconds(rows) / k
        if policy == "latency":
            cost *= COMING * len(alike) + k
        if cost < best:
            best, chosen = cost, k
    return alike[:chosen]


def urgency(one: Waiting, curve: StepCurve, now: float) -> float:
    """What is left of a request in seconds, were it alone, less what its waiting is worth; the least goes first."""
    return one.left * curve.seconds(one.rows) - AGEING * (now - one.arrived)
