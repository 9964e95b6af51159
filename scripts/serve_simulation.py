#!/usr/bin/env python3
"""Which policy serves best, on GPUs that are not here: a simulation, and called one.

    scripts/serve_simulation.py [--curve rtx3060|v100|flat] [--requests 4000] [--seed 0] [--load 0.5 0.8 …]

Requests of 4, 20 and 50 steps arrive at random (Poisson).  An evaluation of k pictures takes as long as a published
curve says (ONNX Runtime CUDA, 50 steps, batch 1, 4, 8).  The very `choose` of sd_runtime.serve.policy decides which
requests share the next one; beside it, on the same arrivals:

    fcfs     one request after the other
    equal    requests of equal steps that wait together run together, to the end: what other servers merge

A load of 1 is what a server that runs one after the other can just do.  Above it a queue of 64 requests is full, others
are refused, and pictures a second say what each policy can do.  The clock is simulated; nothing here was measured.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sd_runtime.serve.curve import StepCurve
from sd_runtime.serve.policy import PolicyName, choose

CURVES = {  # seconds of 50 steps by pictures at once
    "rtx3060": {1: 5.0, 4: 17.7, 8: 33.7},
    "v100": {1: 2.7, 4: 8.3, 8: 15.7},
    "flat": {1: 2.7, 8: 4.0},  # a GPU that one picture does not fill
}
MIX = {4: 0.4, 20: 0.4, 50: 0.2}  # steps: share of the requests
MOST, QUEUE = 8, 64  # pictures at once; requests in the service
LOADS = (0.3, 0.6, 0.8, 0.95, 1.2, 2.0)


@dataclass(eq=False)
class Arrival:
    """A request of one picture; `Waiting` of the policy."""

    arrived: float
    steps: int
    left: int = 0
    rows: int = 1
    kind: str = "512x512"
    priority: int = 0
    done: float = 0.0

    def __post_init__(self) -> None:
        self.left = self.steps


Chooser = Callable[[list[Arrival], list[Arrival], StepCurve, float], list[Arrival]]


def by_policy(policy: PolicyName) -> Chooser:
    def chosen(waiting: list[Arrival], running: list[Arrival], curve: StepCurve, now: float) -> list[Arrival]:
        return choose(waiting, lambda one: curve, now, policy, lambda rows: rows <= MOST)

    return chosen


def fcfs(waiting: list[Arrival], running: list[Arrival], curve: StepCurve, now: float) -> list[Arrival]:
    return waiting[:1]


def equal(waiting: list[Arrival], running: list[Arrival], curve: StepCurve, now: float) -> list[Arrival]:
    going = [one for one in running if one.left]
    if going:
        return going
    first = waiting[0]
    return [one for one in waiting if one.steps == first.steps and one.left == one.steps][:MOST]


SERVERS: dict[str, Chooser] = {
    "fcfs": fcfs,
    "equal": equal,
    "latency": by_policy("latency"),
    "throughput": by_policy("throughput"),
}


@dataclass(frozen=True)
class Outcome:
    """Seconds from arrival to end, of all that were served, and of those with the fewest steps; pictures a second."""

    p50: float
    p99: float
    mean: float
    short_p99: float
    rate: float
    refused: int


def serve(arrivals: Sequence[tuple[float, int]], curve: StepCurve, chosen: Chooser) -> Outcome:
    """Run one server over (time, steps) of every request."""
    coming = [Arrival(time, steps) for time, steps in arrivals]
    served, waiting, running = list[Arrival](), list[Arrival](), list[Arrival]()
    now, refused, position = 0.0, 0, 0
    while position < len(coming) or waiting:
        if not waiting:
            now = max(now, coming[position].arrived)
        while position < len(coming) and coming[position].arrived <= now:
            if len(waiting) < QUEUE:
                waiting.append(coming[position])
            else:
                refused += 1
            position += 1
        running = chosen(waiting, running, curve, now)
        now += curve.seconds(len(running))
        for one in running:
            one.left -= 1
            if not one.left:
                one.done = now
                served.append(one)
                waiting.remove(one)
    seconds = sorted(one.done - one.arrived for one in served)
    short = sorted(one.done - one.arrived for one in served if one.steps == min(MIX))
    return Outcome(
        statistics.median(seconds),
        seconds[int(0.99 * (len(seconds) - 1))],
        statistics.fmean(seconds),
        short[int(0.99 * (len(short) - 1))],
        len(served) / (now - coming[0].arrived),
        refused,
    )


def arrivals(load: float, curve: StepCurve, count: int, seed: int) -> list[tuple[float, int]]:
    """Poisson arrivals that ask a server which runs one after the other for `load` of its time."""
    chance = random.Random(seed)
    work = curve.seconds(1) * sum(steps * share for steps, share in MIX.items())
    now, found = 0.0, list[tuple[float, int]]()
    for _ in range(count):
        now += chance.expovariate(load / work)
        found.append((now, chance.choices([*MIX], [*MIX.values()])[0]))
    return found


def compare(curve: StepCurve, load: float, count: int, seed: int) -> dict[str, Outcome]:
    """Every server on the same arrivals."""
    asked = arrivals(load, curve, count, seed)
    return {name: serve(asked, curve, chosen) for name, chosen in SERVERS.items()}


def curve_of(name: str) -> StepCurve:
    return StepCurve({pictures: seconds / 50 for pictures, seconds in CURVES[name].items()})


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curve", nargs="+", choices=CURVES, default=[*CURVES])
    parser.add_argument("--requests", type=int, default=4000, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--load", type=float, nargs="+", default=LOADS, metavar="X")
    args = parser.parse_args(arguments)
    for name in args.curve:
        print(f"simulated: {name}, seconds from arrival to the end\n")
        print("| load | server | p50 | p99 | mean | p99 of 4 steps | pictures/s | refused |\n|" + "---|" * 8)
        for load in args.load:
            for server, got in compare(curve_of(name), load, args.requests, args.seed).items():
                times = " | ".join(f"{value:.2f}" for value in (got.p50, got.p99, got.mean, got.short_p99))
                print(f"| {load:g} | {server} | {times} | {got.rate:.3f} | {got.refused} |", flush=True)
        print()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
