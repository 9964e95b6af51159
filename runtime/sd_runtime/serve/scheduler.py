"""The loop of a service: one thread runs the UNet, and between any two evaluations requests join and leave.

    submit ─▶ text thread: prompts and pictures encoded ─▶ loop thread: evaluations, shared ─▶ picture thread: decoded

Every sampler is a table of rows, and an evaluation a value (`loop.host.Denoising`), so that the loop may run any of the
requests' evaluations next, and several of them at once, whatever their samplers, steps and guidance.  `policy` decides
which, by the engine's own curve of seconds over rows.

Nothing here knows asyncio, sockets or signals; `async_pipeline` and the server are built on it.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from ..errors import CancelledError, EngineError, OverloadedError, SDError, UsageError
from ..generation import make_result, make_step
from ..inputs import NO_INPUTS, Inputs
from ..loop.host import Evaluated
from ..pipeline import Pipeline
from ..request import Request
from ..result import Step
from .curve import StepCurve
from .evaluator import Answer, Evaluator
from .job import Job, Served, Task, Ticket
from .limits import Limits, Status
from .policy import POLICIES, PolicyName
from .prompt_memory import PromptMemory

LOG = logging.getLogger("sd_runtime.serve")
FAILURES = 3  # evaluations that fail one after the other until the engine is given up


class Scheduler:
    """The requests of one pipeline; `submit` from any thread, `close` at the end.

    `warm_up` measures the curve before the first request; until then `status.ready` is false."""

    def __init__(self, pipeline: Pipeline, policy: PolicyName = "latency", limits: Limits | None = None) -> None:
        """The pipeline belongs to the scheduler from now on, which closes it.  UsageError: an unknown policy."""
        if policy not in POLICIES:
            raise UsageError("policy", got=policy, accepted=", ".join(POLICIES))
        self.pipeline, self.limits = pipeline, limits or Limits()
        self._evaluator = Evaluator(pipeline, policy, self.limits.rows)
        self._process = os.getpid()
        self._changed = threading.Condition()
        self._jobs: list[Job] = []  # all that were admitted and are not done, in the order of their arrival
        self._closing = self._stopped = False
        self._broken: SDError | None = None
        self._evaluating: tuple[float, float] | None = None  # since when, and until when at most
        self._failures = 0
        self._prompts = PromptMemory(pipeline)
        self._text = ThreadPoolExecutor(1, "sd-text")
        self._pictures = ThreadPoolExecutor(1, "sd-pictures")
        self._threads = [
            threading.Thread(target=run, name=name, daemon=True)
            for run, name in ((self._loop, "sd-steps"), (self._watch, "sd-watchdog"))
        ]

    # ---- from outside ------------------------------------------------------------------------------------------------

    def warm_up(self) -> StepCurve:
        """Run each stage once, measure the UNet by rows, and begin to take requests."""
        curve = self._evaluator.warm_up()
        for thread in self._threads:
            thread.start()
        return curve

    def curve(self, latent: tuple[int, ...]) -> StepCurve:
        """Seconds of an evaluation by its rows, for latents (C, h, w).  EngineError: nothing is measured yet."""
        return self._evaluator.curve(latent)

    def submit(
        self,
        request: Request,
        inputs: Callable[[], Inputs] | None = None,
        *,
        priority: int = 0,
        deadline: float | None = None,
        on_step: Callable[[Step], None] | None = None,
    ) -> Ticket:
        """Queue a request.  One that is in the service already, equal in everything, is not drawn again.

        inputs: makes what it starts from, on the text thread; deadline: seconds from now; see `Ticket` for `on_step`.
        OverloadedError: the queue is full; EngineError: closed, not warmed up, or broken; UsageError: after fork."""
        if os.getpid() != self._process:
            raise UsageError("a service of a process that forked", remedy="load the pipeline after fork")
        if deadline is not None and not deadline > 0:
            raise UsageError("deadline", got=deadline, accepted="seconds, more than 0")
        ticket = Ticket(None if deadline is None else time.monotonic() + deadline, on_step)
        with self._changed:
            self._check_open()
            same = None if inputs is not None else self._same(request)
            if same is not None:
                same.tickets.append(ticket)
                same.priority = max(same.priority, priority)
            elif len(self._jobs) >= self.limits.requests:
                raise OverloadedError(len(self._jobs), self.limits.requests, self._room_in())
            else:
                job = Job(request, inputs or (lambda: NO_INPUTS), priority, [ticket], shareable=inputs is None)
                self._jobs.append(job)
                self._text.submit(self._prepare, job)
            self._changed.notify_all()
        return ticket

    @property
    def status(self) -> Status:
        with self._changed:
            running = sum(job.started is not None for job in self._jobs)
            why = "" if self._evaluator.warm else "it is warming up"
            why = "it is closing" if self._closing else why
            why = str(self._broken) if self._broken is not None else why
            return Status(len(self._jobs) - running, running, not why, why)

    def position(self, ticket: Ticket) -> int | None:
        """How many requests were admitted before this one and are not done; None: it is done."""
        with self._changed:
            return next((n for n, job in enumerate(self._jobs) if ticket in job.tickets), None)

    def close(self, *, drain: bool = False, timeout: float | None = None) -> None:
        """Take no more requests; finish those that are there (at most `timeout` seconds), or end them; free everything.

        A second time, do nothing but wait."""
        until = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            self._closing = True
            if drain and self._evaluator.warm:
                self._changed.wait_for(lambda: not self._jobs, timeout)
            self._stopped = True
            for job in self._jobs:
                job.fail(CancelledError("the service was closed"))
            self._jobs.clear()
            self._changed.notify_all()
        hung = self._broken is not None
        self._text.shutdown(wait=not hung, cancel_futures=True)
        self._pictures.shutdown(wait=not hung, cancel_futures=True)
        for thread in self._threads:
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join(None if until is None and not hung else 1.0)
        if not hung:  # else a thread is still in the engine
            self.pipeline.close()

    # ---- admission ---------------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._broken is not None:
            raise EngineError(f"the service is broken: {self._broken}", remedy="start it anew")
        if self._closing:
            raise EngineError("the service was closed")
        if not self._evaluator.warm:
            raise EngineError("the service is not warmed up yet", remedy="call warm_up first")

    def _same(self, request: Request) -> Job | None:
        return next((job for job in self._jobs if job.shareable and job.request == request and job.tickets), None)

    def _room_in(self) -> float:
        """Seconds until about one request is done, by what is left of the one that is furthest."""
        return min((self._evaluator.left(job.task) for job in self._jobs if job.task is not None), default=1.0)

    # ---- the text thread ---------------------------------------------------------------------------------------------

    def _prepare(self, job: Job) -> None:
        started = time.monotonic()
        try:
            if not self._wanted(job):
                return
            pipeline, request = self.pipeline, job.request
            pipeline.check(request)
            prepared = pipeline.prepare(request, job.inputs(), self._prompts(request))
            job.text = time.monotonic() - started
            job.prepare(prepared, pipeline.stages(prepared))
        except BaseException as error:
            self._end(job, error)
        with self._changed:
            self._changed.notify_all()

    # ---- the loop's thread -------------------------------------------------------------------------------------------

    def _loop(self) -> None:
        while (tasks := self._next()) is not None:
            for answer in self._evaluator.evaluate(tasks):
                self._take(answer)
            self._evaluating = None

    def _next(self) -> list[Task] | None:
        """Wait for work; the tasks that share the next evaluation.  None: the service ends."""
        with self._changed:
            while not self._stopped:
                now = time.monotonic()
                for job in list(self._jobs):
                    job.expire(now)
                    if not job.tickets:
                        self._jobs.remove(job)
                        self._changed.notify_all()
                waiting = [job.task for job in self._jobs if job.task is not None]
                if waiting and self._broken is None:
                    chosen = self._evaluator.choose(waiting, now)
                    for task in chosen:
                        task.job.started = task.job.started or now
                    self._evaluating = now, now + max(self.limits.hang_after, 20 * self._evaluator.seconds(chosen))
                    return chosen
                self._changed.wait(1.0 if self._jobs else None)
        return None

    def _take(self, answer: Answer) -> None:
        """One task goes on from its part of an evaluation, or its request ends."""
        task, job = answer.task, answer.task.job
        if isinstance(answer.output, Exception):
            self._failures += 1
            if self._failures >= FAILURES:
                self._give_up(EngineError(f"{FAILURES} evaluations in a row failed: {answer.output}"))
            self._end(job, answer.output)
            return
        self._failures = 0
        try:
            evaluated = task.denoising.advance(answer.output)
            self._tell(task, evaluated)
            job.count(answer.seconds, time.monotonic(), shared=answer.shared)
            if task.take(evaluated) and not job.next_batch():
                self._pictures.submit(self._finish, job)
        except BaseException as error:  # of this request alone: NaN, say
            self._end(job, error)

    def _tell(self, task: Task, evaluated: Evaluated) -> None:
        job = task.job
        with self._changed:
            listening = [ticket.on_step for ticket in job.tickets if ticket.on_step is not None]
        if listening:
            assert job.prepared is not None and job.stages is not None
            step = make_step(job.prepared, job.stages, task.batch.images, evaluated, job.done)
            for listener in listening:
                listener(step)

    # ---- the picture thread ------------------------------------------------------------------------------------------

    def _finish(self, job: Job) -> None:
        try:
            if not self._wanted(job):
                return
            assert job.prepared is not None and job.stages is not None
            prepared, started = job.prepared, time.monotonic()
            seconds = prepared.encode_prompt_seconds, prepared.encode_image_seconds, job.alone + job.shared
            result = make_result(prepared, job.stages, job.finished, seconds)
            served = Served(result, job.times(time.monotonic() - started), job.shared_steps)
            with self._changed:
                for ticket in job.tickets:
                    if not ticket.future.done():
                        ticket.future.set_result(served)
                self._leave(job)
        except BaseException as error:
            self._end(job, error)

    # ---- ends --------------------------------------------------------------------------------------------------------

    def _wanted(self, job: Job) -> bool:
        """Whether anybody still waits for a job; one that nobody wants leaves."""
        with self._changed:
            job.expire(time.monotonic())
            if not job.tickets:
                self._leave(job)
            return bool(job.tickets)

    def _end(self, job: Job, error: BaseException) -> None:
        with self._changed:
            job.fail(error)
            self._leave(job)

    def _leave(self, job: Job) -> None:
        job.task = None
        if job in self._jobs:
            self._jobs.remove(job)
        self._changed.notify_all()

    def _give_up(self, error: SDError) -> None:
        """No request can be served any more: all that are there fail, and no more are taken."""
        LOG.error("%s", error)
        with self._changed:
            self._broken = error
            for job in self._jobs:
                job.fail(error)
            self._jobs.clear()
            self._changed.notify_all()

    def _watch(self) -> None:
        """The watchdog: an evaluation that does not come back must not keep callers waiting."""
        pause = min(self.limits.hang_after / 4, 1.0)
        while not self._stopped and self._broken is None:
            under_way = self._evaluating
            if under_way is not None and time.monotonic() > under_way[1]:
                since = time.monotonic() - under_way[0]
                self._give_up(EngineError(f"an evaluation of the UNet has not come back for {since:.0f} s"))
                return
            with self._changed:
                self._changed.wait_for(lambda: self._stopped, pause)
