"""The UNet of a service: what its evaluations cost, which requests share the next one, and running it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..engines.protocol import Engine
from ..errors import EngineError, OutOfMemoryError
from ..loop.host import Evaluation, evaluate_together
from ..networks.unet import sample_ranges, takes_timestep_per_row
from ..pipeline import Pipeline
from ..request import make_request
from ..tensor import Array
from .curve import Curves, StepCurve, measure, widths
from .job import Task
from .policy import PolicyName, choose


@dataclass(frozen=True)
class Answer:
    """What an evaluation gave one task: the UNet's output (R, C, h, w), or the error of one that was run for it alone.

    seconds: of the whole evaluation; shared: whether others had a part in it."""

    task: Task
    output: Array | Exception
    seconds: float
    shared: bool


class Evaluator:
    """Runs evaluations of a pipeline's UNet for several tasks at once.  One thread at a time."""

    def __init__(self, pipeline: Pipeline, policy: PolicyName, most_rows: int | None) -> None:
        self._pipeline, self._policy = pipeline, policy
        self._unet: Engine = pipeline.engines.engine("unet")
        self._shares = takes_timestep_per_row(self._unet)  # else its bundle is of an older version
        self._rows = self._allowed_rows(most_rows)
        self._curves: Curves | None = None

    def _allowed_rows(self, limit: int | None) -> list[int]:
        """Numbers of rows that the UNet takes at once, at the bundle's own size."""
        pipeline, engines = self._pipeline, self._pipeline.engines
        most = sample_ranges(self._unet)[0][1]
        most = min(most, limit or most)
        if engines.on_cpu:
            return list(range(1, most + 1))
        latent = pipeline.latent_shape(make_request(pipeline.manifest.defaults, "", seed=0))
        return sorted(engines.batch_sizes(most, 1, latent)) or [1]

    def warm_up(self) -> StepCurve:
        """Run each stage once at the bundle's own size, then measure the UNet by rows."""
        pipeline = self._pipeline
        request = make_request(pipeline.manifest.defaults, "", seed=0, num_inference_steps=1)
        prepared = pipeline.prepare(request)
        pipeline.generate(prepared).result()
        start = prepared.start(prepared.batches[0])
        conditions = {"encoder_hidden_states": start.encoder_hidden_states[:1]} | prepared.guidance.inputs(1)
        one = Evaluation(start.latents[:1], float(prepared.plan.timesteps[0]), conditions)
        allowed = self._rows if self._shares else self._rows[:2]
        curve = measure(lambda rows: evaluate_together(self._unet, [one] * rows), widths(allowed))
        self._curves = Curves(prepared.latent, curve)
        return curve

    @property
    def warm(self) -> bool:
        return self._curves is not None

    def curve(self, latent: tuple[int, ...]) -> StepCurve:
        """Seconds of an evaluation by its rows, for latents (C, h, w).  EngineError: nothing is measured yet."""
        if self._curves is None:
            raise EngineError("the service is not warmed up yet", remedy="call warm_up first")
        return self._curves.of(latent)

    def seconds(self, tasks: Sequence[Task]) -> float:
        """What an evaluation for these tasks should take."""
        return self.curve(tasks[0].latent).seconds(sum(task.rows for task in tasks))

    def left(self, task: Task) -> float:
        """What is left of a task's whole request, were it alone, in seconds."""
        return task.left * self.seconds([task])

    def choose(self, waiting: Sequence[Task], now: float) -> list[Task]:
        """Which of the tasks (one or more) share the next evaluation."""
        allowed = set(self._rows) if self._shares else set[int]()
        return choose(waiting, lambda task: self.curve(task.latent), now, self._policy, allowed.__contains__)

    def evaluate(self, tasks: Sequence[Task]) -> Iterator[Answer]:
        """One evaluation for all of these tasks; where that fails for several of them, one for each alone."""
        started = time.monotonic()
        try:
            outputs = evaluate_together(self._unet, [task.evaluation for task in tasks])
        except Exception as error:  # an engine's own, too: the loop goes on for the others
            if len(tasks) == 1:
                yield Answer(tasks[0], error, time.monotonic() - started, False)
                return
            if isinstance(error, OutOfMemoryError):
                most = sum(task.rows for task in tasks) - 1
                self._rows = [rows for rows in self._rows if rows <= most] or self._rows[:1]
            for task in tasks:
                yield from self.evaluate([task])
            return
        seconds = time.monotonic() - started
        self.curve(tasks[0].latent).observe(sum(task.rows for task in tasks), seconds)
        for task, output in zip(tasks, outputs, strict=True):
            yield Answer(task, output, seconds, len(tasks) > 1)
