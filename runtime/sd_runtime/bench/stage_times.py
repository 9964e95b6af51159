"""The seconds of each stage of a picture, measured while pictures are drawn.

    tokenize    text to token ids, prompt weights and chunks included
    text        the text encoder, one call for the prompt and its negative
    unet        one call of the UNet
    host        the rest of a step: guidance, sampler, copies
    decode      latents to picture
    png         picture to compressed bytes, with its parameters
    picture     all of it

Where the whole loop runs on the GPU, the host does not wait between UNet and sampler: `unet` is then the loop's time
divided by its steps, and there is no `host`.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ..engines.backend import Backend, Machine
from ..engines.device import DeviceEngine
from ..engines.engines import Engines
from ..engines.protocol import Engine, Feed
from ..engines.registry import open_backends
from ..pipeline import Pipeline
from ..tensor import Array, TensorSpec
from .distribution import Distribution

if TYPE_CHECKING:
    from ..bundle.bundle import Bundle
    from ..bundle.manifest import EnginePrecision
    from ..request import Request

STAGES = ("tokenize", "text", "unet", "host", "decode", "png", "picture")
Samples = dict[str, list[float]]  # stage → seconds


@dataclass
class TimedEngine:
    """An engine that notes the seconds of every call."""

    engine: Engine
    seconds: list[float] = field(default_factory=list)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self.engine.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self.engine.outputs

    def place(self, name: str, array: Array) -> Feed:
        return self.engine.place(name, array)

    def run(self, feeds: Mapping[str, Feed]) -> dict[str, Array]:
        started = time.perf_counter()
        try:
            return self.engine.run(feeds)
        finally:
            self.seconds.append(time.perf_counter() - started)

    def close(self) -> None:
        self.engine.close()


@dataclass(frozen=True)
class TimedBackend:
    """A backend whose engines are timed where the host calls them; an engine that runs inside a GPU's loop is not."""

    backend: Backend
    engines: dict[str, TimedEngine]

    @property
    def name(self) -> str:
        return self.backend.name

    def engine(self, component: str, form: str, fallback: Callable[[], Engine]) -> Engine | None:
        engine = self.backend.engine(component, form, fallback)
        if engine is None or isinstance(engine, DeviceEngine):
            return engine
        self.engines[component] = TimedEngine(engine)
        return self.engines[component]

    def batch_sizes(self, most: int, rows: int, latent: tuple[int, ...]) -> Sequence[int]:
        return self.backend.batch_sizes(most, rows, latent)

    def precision(self, component: str) -> EnginePrecision | None:
        return self.backend.precision(component)

    def close(self) -> None:
        self.backend.close()


class Calls:
    """The seconds of a pipeline's calls of its networks."""

    def __init__(self, engines: dict[str, TimedEngine]) -> None:
        self._engines = engines

    def take(self, name: str) -> list[float]:
        """The seconds of a component's calls since the last `take`; empty where its engine is not timed."""
        engine = self._engines.get(name)
        if engine is None:
            return []
        seconds, engine.seconds = engine.seconds, []
        return seconds


def open_timed(bundle: Bundle, device: str, backends: Sequence[str] | None = None) -> tuple[Pipeline, Calls]:
    """A pipeline of timed engines, all loaded; `backends` by name, None: the usual ones."""
    machine, timed = Machine(device), dict[str, TimedEngine]()
    opened = [TimedBackend(backend, timed) for backend in open_backends(bundle, machine, backends)]
    engines = Engines(bundle, opened, machine)
    engines.preload()
    return Pipeline.assemble(bundle, engines), Calls(timed)


def measure_stages(
    pipeline: Pipeline, calls: Calls, request: Request, *, rounds: int, warmup: int
) -> dict[str, Distribution]:
    """Draw `warmup` + `rounds` pictures one by one; the first `warmup` do not count."""
    samples: Samples = defaultdict(list)
    for number in range(warmup + rounds):
        one = time_picture(pipeline, calls, varied(request, number))
        if number >= warmup:
            for stage, seconds in one.items():
                samples[stage] += seconds
    return {stage: Distribution.of(samples[stage]) for stage in STAGES if samples[stage]}


def varied(request: Request, number: int = 0, images: int = 1) -> Request:
    """The request of round `number`: `images` pictures, from another prompt and another seed each round."""
    prompt = f"{request.prompts[0]}, {number}" if number else request.prompts[0]
    first = request.seeds[0] + number
    return replace(request, prompts=(prompt,), seeds=tuple(range(first, first + images)), num_images_per_prompt=images)


def time_picture(pipeline: Pipeline, calls: Calls, request: Request) -> Samples:
    """Draw one picture; the seconds of its stages."""
    from ..images.metadata import png_bytes

    for name in ("text_encoder", "unet"):
        calls.take(name)
    started = time.perf_counter()
    generation = pipeline.start(request)
    encoded = time.perf_counter()
    steps = [time.perf_counter() for _ in generation]
    result = generation.result()
    images = result.images
    decoded = time.perf_counter()
    png_bytes(images[0], result.parameters[0])
    finished = time.perf_counter()

    text, unet = calls.take("text_encoder"), calls.take("unet")
    spans = [b - a for a, b in zip([encoded, *steps], steps, strict=False)]
    return {
        "tokenize": [encoded - started - sum(text)] if text else [],
        "text": text or [encoded - started],
        "unet": unet or [sum(spans) / len(spans)],
        "host": [span - call for span, call in zip(spans, unet, strict=True)] if unet else [],
        "decode": [decoded - steps[-1]],
        "png": [finished - decoded],
        "picture": [finished - started],
    }


@dataclass(frozen=True)
class Batch:
    """Pictures drawn together: how many, pictures a second, and steps of a picture a second; medians of the rounds."""

    images: int
    images_per_second: float
    steps_per_second: float


def measure_batches(pipeline: Pipeline, request: Request, sizes: tuple[int, ...], *, rounds: int) -> list[Batch]:
    """Each size is drawn once before it is measured."""
    found = []
    for size in sizes:
        batch = varied(request, images=size)
        steps = len(pipeline.plan(batch))
        seconds = []
        for _ in range(rounds + 1):
            started = time.perf_counter()
            images = pipeline.start(batch).result().images
            seconds.append(time.perf_counter() - started)
            assert len(images) == size
        median = Distribution.of(seconds[1:]).p50
        found.append(Batch(size, size / median, steps * size / median))
    return found
