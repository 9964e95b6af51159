"""Generation: a prepared request being drawn.  The whole flow from noise to picture, with shapes in the margin."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from .errors import UsageError
from .images.metadata import Parameters
from .loop.guidance import Guidance
from .loop.host import Evaluated
from .loop.placement import Denoiser
from .networks.safety_checker import SafetyChecker
from .networks.vae import Decoded
from .prepared import Prepared
from .provenance import SAFETY_CHECKER, STOPPED
from .request import Request
from .result import Result, Step, Timings
from .tensor import Array


class Decode(Protocol):
    """(B, C, h, w) float32 latents → their pictures; `fast`: by the tiny decoder."""

    def __call__(self, latents: Array, *, fast: bool = False) -> Decoded: ...


@dataclass(frozen=True)
class Stages:
    """What a prepared request runs through.

    denoiser        the denoising loop for a kind of guidance
    decode          latents → pictures
    safety_checker  None: none is asked
    preview_matrix  latents → colours, see `images.preview`
    parameters      what a picture of the request, by number, says about itself
    """

    denoiser: Callable[[Guidance], Denoiser]
    decode: Decode
    safety_checker: SafetyChecker | None
    preview_matrix: Array
    parameters: Callable[[int], Parameters]


@dataclass
class Batch:
    """Pictures that are denoised together: which of the request, their latents (B, C, h, w), and how far they are."""

    images: range
    latents: Array
    evaluations: int = 0


def asks_to_stop(answer: object) -> bool:
    """Whether a callback's answer ends the run: whatever is false, but for the None of a function without an answer.

    UsageError: an answer that is neither true nor false, as an array of several numbers."""
    try:
        return answer is not None and not answer
    except Exception as error:
        accepted = "None or True to go on, False to stop"
        raise UsageError("answer of the callback", got=type(answer).__name__, accepted=accepted) from error


class Generation:
    """A request being drawn.  Nothing runs but inside `next()` and what is said here: dropping it cancels the work.

    for step in generation             its steps; what is drawn is kept for `result()`
    for item in generation.results()   its steps and, after the last of a batch, the batch's Result, which is not kept
    generation.result()                run what steps remain; all pictures in one Result

    After `stop()` no step is run, and the result is the pictures begun so far, as far as they came.
    """

    def __init__(self, prepared: Prepared, stages: Stages) -> None:
        self.prepared, self._stages = prepared, stages
        self._flow = self._run()
        self._current: Batch | None = None  # under way, or stopped
        self._finished: list[Batch] = []
        self._seconds = prepared.encode_prompt_seconds, prepared.encode_image_seconds, 0.0  # not yet in a Result

    @property
    def request(self) -> Request:
        return self.prepared.request

    @property
    def evaluations(self) -> int:
        """The number of steps (UNet evaluations) of one batch."""
        return len(self.prepared.plan)

    def __len__(self) -> int:
        """The number of steps of all batches."""
        return len(self.prepared.batches) * self.evaluations

    def _run(self) -> Generator[Step | Batch]:
        """The whole flow of the latents, batch by batch."""
        prepared, done = self.prepared, 0
        for images in prepared.batches:
            start = prepared.start(images)  # latents (B, C, h, w), encoder_hidden_states (B or 2B, T, D)
            batch = self._current = Batch(images, start.latents)
            denoiser, guidance = self._stages.denoiser(prepared.guidance), prepared.guidance
            arguments = prepared.plan, start.latents, start.encoder_hidden_states, guidance, start.noise
            with closing(denoiser(*arguments)) as evaluations:
                for evaluated in evaluations:
                    batch.latents = evaluated.latents
                    batch.evaluations += 1
                    yield make_step(prepared, self._stages, images, evaluated, done)
                    done += 1
            self._current = None
            yield batch

    def _next(self) -> Step | Batch | None:
        """The next of the flow, timed; None at its end."""
        started = time.perf_counter()
        try:
            return next(self._flow, None)
        finally:
            text, image, denoise = self._seconds
            self._seconds = text, image, denoise + time.perf_counter() - started

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        while (item := self._next()) is not None:
            if isinstance(item, Step):
                return item
            self._finished.append(item)
        raise StopIteration

    def results(self) -> Iterator[Step | Result]:
        """Every step, and the pictures of each batch as soon as they are done: memory stays level over many."""
        while (item := self._next()) is not None:
            yield item if isinstance(item, Step) else self._result([item])
        if self._current is not None:  # it was stopped
            batch, self._current = self._current, None
            yield self._result([batch])

    def run(self, callback: Callable[[Step], object] | None = None) -> None:
        """Run all steps, `callback` after each; see `asks_to_stop`.  UsageError: it cannot be called."""
        if callback is not None and not callable(callback):
            raise UsageError("callback", got=callback, accepted="a function of a Step")
        for step in self:
            if callback is not None and asks_to_stop(callback(step)):
                self.stop()

    def stop(self) -> None:
        """No further step is run."""
        self._flow.close()

    def _begun(self) -> list[Batch]:
        batches = [*self._finished, *([] if self._current is None else [self._current])]
        if not batches:
            raise UsageError("no picture was begun", remedy="run a step before stopping")
        return batches

    def latents(self) -> Array:
        """(B, C, h, w) float32 latents of every picture begun so far, as far as they came.  UsageError: none was."""
        return np.concatenate([batch.latents for batch in self._begun()])

    def result(self, *, decode: bool = True) -> Result:
        """Run what steps remain and, unless told otherwise, decode.  NumericalError rather than a black picture."""
        for _ in self:
            pass
        return self._result(self._begun(), decode=decode)

    def _result(self, batches: Sequence[Batch], *, decode: bool = True) -> Result:
        seconds, self._seconds = self._seconds, (0.0, 0.0, 0.0)
        return make_result(self.prepared, self._stages, batches, seconds, decode=decode)


def make_step(prepared: Prepared, stages: Stages, images: range, evaluated: Evaluated, done: int) -> Step:
    """What callers see of an evaluation; `done` evaluations of the request were before it."""
    plan, k = prepared.plan, evaluated.index
    return Step(
        index=done,
        total=len(prepared.batches) * len(plan),
        images=images,
        timestep=evaluated.timestep,
        sigma=float(plan.sigmas[k]),
        model_input=evaluated.latents,
        latent_scale=float(plan.latent_scales[k]),
        preview_matrix=stages.preview_matrix,
    )


def make_result(
    prepared: Prepared,
    stages: Stages,
    batches: Sequence[Batch],
    seconds: tuple[float, float, float],
    *,
    decode: bool = True,
) -> Result:
    """The pictures of batches that follow each other; `seconds` for prompts, pictures to change, and denoising.

    NumericalError rather than a black picture."""
    request, latents = prepared.request, np.concatenate([batch.latents for batch in batches])  # (B, C, h, w)
    images = range(batches[0].images.start, batches[-1].images.stop)
    started = time.perf_counter()
    decoded = stages.decode(latents, fast=request.fast_decoder) if decode else None  # (B, 3, H, W)
    decode_seconds, started = time.perf_counter() - started, time.perf_counter()
    withheld = None
    if decoded is not None and stages.safety_checker is not None:
        withheld = stages.safety_checker(decoded.samples)
        decoded = decoded.blacked_out(withheld) if any(withheld) else decoded
    check_seconds = time.perf_counter() - started
    evaluations = [batch.evaluations for batch in batches for _ in batch.images]
    verdicts = withheld or [None] * len(images)
    return Result(
        request=request,
        indices=images,
        latents=latents,
        decoded=decoded,
        seeds=tuple(request.seeds[i] for i in images),
        parameters=tuple(
            _parameters(stages.parameters(image), done, len(prepared.plan), verdict)
            for image, done, verdict in zip(images, evaluations, verdicts, strict=True)
        ),
        timings=Timings(*seconds, decode_seconds, check_seconds),
        truncated=prepared.embeddings.truncated,
        nsfw_content_detected=withheld,
    )


def _parameters(parameters: Parameters, evaluations: int, wanted: int, withheld: bool | None) -> Parameters:
    """What repeats a picture, what the safety checker said, and that it was not finished where that is so."""
    more = dict[str, str]()
    if withheld is not None:
        more[SAFETY_CHECKER] = "blacked out" if withheld else "passed"
    if evaluations < wanted:
        more[STOPPED] = f"{evaluations} of {wanted} steps"
    return replace(parameters, extra=parameters.extra | more)
