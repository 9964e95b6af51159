"""What to measure, and the measuring: new processes come first, while this one is still small."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..bundle.bundle import Bundle
from ..errors import UsageError
from ..pipeline import Pipeline
from ..request import Request
from .distribution import Distribution
from .load import Arrivals, LoadPoint, due_times, measure_load
from .machine import describe_machine
from .processes import Cost, GpuMemory, cold_command, peak_megabytes, run
from .stage_times import Batch, measure_batches, measure_stages, open_timed, time_picture, varied

MAX_RATE, MAX_DURATION = 1e4, 1e5  # requests a second, seconds: far beyond any machine, and still a short list


@dataclass(frozen=True)
class Benchmark:
    """What to measure.  UsageError, under the field's name: a value out of its range.

    request    the picture
    device     auto, cpu or cuda
    backends   what runs the networks, in order of preference; None: the usual ones
    rounds     measured pictures, at least 1
    warmup     pictures drawn before them, at least 0
    cold       new processes, at least 0
    batches    batch sizes, each at least 1, whose pictures a second are measured
    rates      requests a second, above 0, whose latency is measured, each for `duration` seconds
    arrivals   of those requests: random (poisson) or evenly spaced (fixed)
    """

    request: Request
    device: str = "auto"
    backends: tuple[str, ...] | None = None
    rounds: int = 10
    warmup: int = 2
    cold: int = 3
    batches: tuple[int, ...] = (1, 2, 4)
    rates: tuple[float, ...] = ()
    duration: float = 30.0
    arrivals: Arrivals = "poisson"

    def __post_init__(self) -> None:
        for name, least in (("rounds", 1), ("warmup", 0), ("cold", 0)):
            if getattr(self, name) < least:
                raise UsageError(name, got=getattr(self, name), accepted=f"{least} or more")
        if any(size < 1 for size in self.batches):
            raise UsageError("batches", got=_listed(self.batches), accepted="sizes from 1")
        if any(not 0 < rate <= MAX_RATE for rate in self.rates):
            raise UsageError("rates", got=_listed(self.rates), accepted=f"numbers above 0, to {MAX_RATE:g}")
        if not 0 < self.duration <= MAX_DURATION:
            raise UsageError("duration", got=self.duration, accepted=f"seconds above 0, to {MAX_DURATION:g}")


def _listed(numbers: tuple[float, ...]) -> str:
    return ", ".join(f"{number:g}" for number in numbers)


@dataclass(frozen=True)
class Results:
    """The measurements, in seconds and megabytes (10⁶ bytes).

    device       cpu or cuda, whichever was used
    load         loading the networks, in this process
    first_image  the first picture after that
    memory       the peak resident memory of this process
    gpu_memory   the peak of the GPU's used memory above what was used before; None: the GPU was not used
    cold         new processes, from their start to a picture on disk
    """

    bundle: str
    machine: dict[str, str]
    benchmark: Benchmark
    device: str
    load: float
    first_image: float
    stages: dict[str, Distribution]
    steps_per_second: float
    batches: tuple[Batch, ...]
    memory: float
    gpu_memory: float | None
    cold: tuple[Cost, ...]
    loads: tuple[LoadPoint, ...]


def measure(bundle: Bundle, benchmark: Benchmark, note: Callable[[str], None] = lambda text: None) -> Results:
    """Measure all of `benchmark`; `note` is told what begins."""
    request = benchmark.request
    cold = _cold(bundle, benchmark, note)
    note("load the networks and draw a first picture")
    with GpuMemory() as gpu:
        started = time.perf_counter()
        pipeline, calls = open_timed(bundle, benchmark.device, benchmark.backends)
        loaded = time.perf_counter()
        with pipeline:
            pipeline.check(request)
            first = sum(time_picture(pipeline, calls, request)["picture"])
            note(f"draw {benchmark.warmup} + {benchmark.rounds} pictures one by one")
            stages = measure_stages(pipeline, calls, request, rounds=benchmark.rounds, warmup=benchmark.warmup)
            if benchmark.batches:
                note(f"draw batches of {_listed(benchmark.batches)} pictures")
            batches = measure_batches(pipeline, request, benchmark.batches, rounds=max(benchmark.rounds // 3, 1))
            loads = tuple(_load(pipeline, benchmark, rate, note) for rate in benchmark.rates)
        memory = peak_megabytes()
    return Results(
        bundle=str(bundle.root),
        machine=describe_machine(),
        benchmark=benchmark,
        device="cpu" if pipeline.engines.on_cpu else "cuda",
        load=loaded - started,
        first_image=first,
        stages=stages,
        steps_per_second=1 / sum(stages[name].p50 for name in ("unet", "host") if name in stages),
        batches=tuple(batches),
        memory=memory,
        gpu_memory=None if pipeline.engines.on_cpu else gpu.peak,
        cold=tuple(cold),
        loads=loads,
    )


def _cold(bundle: Bundle, benchmark: Benchmark, note: Callable[[str], None]) -> list[Cost]:
    """New processes; one more than is asked for, since the first brings the files into the page cache."""
    if not benchmark.cold:
        return []
    note(f"start sd-run 1 + {benchmark.cold} times")
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder, "picture.png")
        command = cold_command(bundle.root, benchmark.request, picture, benchmark.device, benchmark.backends)
        return [run(command) for _ in range(benchmark.cold + 1)][1:]


def _load(pipeline: Pipeline, benchmark: Benchmark, rate: float, note: Callable[[str], None]) -> LoadPoint:
    note(f"serve {rate:g} requests a second for {benchmark.duration:g} s")
    due = due_times(rate, benchmark.duration, benchmark.arrivals)
    return measure_load(due, rate, lambda number: pipeline.start(varied(benchmark.request, number)).result().images)
