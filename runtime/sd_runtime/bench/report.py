"""Results as a table for terminals, as JSON, and as plots."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..bundle.schema import to_json as plain
from .charts import Bar, Line, bar_chart, line_chart, standalone
from .distribution import Distribution

if TYPE_CHECKING:
    from ..request import Request
    from .benchmark import Results

MEANINGS = {
    "tokenize": "prompt to token ids",
    "text": "text encoder",
    "unet": "UNet, a step",
    "host": "guidance and sampler, a step",
    "decode": "VAE decoder",
    "png": "PNG file",
    "picture": "a whole picture",
}
SCHEMA_VERSION = 2


def seconds(value: float) -> str:
    """A time for people: 83 µs, 4.21 ms, 350 ms, 12.3 s."""
    for unit, factor in (("µs", 1e6), ("ms", 1e3)):
        scaled = value * factor
        if scaled < 1000:
            return f"{scaled:.3g} {unit}"
    return f"{value:.3g} s" if value < 1000 else f"{value:.0f} s"


def about(machine: Mapping[str, str], request: Request) -> list[str]:
    """Lines on what was measured on, and what was drawn."""
    scheduler = request.scheduler or "the model's own"
    return [
        ", ".join(f"{name} {value}" for name, value in machine.items()),
        f"{request.width} × {request.height} pixels, {request.num_inference_steps} steps, "
        f"guidance scale {request.guidance_scale:g}, scheduler: {scheduler}",
    ]


def table(results: Results) -> str:
    """All results for people; all lines after the second have at most 100 columns."""
    stages = [_stage(MEANINGS[name], stage) for name, stage in results.stages.items()]
    lines = [
        f"{results.bundle} on {'the CPU' if results.device == 'cpu' else 'the GPU'}",
        *about(results.machine, results.benchmark.request),
        "",
        f"{'time of each stage':30}{'median':>10}{'p90':>10}{'p95':>10}{'p99':>10}{'samples':>9}",
        *stages,
        "",
        f"{'steps a second':30}{results.steps_per_second:>10.3g}",
        *(f"{f'pictures a second, batch of {b.images}':30}{b.images_per_second:>10.3g}" for b in results.batches),
        f"{'loading the networks':30}{seconds(results.load):>10}",
        f"{'first picture after that':30}{seconds(results.first_image):>10}",
        f"{'peak memory of this process':30}{_memory(results.memory, results.gpu_memory)}",
    ]
    return "\n".join([*lines, *_cold(results), *_loads(results)])


def _stage(name: str, stage: Distribution) -> str:
    numbers = "".join(f"{seconds(value):>10}" for value in (stage.p50, stage.p90, stage.p95, stage.p99))
    return f"{name:<30}{numbers}{stage.count:>9}"


def _memory(resident: float, gpu: float | None) -> str:
    return f"{resident:>7.0f} MB" + (f", of the GPU {gpu:.0f} MB" if gpu is not None else "")


def _cold(results: Results) -> list[str]:
    if not results.cold:
        return []
    median = Distribution.of([cost.seconds for cost in results.cold]).p50
    gpu = [cost.gpu_megabytes for cost in results.cold if cost.gpu_megabytes is not None]
    memory = _memory(max(cost.megabytes for cost in results.cold), max(gpu, default=None))
    return [
        "",
        f"sd-run in a new process, median of {len(results.cold)}",
        f"{'start to picture on disk':30}{seconds(median):>10}",
        f"{'peak memory':30}{memory}",
    ]


def _loads(results: Results) -> list[str]:
    """Latencies count from when a request was due, so they include waiting for the requests before it."""
    if not results.loads:
        return []
    names = ("median", "p90", "p95", "p99")
    lines = ["", "requests a second: due and answered; share of time busy; time from due to answered"]
    lines.append(f"{'due':>10}{'answered':>10}{'busy':>10}{''.join(f'{name:>10}' for name in names)}")
    for point in results.loads:
        latency = point.latency
        numbers = "".join(f"{seconds(value):>10}" for value in (latency.p50, latency.p90, latency.p95, latency.p99))
        lost = f"  {point.unserved} of {point.requests} given up" if point.unserved else ""
        lines.append(f"{point.offered:>10.3g}{point.served:>10.3g}{point.busy:>10.0%}{numbers}{lost}")
    return lines


def to_json(results: Results) -> dict[str, Any]:
    """Every number, and what was asked for under "benchmark"."""
    return {"schema_version": SCHEMA_VERSION, **plain(results)}


def plot(results: Results) -> str:
    """An SVG file: stages, batches and latency under load, as far as they were measured."""
    stages = [
        Bar(MEANINGS[name], value, seconds(value), series)
        for name, stage in results.stages.items()
        for series, value in enumerate((stage.p50, stage.p99))
    ]
    charts = [bar_chart("Seconds of each stage, logarithmic", stages, series=("median", "p99"), log=True)]
    if len(results.batches) > 1:
        bars = [Bar(f"batch of {b.images}", b.images_per_second, f"{b.images_per_second:.3g}") for b in results.batches]
        charts.append(bar_chart("Pictures a second", bars))
    if results.loads:
        curves = [
            Line("median", [(point.offered, point.latency.p50) for point in results.loads]),
            Line("p95", [(point.offered, point.latency.p95) for point in results.loads]),
            Line("p99", [(point.offered, point.latency.p99) for point in results.loads]),
        ]
        charts.append(line_chart("Latency", curves, x_label="requests a second", y_label="seconds"))
    return standalone(charts)
