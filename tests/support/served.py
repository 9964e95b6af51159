"""A service over the demo bundle whose UNet can be watched, delayed, stopped and spoilt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from own_backend import CountedEngine, OwnBackend
from sd_runtime import Limits, Pipeline, Request, make_request
from sd_runtime.bundle.bundle import Bundle
from sd_runtime.engines.protocol import Engine, Feed
from sd_runtime.serve.async_pipeline import AsyncPipeline
from sd_runtime.serve.scheduler import Scheduler
from sd_runtime.tensor import Array

Hook = Callable[[Array], Array | None]  # the sample of an evaluation → what to answer in the UNet's place


@dataclass
class Watched:
    """What the UNet was asked: rows and timesteps of each evaluation; `hook` may answer, raise or wait."""

    rows: list[int] = field(default_factory=list)
    timesteps: list[list[float]] = field(default_factory=list)
    hook: Hook | None = None


@dataclass
class WatchedEngine(CountedEngine):
    watched: Watched

    def run(self, feeds: Mapping[str, Feed]) -> dict[str, Array]:
        sample, timestep = feeds["sample"], feeds["timestep"]
        assert isinstance(sample, np.ndarray) and isinstance(timestep, np.ndarray)
        self.watched.rows.append(len(sample))
        self.watched.timesteps.append(timestep.tolist())
        answer = None if self.watched.hook is None else self.watched.hook(sample)
        return super().run(feeds) if answer is None else {"out_sample": answer}


@dataclass
class WatchedBackend(OwnBackend):
    watched: Watched = field(default_factory=Watched)

    def engine(self, component: str, form: str, fallback: Callable[[], Engine]) -> Engine | None:
        engine = super().engine(component, form, fallback)
        if component != "unet" or not isinstance(engine, CountedEngine):
            return engine
        return WatchedEngine(engine.engine, component, self.calls, self.watched)


@dataclass
class Service:
    scheduler: Scheduler
    backend: WatchedBackend

    @property
    def pipe(self) -> AsyncPipeline:
        return AsyncPipeline(self.scheduler)

    @property
    def watched(self) -> Watched:
        return self.backend.watched

    @property
    def prepared(self) -> int:
        """Requests whose prompts are encoded, and which are not drawn yet."""
        return sum(job.task is not None for job in list(self.scheduler._jobs))

    def request(self, prompt: str = "a large red star", **options: Any) -> Request:
        options = {"seed": 1, "num_inference_steps": 3, "height": 64, "width": 64} | options
        return make_request(self.scheduler.pipeline.manifest.defaults, prompt, **options)


@contextmanager
def serving(bundle: Path, policy: Any = "throughput", **limits: Any) -> Iterator[Service]:
    """A warm service with one thread for the UNet; what warming up asked is forgotten."""
    opened = Bundle.open(bundle)
    backend = WatchedBackend(opened)
    scheduler = Scheduler(
        Pipeline.load(opened, device="cpu", backends=[backend]), policy, Limits(**{"rows": 8} | limits)
    )
    scheduler.warm_up()
    backend.watched.rows.clear()
    backend.watched.timesteps.clear()
    backend.calls.clear()
    try:
        yield Service(scheduler, backend)
    finally:
        backend.watched.hook = None
        scheduler.close()
