"""Results as a table for terminals, as JSON, and as plots."""

from __future__ import annotations

from typing import Any

from ..bundle.schema import to_json as plain
from .benchmark import Results
from .charts import Bar, Line, bar_chart, line_chart, standalone
from .distribution import Distribution

MEANINGS = {
    "tokenize": "prompt to ids",
    "text": "text encoder",
    "unet": "UNet, a step",
    "host": "guidance and sampler, a step",
    "decode": "VAE decoder",
    "png": "PNG",
    "picture": "whole picture",
}
SCHEMA_VERSION = 1


def seconds(value: float) -> str:
    """For people: 83 µs, 4.21 ms, 350 ms, 12.3 s."""
    for unit, factor in (("µs", 1e6), ("ms", 1e3)):
        scaled = value * factor
        if scaled < 1000:
            return f"{scaled:.3g} {unit}"
    return f"{value:.3g} s" if value < 1000 else f"{value:.0f} s"


def table(results: Results) -> str:
    """Everything, at most 100 columns wide."""
    request = results.plan.request
    lines = [
        f"{results.bundle} on {results.device}",
        ", ".join(f"{name} {value}" for name, value in results.machine.items()),
        f"{request.width} × {request.height}, {request.num_inference_steps} steps, "
        f"guidance {request.guidance_scale:g}, {request.scheduler or 'the model’s own sampler'}",
        "",
        f"{'':30}{'p50':>10}{'p90':>10}{'p95':>10}{'p99':>10}{'samples':>9}",
    ]
    lines += [_stage(MEANINGS[name], stage) for name, stage in results.stages.items()]
    lines += ["", f"{results.steps_per_second:.3g} steps/s; loading {seconds(results.load)}, first picture "
              f"{seconds(results.first_image)}; peak memory {results.memory:.0f} MB"]  # fmt: skip
    if results.gpu_memory is not None:
        lines[-1] += f", of the GPU {results.gpu_memory:.0f} MB"
    lines += [f"batch of {b.images}: {b.images_per_second:.3g} images/s" for b in results.batches]
    if results.cold:
        cold = Distribution.of([cost.seconds for cost in results.cold])
        memory = max(cost.megabytes for cost in results.cold)
        lines.append(f"a new process to its first picture on disk: {seconds(cold.p50)}, {memory:.0f} MB")
    return "\n".join([*lines, *_loads(results), *_peer(results)])


def _stage(name: str, stage: Distribution) -> str:
    numbers = "".join(f"{seconds(value):>10}" for value in (stage.p50, stage.p90, stage.p95, stage.p99))
    return f"{name:<30}{numbers}{stage.count:>9}"


def _loads(results: Results) -> list[str]:
    if not results.loads:
        return []
    lines = ["", f"{'requests/s':>10}{'served':>10}{'busy':>8}{'p50':>10}{'p90':>10}{'p95':>10}{'p99':>10}  latency"]
    for point in results.loads:
        numbers = "".join(f"{seconds(getattr(point.latency, p)):>10}" for p in ("p50", "p90", "p95", "p99"))
        lost = f"  {point.unserved} of {point.requests} given up" if point.unserved else ""
        lines.append(f"{point.offered:>10.3g}{point.served:>10.3g}{point.busy:>8.0%}{numbers}{lost}")
    return lines


def _peer(results: Results) -> list[str]:
    if not results.peer:
        return []
    libraries = ", ".join(f"{name} {version}" for name, version in results.peer_libraries.items())
    alike = "equal pictures" if results.likeness is None else f"pictures agree to {results.likeness:.1f} dB"
    lines = ["", f"against {libraries}" + (f"; {alike}" if results.cold else "")]
    lines.append(f"{'':14}{'ours':>12}{'diffusers':>12}{'ratio':>8}")
    rows = ((row, _value(row.ours, row.unit), _value(row.peer, row.unit)) for row in results.peer)
    return [*lines, *(f"{row.name:14}{ours}{peer}{row.ratio:>8.2f}" for row, ours, peer in rows)]


def _value(value: float, unit: str) -> str:
    return f"{seconds(value) if unit == 's' else f'{value:.0f} {unit}':>12}"


def to_json(results: Results) -> dict[str, Any]:
    """Every number, and the ratios."""
    values: dict[str, Any] = plain(results)
    values["peer"] = [plain(row) | {"ratio": row.ratio} for row in results.peer]
    return {"schema_version": SCHEMA_VERSION, **values}


def plot(results: Results) -> str:
    """An SVG file: stages, batches, latency under load, and the peer, as far as they were measured."""
    stages = [
        Bar(MEANINGS[name], value, f"{seconds(value)}", series)
        for name, stage in results.stages.items()
        for series, value in enumerate((stage.p50, stage.p99))
    ]
    charts = [bar_chart("Stages, logarithmic", stages, series=("p50", "p99"), log=True)]
    if len(results.batches) > 1:
        bars = [Bar(f"batch of {b.images}", b.images_per_second, f"{b.images_per_second:.3g}") for b in results.batches]
        charts.append(bar_chart("Images a second", bars))
    if results.loads:
        curves = [
            Line(name, [(point.offered, getattr(point.latency, name)) for point in results.loads])
            for name in ("p50", "p95", "p99")
        ]
        charts.append(line_chart("Latency", curves, x_label="requests a second", y_label="seconds"))
    if results.peer:
        bars = [Bar(row.name, row.ratio, f"{row.ratio:.2f}", limit=1.0) for row in results.peer]
        charts.append(bar_chart("Times better than diffusers", bars))
    return standalone(charts)
