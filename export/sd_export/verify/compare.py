"""The runtime's side: a bundle runs what the reference ran, and every output is measured."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
from sd_runtime.bundle.bundle import Bundle
from sd_runtime.engines.engines import Engines
from sd_runtime.errors import NumericalError
from sd_runtime.noise import NoiseSource
from sd_runtime.pipeline import Pipeline
from sd_runtime.prompt.chunks import tokenize_prompt
from sd_runtime.result import Result
from sd_runtime.tensor import Array

from .limits import EXACT, drift_limit, network_limit, picture_limit
from .limits import NOISE as NOISE_LIMIT
from .measures import NOT_FINITE, measure
from .reference import LATENTS, NOISE, PICTURE, TOKENS, Reference
from .report import Report, Row
from .stopwatch import Stopwatch


def open_pipeline(bundle: Bundle, device: str) -> Pipeline:
    """A bundle's pipeline, complete or not: networks are loaded as they are needed, and nothing withholds a picture."""
    return Pipeline.assemble(bundle, Engines.open(bundle, device))


def compare(pipeline: Pipeline, reference: Reference) -> Report:
    """Every row that both sides have, in the order of the flow: tokens, noise, networks, loop, picture."""
    side = _BundleSide(pipeline, reference)
    rows = [side.tokens(), side.noise(), *side.networks()]
    if PICTURE in reference.tensors:
        rows += side.picture()
    manifest = pipeline.manifest
    versions = ", ".join(f"{name} {version}" for name, version in reference.libraries.items())
    return Report(
        bundle=str(pipeline.bundle.root),
        source=manifest.source.id,
        precision=manifest.precision,
        device=describe_device(pipeline),
        reference=f"{versions}, {reference.origin}",
        probe=reference.probe,
        rows=tuple(rows),
        seconds={stage: (seconds, reference.seconds.get(stage)) for stage, seconds in side.seconds.items()},
        pictures=side.pictures,
    )


def describe_device(pipeline: Pipeline) -> str:
    """Where the networks run, for people."""
    engines = pipeline.engines
    return "ONNX Runtime on the CPU" if engines.on_cpu else f"the GPU, its UNet in {engines.precision('unet')}"


class _BundleSide:
    """Runs a bundle on a reference's inputs, and takes the time."""

    def __init__(self, pipeline: Pipeline, reference: Reference) -> None:
        self._pipeline, self._reference = pipeline, reference
        self._engines = pipeline.engines
        self._timed = Stopwatch()
        self.pictures: tuple[Array, Array] | None = None

    @property
    def seconds(self) -> dict[str, float]:
        return self._timed.seconds

    def tokens(self) -> Row:
        tokenizer, expected = self._pipeline.tokenizer, self._reference.tensors[TOKENS]
        chunks = [tokenize_prompt(tokenizer, [(t, 1.0)], truncate=True).chunks[0].ids for t in self._reference.texts]
        return Row("tokenizer", f"{len(chunks)} texts", measure(np.array(chunks, np.int64), expected), EXACT)

    def noise(self) -> Row:
        probe, expected = self._reference.probe, self._reference.tensors[NOISE]
        drawn = NoiseSource([probe.seed]).draw(expected.shape[1:])
        return Row("noise", f"seed {probe.seed}", measure(drawn, expected), NOISE_LIMIT)

    def networks(self) -> Iterator[Row]:
        """Each call of a network that this bundle has; the fastest of a network's calls counts."""
        components = self._pipeline.manifest.components
        for case in self._reference.cases:
            if case.component not in components:
                continue
            engine = self._engines.engine(case.component)
            output = self._timed(case.component, partial(engine.run, self._reference.feeds(case)))[case.output]
            precision = self._engines.precision(case.component)
            limit = network_limit(case.component, precision, self._cells, on_cpu=self._engines.on_cpu)
            yield Row(case.component, case.name, measure(output, self._reference.tensors[case.expected]), limit)

    def picture(self) -> Iterator[Row]:
        """The latents after each step, where both sides call the UNet equally often, and the picture."""
        expected = self._reference.tensors[LATENTS]
        precision, on_cpu = self._engines.precision("unet"), self._engines.on_cpu
        limit = drift_limit(precision, on_cpu=on_cpu)
        try:
            trail, result = self._timed("picture", self._draw, again=False)
        except NumericalError as error:  # ends the picture, not the report
            yield Row("loop", error.what, NOT_FINITE, limit)
            return
        steps = range(len(trail)) if len(trail) == len(expected) else range(0)
        for step in steps[:-1]:
            yield Row("loop", f"step {step + 1}", measure(trail[step], expected[step]), limit)
        yield Row("loop", "final latents", measure(trail[-1], expected[-1]), limit)
        theirs = self._reference.tensors[PICTURE]
        self.pictures = theirs[0], result.arrays[0]
        yield Row("picture", "", measure(result.arrays, theirs, span=1.0), picture_limit(precision, on_cpu=on_cpu))

    def _draw(self) -> tuple[list[Array], Result]:
        generation = self._pipeline.start(self._reference.probe.request(self._pipeline.manifest.defaults))
        trail = [step.model_input for step in generation]
        return trail, generation.result()

    @property
    def _cells(self) -> int:
        """Of the picture's latents."""
        return int(np.prod(self._reference.tensors[NOISE].shape[2:]))
