"""A request in the service: who waits for it, how far its pictures are, and where its time went."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from ..errors import CancelledError, DeadlineError
from ..generation import Batch, Stages
from ..inputs import Inputs
from ..loop.host import Denoising, Evaluated, Evaluation
from ..prepared import Prepared
from ..request import Request
from ..result import Result, Step


@dataclass(frozen=True)
class Times:
    """Seconds of a request by what it waited for.

    queue   for its turn, before its first step, text encoding not counted
    text    prompts and pictures to change being encoded
    alone   steps that it ran by itself
    shared  steps that it shared with other requests
    between its steps: others' turns
    decode  latents to pictures, safety checker included
    """

    queue: float
    text: float
    alone: float
    shared: float
    between: float
    decode: float

    @property
    def total(self) -> float:
        return self.queue + self.text + self.alone + self.shared + self.between + self.decode


@dataclass(frozen=True)
class Served:
    """What a request came to, and where its time went.

    shared_steps: how many of its evaluations were run together with those of other requests."""

    result: Result
    times: Times
    shared_steps: int = 0


@dataclass(eq=False)
class Ticket:
    """One caller's claim on a job: `future` has its Served or its error.  `on_step` is called by the loop's thread, so
    it must be quick and must not raise.

    deadline: on the clock of time.monotonic; None: none."""

    deadline: float | None
    on_step: Callable[[Step], None] | None
    future: Future[Served] = field(default_factory=Future)
    cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Give the claim up; the loop drops the job, if nobody else wants it, before its next evaluation."""
        self.cancelled.set()

    def fail(self, error: BaseException) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class Task:
    """The batch of a job's pictures that is on its way; `Waiting` of `policy`."""

    def __init__(self, job: Job, prepared: Prepared, images: range) -> None:
        start = prepared.start(images)
        arguments = prepared.plan, start.latents, start.encoder_hidden_states, prepared.guidance, start.noise
        self.job, self.batch, self.denoising = job, Batch(images, start.latents), Denoising(*arguments)
        self.latent: tuple[int, ...] = prepared.latent
        self.rows = len(start.encoder_hidden_states)

    @property
    def kind(self) -> tuple[object, ...]:
        """Tasks of equal shapes of latents and conditions can share an evaluation."""
        conditions = self.denoising.conditions
        return self.latent, *((name, conditions[name].shape[1:]) for name in sorted(conditions))

    @property
    def left(self) -> int:
        return self.job.left

    @property
    def priority(self) -> int:
        return self.job.priority

    @property
    def arrived(self) -> float:
        return self.job.arrived

    @property
    def evaluation(self) -> Evaluation:
        evaluation = self.denoising.evaluation()
        assert evaluation is not None  # tasks leave with their last one
        return evaluation

    def take(self, evaluated: Evaluated) -> bool:
        """Keep what an evaluation left; whether it was the batch's last."""
        self.batch.latents = evaluated.latents
        self.batch.evaluations += 1
        return self.batch.evaluations == evaluated.total


@dataclass(eq=False)
class Job:
    """A request, the tickets of all who asked for exactly this one, and how far it is.

    The scheduler's lock guards `tickets` and `priority`; all else is the text thread's until `task` is there, then the
    loop's.

    inputs   makes what the request starts from; it may read pictures, so it is called off the caller's thread
    batches  of the request's pictures that are not begun
    done     evaluations that were run, of all batches
    """

    request: Request
    inputs: Callable[[], Inputs]
    priority: int
    tickets: list[Ticket]
    shareable: bool = True  # an equal request may be served by this one
    arrived: float = field(default_factory=time.monotonic)
    prepared: Prepared | None = None
    stages: Stages | None = None
    task: Task | None = None
    batches: deque[range] = field(default_factory=deque)
    finished: list[Batch] = field(default_factory=list)
    done: int = 0
    started: float | None = None  # when its first evaluation was chosen
    stepped: float = 0.0  # when its last one ended
    text: float = 0.0
    alone: float = 0.0
    shared: float = 0.0
    shared_steps: int = 0

    def prepare(self, prepared: Prepared, stages: Stages) -> None:
        self.prepared, self.stages, self.batches = prepared, stages, deque(prepared.batches)
        self.task = Task(self, prepared, self.batches.popleft())

    def next_batch(self) -> bool:
        """Begin the next batch; False: that was the last."""
        assert self.prepared is not None and self.task is not None
        self.finished.append(self.task.batch)
        self.task = Task(self, self.prepared, self.batches.popleft()) if self.batches else None
        return self.task is not None

    @property
    def total(self) -> int:
        return 0 if self.prepared is None else len(self.prepared.batches) * len(self.prepared.plan)

    @property
    def left(self) -> int:
        return self.total - self.done

    def count(self, seconds: float, ended: float, *, shared: bool) -> None:
        """An evaluation of this job took so long."""
        self.done += 1
        self.stepped = ended
        self.shared_steps += shared
        if shared:
            self.shared += seconds
        else:
            self.alone += seconds

    def expire(self, now: float) -> None:
        """Take off the claims that were given up or are too late, each with its error."""
        for ticket in list(self.tickets):
            how_far = f"after {self.done} of {self.total} steps"
            if ticket.cancelled.is_set():
                ticket.fail(CancelledError(f"the request was cancelled {how_far}"))
            elif ticket.deadline is not None and now >= ticket.deadline:
                ticket.fail(DeadlineError(f"the deadline passed {how_far}"))
            else:
                continue
            self.tickets.remove(ticket)

    def fail(self, error: BaseException) -> None:
        """The same error for all who wait."""
        for ticket in self.tickets:
            ticket.fail(error)
        self.tickets.clear()

    def times(self, decode: float) -> Times:
        started = self.arrived if self.started is None else self.started
        between = max(self.stepped - started - self.alone - self.shared, 0.0)
        return Times(max(started - self.arrived - self.text, 0.0), self.text, self.alone, self.shared, between, decode)
