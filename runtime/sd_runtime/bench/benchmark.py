"""The whole benchmark, in an order that spoils nothing: new processes first, while this one is still small."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..bundle.bundle import Bundle
from ..errors import UsageError
from ..pipeline import Pipeline
from ..request import Request
from . import comparison
from .comparison import Compared, compared
from .distribution import Distribution
from .load import Arrivals, LoadPoint, due_times, measure_load
from .machine import describe_machine, versions
from .processes import Cost, GpuMemory, peak_megabytes, run
from .stages import Batch, Calls, measure_batches, measure_stages, open_timed, time_picture, varied

SETTLE = 0.3  # seconds after which threads of torch that wait for work no longer spin
SD_RUN = "import sys; from sd_runtime.cli.run import main; sys.exit(main())"


@dataclass(frozen=True)
class Plan:
    """What to measure.

    request   what is drawn          device   auto, cpu or cuda
    rounds    measured pictures      warmup   pictures before them
    cold      new processes to start (0: none)
    batches   pictures drawn together, for each of which images a second are measured
    rates     requests a second, for each of which `duration` seconds of `arrivals` are served
    peer      what diffusers loads to be measured beside; None: nothing
    """

    request: Request
    device: str = "auto"
    rounds: int = 10
    warmup: int = 2
    cold: int = 3
    batches: tuple[int, ...] = (1, 2, 4)
    rates: tuple[float, ...] = ()
    duration: float = 30.0
    arrivals: Arrivals = "poisson"
    peer: str | None = None

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.warmup < 0 or self.cold < 0:
            got = f"{self.rounds} rounds, {self.warmup} warm-up, {self.cold} cold"
            raise UsageError("rounds", got=got, accepted="1 or more, 0 or more, 0 or more")
        if any(size < 1 for size in self.batches):
            raise UsageError("batches", got=self.batches, accepted="sizes from 1")
        if any(not 0 < rate < 1e4 for rate in self.rates) or not 0 < self.duration < 1e5:
            raise UsageError("requests-per-second and duration", got=(self.rates, self.duration), accepted="above 0")


@dataclass(frozen=True)
class Results:
    """What was measured; seconds and megabytes (10⁶ bytes) throughout.

    cold         new processes from their start to a picture on disk
    load         of the networks, in this process
    first_image  the first picture after that
    memory       the most that this process had resident, peer's not included
    gpu_memory   the most that the GPU had in use more than before; None: it was not used
    likeness     PSNR of both sides' pictures in dB; None: no peer, or they are equal
    """

    bundle: str
    machine: dict[str, str]
    plan: Plan
    device: str
    load: float
    first_image: float
    stages: dict[str, Distribution]
    steps_per_second: float
    batches: tuple[Batch, ...]
    memory: float
    gpu_memory: float | None
    cold: tuple[Cost, ...] = ()
    loads: tuple[LoadPoint, ...] = ()
    peer: tuple[Compared, ...] = ()
    likeness: float | None = None
    peer_libraries: dict[str, str] = field(default_factory=dict)


def measure(bundle: Bundle, plan: Plan, note: Callable[[str], None] = lambda text: None) -> Results:
    """Measure everything that `plan` asks for; `note` is told what begins."""
    settings = None
    if plan.peer is not None:
        comparison.require_peer()
        settings = comparison.peer_settings(plan.request, plan.peer, bundle.manifest, plan.device)
    note("new processes")
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = _cold(bundle, plan, settings, Path(folder))
        likeness = _likeness(Path(folder, "ours.png"), Path(folder, "peer.png")) if theirs else None
    note("loading")
    with GpuMemory() as gpu:
        started = time.perf_counter()
        pipeline, calls = open_timed(bundle, plan.device)
        loaded = time.perf_counter()
        with pipeline:
            pipeline.check(plan.request)
            first = sum(time_picture(pipeline, calls, plan.request)["picture"])
            note(f"{plan.rounds} pictures")
            stages = measure_stages(pipeline, calls, plan.request, rounds=plan.rounds, warmup=plan.warmup)
            note("batches")
            batches = measure_batches(pipeline, plan.request, plan.batches, rounds=max(plan.rounds // 3, 1))
            loads = tuple(_load(pipeline, plan, rate, note) for rate in plan.rates)
            peer = _warm(pipeline, calls, plan, settings, note) if settings is not None else ()
        memory = peak_megabytes()
    return Results(
        bundle=str(bundle.root),
        machine=describe_machine(),
        plan=plan,
        device="cpu" if pipeline.engines.on_cpu else "cuda",
        load=loaded - started,
        first_image=first,
        stages=stages,
        steps_per_second=1 / sum(stages[name].p50 for name in ("unet", "host") if name in stages),
        batches=tuple(batches),
        memory=memory,
        gpu_memory=None if pipeline.engines.on_cpu else gpu.peak,
        cold=tuple(ours),
        loads=loads,
        peer=(*_cold_rows(ours, theirs), *peer),
        likeness=likeness,
        peer_libraries=versions(comparison.LIBRARIES) if settings is not None else {},
    )


def _cold(bundle: Bundle, plan: Plan, settings: dict[str, Any] | None, folder: Path) -> tuple[list[Cost], list[Cost]]:
    """New processes of both sides in turns; the first of each only warms the page cache up."""
    ours, theirs = [], []
    for _ in range(plan.cold + 1 if plan.cold else 0):
        ours.append(run(cold_command(bundle, plan, folder / "ours.png")))
        if settings is not None:
            theirs.append(comparison.cold_peer(settings, folder / "peer.png"))
    return ours[1:], theirs[1:]


def cold_command(bundle: Bundle, plan: Plan, picture: Path) -> list[object]:
    """sd-run, as a user starts it."""
    request = plan.request
    flags: dict[str, object] = {
        "--model": bundle.root,
        "--negative-prompt": request.negative_prompts[0],
        "--seed": request.seeds[0],
        "--steps": request.num_inference_steps,
        "--guidance-scale": request.guidance_scale,
        "--height": request.height,
        "--width": request.width,
        "--device": plan.device,
        "--output": picture,
    }
    if request.scheduler is not None:
        flags["--scheduler"] = request.scheduler
    words = [word for flag in flags.items() for word in flag]
    return [sys.executable, "-c", SD_RUN, request.prompts[0], *words, "--overwrite", "--quiet", "--no-safety-checker"]


def _cold_rows(ours: list[Cost], theirs: list[Cost]) -> list[Compared]:
    if not theirs:
        return []
    return [
        compared("cold start", "s", [cost.seconds for cost in ours], [cost.seconds for cost in theirs]),
        compared("peak memory", "MB", [cost.megabytes for cost in ours], [cost.megabytes for cost in theirs]),
    ]


def _warm(
    pipeline: Pipeline,
    calls: Calls,
    plan: Plan,
    settings: dict[str, Any],
    note: Callable[[str], None],
) -> list[Compared]:
    """Pictures and steps of both sides, in turns."""
    note("diffusers")
    pictures, steps = ([], []), ([], [])  # type: tuple[list[float], list[float]], tuple[list[float], list[float]]
    with ExitStack() as stack:
        draw = stack.enter_context(comparison.warm_peer(settings))
        for number in range(plan.rounds + 1):
            request = varied(plan.request, number)
            time.sleep(SETTLE)
            ours = time_picture(pipeline, calls, request)
            theirs = draw(request.prompts[0], request.seeds[0])
            if number == 0:
                continue
            spans = [a + b for a, b in zip(ours["unet"], ours["host"], strict=True)] if ours["host"] else ours["unet"]
            pictures[0].append(ours["picture"][0] - ours["png"][0])
            pictures[1].append(theirs["picture"])
            steps[0].extend(spans[1:] or spans)
            steps[1].extend(theirs["steps"])
    rows = [compared("picture", "s", *pictures)]
    return [*rows, compared("step", "s", *steps)] if steps[1] else rows


def _load(pipeline: Pipeline, plan: Plan, rate: float, note: Callable[[str], None]) -> LoadPoint:
    note(f"{rate:g} requests a second")
    due = due_times(rate, plan.duration, plan.arrivals)
    return measure_load(due, rate, lambda number: pipeline.start(varied(plan.request, number)).result().images)


def _likeness(one: Path, other: Path) -> float | None:
    """PSNR of two pictures in dB; None where they are equal to the last bit."""
    import numpy as np

    from ..images.convert import open_picture

    a, b = (np.asarray(open_picture(path), np.float64) for path in (one, other))
    error = float(((a - b) ** 2).mean())
    return float(10 * np.log10(255**2 / error)) if error else None
