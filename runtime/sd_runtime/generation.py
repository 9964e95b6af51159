"""Generation: a request being drawn, step by step."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from .errors import UsageError
from .images.metadata import Parameters
from .inputs import NO_INPUTS, Inputs
from .noise import NoiseSource
from .provenance import SAFETY_CHECKER
from .request import Request
from .result import Result, Step, Timings
from .tensor import Array

if TYPE_CHECKING:
    from .pipeline import Pipeline


class Generation:
    """A request being drawn.  Iterate for its steps, then ask for the `result()`, which runs what steps remain.

    Nothing runs but inside `next()` and `result()`: dropping the object cancels the work, and after `stop()` the result
    is the pictures begun so far, as far as they came.
    """

    def __init__(self, pipeline: Pipeline, request: Request, inputs: Inputs = NO_INPUTS) -> None:
        """Encode the prompts, and the pictures to be changed if there are any."""
        self._pipeline, self.request, self.inputs = pipeline, request, inputs
        self._plan = pipeline.plan(request)
        started = time.perf_counter()
        self._embeddings = pipeline.encode_prompts(request)  # (P, T, D) for P prompts
        encoded = time.perf_counter()
        self._posterior = None if inputs.pictures is None else pipeline.encode_samples(inputs.pictures)  # 1 or P rows
        self._encode_seconds, self._image_seconds = encoded - started, time.perf_counter() - encoded
        self._denoise_seconds = 0.0
        self._batches = pipeline.batches(request)
        self._latents: list[Array] = []  # of finished batches, and of the one under way
        self._done = 0
        self._steps = self._run()

    @property
    def evaluations(self) -> int:
        """The number of steps (UNet evaluations) of one batch."""
        return len(self._plan)

    def __len__(self) -> int:
        """The number of steps of all batches."""
        return len(self._batches) * len(self._plan)

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        started = time.perf_counter()
        try:
            return next(self._steps)
        finally:
            self._denoise_seconds += time.perf_counter() - started

    def _run(self) -> Generator[Step]:
        """The whole flow of the latents, batch by batch."""
        request, pipeline, plan = self.request, self._pipeline, self._plan
        guidance = pipeline.guidance(request)
        for images in self._batches:
            noise = NoiseSource([request.seeds[i] for i in images], request.rng)
            first = self._first(images, noise)  # (B, 4, h, w), the UNet's first input
            hidden = self._embeddings.rows([i // request.num_images_per_prompt for i in images])  # (B or 2B, T, D)
            self._latents.append(first)
            denoiser = pipeline.components.denoiser(guidance)
            with closing(denoiser(plan, first, hidden, guidance, noise)) as steps:
                for done in steps:
                    self._latents[-1] = done.latents
                    self._done += 1
                    matrix = pipeline.preview_matrix
                    yield Step(self._done - 1, len(self), images, done.timestep, done.latents, matrix)

    def _first(self, images: range, noise: NoiseSource) -> Array:
        """The latents (B, 4, h, w) that a batch starts from.

        With a picture to change, a seed's first noise samples the picture's latents and its second is laid on them."""
        plan, shape = self._plan, self._pipeline.latent_shape(self.request)
        if self._posterior is not None:
            rows = [self.inputs.row_of(self.request, i) for i in images]
            clean = self._posterior.take(rows).sample(noise.draw(shape))
            return np.float32(plan.start_signal) * clean + np.float32(plan.start_noise) * noise.draw(shape)
        given = self.inputs.latents
        unit = noise.draw(shape) if given is None else given[images.start : images.stop]
        return unit * np.float32(plan.init_noise_scale)

    def stop(self) -> None:
        """No further step is run."""
        self._steps.close()

    def latents(self) -> Array:
        """(B, 4, h, w) float32 latents of every picture begun so far, as far as they came.  UsageError: none was."""
        if not self._latents:
            raise UsageError("no picture was begun", remedy="run a step before stopping")
        return np.concatenate(self._latents)

    def result(self, *, decode: bool = True) -> Result:
        """Run what steps remain and, unless told otherwise, decode.  NumericalError rather than a black picture."""
        for _ in self:
            pass
        latents = self.latents()  # (B, 4, h, w)
        started = time.perf_counter()
        decoded = self._pipeline.decode(latents, fast=self.request.fast_decoder) if decode else None
        decode_seconds, started = time.perf_counter() - started, time.perf_counter()
        checker, withheld = self._pipeline.safety_checker, None
        if decoded is not None and checker is not None:
            withheld = checker(decoded.samples)
            decoded = decoded.blacked_out(withheld) if any(withheld) else decoded
        check_seconds = time.perf_counter() - started
        return Result(
            request=self.request,
            latents=latents,
            decoded=decoded,
            seeds=self.request.seeds[: len(latents)],
            parameters=tuple(self._parameters(image, withheld) for image in range(len(latents))),
            timings=Timings(
                self._encode_seconds, self._image_seconds, self._denoise_seconds, decode_seconds, check_seconds
            ),
            truncated=self._embeddings.truncated,
            nsfw_content_detected=withheld,
        )

    def _parameters(self, image: int, withheld: Sequence[bool] | None) -> Parameters:
        """What repeats a picture, what the safety checker said, and that it was not finished where that is so."""
        parameters = self._pipeline.parameters(self.request, image, self.inputs)
        if withheld is not None:
            verdict = {SAFETY_CHECKER: "blacked out" if withheld[image] else "passed"}
            parameters = replace(parameters, extra=parameters.extra | verdict)
        batch = next(number for number, images in enumerate(self._batches) if image in images)
        done = self._done - batch * len(self._plan)
        if done >= len(self._plan):
            return parameters
        return replace(parameters, extra=parameters.extra | {"Stopped after": f"{done} of {len(self._plan)} steps"})
