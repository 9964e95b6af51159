"""AsyncPipeline: a pipeline for many asyncio tasks, whose requests share evaluations of the UNet.

    async with await AsyncPipeline.load("stable-diffusion-v1-5") as pipe:
        served = await pipe.generate(pipe.request("a lighthouse at dusk", seed=7))
        served.result.images[0].save("lighthouse.png")

It sets no signal handlers, keeps no global state and sets up no logging; it may be used from several event loops.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..bundle.bundle import Bundle
from ..engines.backend import Backend
from ..images.convert import Picture
from ..inputs import Inputs
from ..pipeline import Pipeline
from ..request import Options, Request, check_request, make_request
from ..result import Step
from ..tensor import Array
from .curve import StepCurve
from .job import Served, Ticket
from .limits import Limits, Status
from .policy import PolicyName
from .scheduler import Scheduler

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self, Unpack

BUFFERED = 8  # steps that wait for a slow reader; the oldest make room


class AsyncPipeline:
    """See the module; `load` makes one, warmed up and ready."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    @classmethod
    async def load(
        cls,
        bundle: str | Path | Bundle | None = None,
        *,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        threads: int | None = None,
        safety_checker: bool = True,
        backends: Sequence[str | Backend] | None = None,
        policy: PolicyName = "latency",
        limits: Limits | None = None,
    ) -> AsyncPipeline:
        """Open a bundle and warm it up, beside the event loop.

        The first arguments and the errors are those of `Pipeline.load`.
        policy: "latency" runs the shortest remaining work first and shares what the engine's curve gives nearly free;
        "throughput" shares as much as brings pictures a second.  See `policy`.
        limits: how many requests are taken on, and so on."""

        def load() -> AsyncPipeline:
            arguments = {"device": device, "threads": threads, "safety_checker": safety_checker, "backends": backends}
            pipeline = Pipeline.load(bundle, **arguments)  # type: ignore[arg-type]
            try:
                scheduler = Scheduler(pipeline, policy, limits)
                scheduler.warm_up()
            except BaseException:
                pipeline.close()
                raise
            return cls(scheduler)

        return await asyncio.get_running_loop().run_in_executor(None, load)

    @property
    def pipeline(self) -> Pipeline:
        """What the requests run on: its manifest, its samplers' names."""
        return self._scheduler.pipeline

    @property
    def curve(self) -> StepCurve:
        """Seconds of an evaluation at the bundle's own size, by its rows, as measured and learnt."""
        defaults = self.pipeline.manifest.defaults
        return self._scheduler.curve(self.pipeline.latent_shape(make_request(defaults, "", seed=0)))

    @property
    def status(self) -> Status:
        return self._scheduler.status

    def request(self, prompt: str | Sequence[str], **options: Unpack[Options]) -> Request:
        """A request for this bundle; see `make_request`."""
        return make_request(self.pipeline.manifest.defaults, prompt, **options)

    def submit(
        self,
        request: Request,
        *,
        image: Picture | Sequence[Picture] | None = None,
        latents: Array | None = None,
        priority: int = 0,
        deadline: float | None = None,
    ) -> Ticket:
        """Queue a request without waiting for it; `ticket.future` is a concurrent.futures.Future of its Served.

        image, latents: as for `Pipeline.__call__`; priority: higher goes first; deadline: seconds from now, after which
        no step of it is run.  OverloadedError, EngineError: it is not taken."""
        return self._submit(request, image, latents, priority, deadline, None)

    def _submit(
        self,
        request: Request,
        image: Picture | Sequence[Picture] | None,
        latents: Array | None,
        priority: int,
        deadline: float | None,
        steps: asyncio.Queue[Step] | None,
    ) -> Ticket:
        check_request(request)
        loop = None if steps is None else asyncio.get_running_loop()
        given = image is not None or latents is not None or request.strength is not None

        def inputs() -> Inputs:
            return self.pipeline.inputs(request, image=image, latents=latents)

        def tell(step: Step) -> None:
            assert loop is not None and steps is not None
            if not loop.is_closed():
                loop.call_soon_threadsafe(_put, steps, step)

        return self._scheduler.submit(
            request,
            inputs if given else None,
            priority=priority,
            deadline=deadline,
            on_step=None if steps is None else tell,
        )

    async def generate(
        self,
        request: Request,
        *,
        image: Picture | Sequence[Picture] | None = None,
        latents: Array | None = None,
        priority: int = 0,
        deadline: float | None = None,
    ) -> Served:
        """Draw a request.  Where the awaiting task is cancelled, at most the evaluation that runs is still run for it.

        The arguments and errors are those of `submit`; besides DeadlineError, and what the request itself comes to:
        UsageError, NumericalError, EngineError."""
        return await self._wait(self._submit(request, image, latents, priority, deadline, None))

    async def stream(
        self,
        request: Request,
        *,
        image: Picture | Sequence[Picture] | None = None,
        latents: Array | None = None,
        priority: int = 0,
        deadline: float | None = None,
    ) -> AsyncIterator[Step | Served]:
        """Every Step as it is done, then the Served.  A reader that is slow misses steps, never the end; one that
        leaves (aclose, break in `async with aclosing(...)`) cancels the request.  See `generate`."""
        steps: asyncio.Queue[Step] = asyncio.Queue(BUFFERED)
        ticket = self._submit(request, image, latents, priority, deadline, steps)
        done = asyncio.ensure_future(self._wait(ticket))
        try:
            while not done.done():
                following = asyncio.ensure_future(steps.get())
                await asyncio.wait((done, following), return_when=asyncio.FIRST_COMPLETED)
                if not following.done():
                    following.cancel()
                    break
                yield following.result()
            while not steps.empty():
                yield steps.get_nowait()
            yield await done
        finally:
            if not done.done():
                done.cancel()
                await asyncio.gather(done, return_exceptions=True)

    async def _wait(self, ticket: Ticket) -> Served:
        try:
            return await asyncio.wrap_future(ticket.future)
        except asyncio.CancelledError:
            ticket.cancel()
            raise

    async def close(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """Take no more requests; finish those that are there, in `timeout` seconds, or end them; free everything."""
        close = partial(self._scheduler.close, drain=drain, timeout=timeout)
        await asyncio.get_running_loop().run_in_executor(None, close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close(drain=error is None)


def _put(steps: asyncio.Queue[Step], step: Step) -> None:
    if steps.full():
        steps.get_nowait()
    steps.put_nowait(step)
