#!/usr/bin/env python3
"""Step sharing beside first come, first served, on the same engine in one run.

    scripts/serve_benchmark.py [BUNDLE] [--clients 4 16] [--seconds 15] [--rounds 3] [--policy latency]

Clients send requests of 4, 20 or 50 steps (40, 40, 20 %), each its next one when the last is drawn; both take turns:

    shared   AsyncPipeline as it is
    fcfs     the same pipeline behind a lock: one request after the other, as a plain web server does it

Steps a second are what the engine was given to do; a ratio is fcfs's time by ours, and our steps a second by fcfs's.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sd_runtime import AsyncPipeline, Limits
from sd_runtime.bench.machine import describe_machine

DEMO_BUNDLE = Path(__file__).resolve().parents[1] / "out/demo-bundle"
MIX = {4: 0.4, 20: 0.4, 50: 0.2}  # steps: share of the requests


@dataclass
class Seen:
    """Seconds of each request by its steps, over `seconds` of load."""

    seconds: float = 0.0
    waits: dict[int, list[float]] = field(default_factory=dict)

    def p(self, share: float, steps: int | None = None) -> float:
        """A quantile of the waits, of all requests or of those with so many steps."""
        found = sorted(w for n, waits in self.waits.items() for w in waits if steps in (None, n))
        return found[round(share * (len(found) - 1))] if found else float("nan")

    @property
    def requests(self) -> float:
        return sum(map(len, self.waits.values())) / self.seconds

    @property
    def steps(self) -> float:
        return sum(n * len(waits) for n, waits in self.waits.items()) / self.seconds


async def load(pipe: AsyncPipeline, clients: int, seconds: float, turn: asyncio.Lock | AtOnce, seed: int) -> Seen:
    """Clients that ask until the time is up; what they began is finished, and counted."""
    seen, started = Seen(), time.monotonic()

    async def client(number: int) -> None:
        chance = random.Random(1000 * seed + number)
        while time.monotonic() - started < seconds:
            steps = chance.choices([*MIX], [*MIX.values()])[0]
            request = pipe.request("a star", seed=chance.randrange(2**32), num_inference_steps=steps, scheduler="ddim")
            asked = time.monotonic()
            async with turn:
                await pipe.generate(request)
            seen.waits.setdefault(steps, []).append(time.monotonic() - asked)

    await asyncio.gather(*map(client, range(clients)))
    seen.seconds = time.monotonic() - started
    return seen


class AtOnce:
    """No turn is waited for."""

    async def __aenter__(self) -> None: ...
    async def __aexit__(self, *_: object) -> None: ...


async def measure(args: argparse.Namespace) -> None:
    limits = Limits(requests=4 * max(args.clients))
    async with await AsyncPipeline.load(args.bundle, device=args.device, policy=args.policy, limits=limits) as pipe:
        curve = ", ".join(f"{rows}: {1000 * seconds:.1f} ms" for rows, seconds in pipe.curve.points.items())
        machine = ", ".join(f"{name} {value}" for name, value in describe_machine().items())
        print(f"{machine}\npolicy {args.policy}; an evaluation by its rows: {curve}\n")
        print("| clients | server | requests/s | steps/s | p50 | p95 | p99 | p99 of 4 steps |\n|" + "---|" * 8)
        for clients in args.clients:
            shared, fcfs = list[Seen](), list[Seen]()
            for seed in range(args.rounds):
                shared.append(await load(pipe, clients, args.seconds, AtOnce(), seed))
                fcfs.append(await load(pipe, clients, args.seconds, asyncio.Lock(), seed))
            for name, rounds in (("shared", shared), ("fcfs", fcfs)):
                rates = f"{_median(s.requests for s in rounds):.2f} | {_median(s.steps for s in rounds):.1f}"
                waits = " | ".join(f"{_median(s.p(q) for s in rounds):.2f} s" for q in (0.5, 0.95, 0.99))
                print(f"| {clients} | {name} | {rates} | {waits} | {_median(s.p(0.99, 4) for s in rounds):.2f} s |")
            short = _median(f.p(0.99, 4) / s.p(0.99, 4) for s, f in zip(shared, fcfs, strict=True))
            steps = _median(s.steps / f.steps for s, f in zip(shared, fcfs, strict=True))
            print(f"| | ratio | | {steps:.2f} | | | | {short:.1f} |", flush=True)


def _median(values: Iterable[float]) -> float:
    return statistics.median(values)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", nargs="?", default=str(DEMO_BUNDLE), metavar="BUNDLE")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64], metavar="N")
    parser.add_argument("--seconds", type=float, default=15.0, help="of load, each side and round (default: 15)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--policy", choices=("latency", "throughput"), default="latency")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cpu")
    asyncio.run(measure(parser.parse_args(arguments)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
