"""From prompt to picture: the one file that sees all parts.

    prompt ─tokens─▶ embeddings (B, T, D) ─▶ latents (B, 4, h, w), denoised step by step ─▶ picture (B, 3, 8h, 8w)

`Pipeline.load(bundle)` once, then call it: `pipe("a red star", seed=7).images[0]`.  For progress, previews and
cancelling, `pipe.start(request)` returns a `Generation`: iterate over its steps, then ask for its `result()`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np

from . import __version__
from .bundle import Bundle, find_bundle
from .components import Components
from .denoise import Guidance, denoise
from .engines.onnxruntime import choose_device
from .errors import NumericalError, UsageError
from .manifest import Manifest
from .metadata import Parameters
from .noise import NoiseSource
from .prompt import PromptEmbeddings, Tokenizer, encode_prompts
from .request import Request, make_request
from .result import Result, Step, Timings
from .sampling import SchedulerConfig, make_plan, resolve
from .schema import parse_json
from .tensor import Array, all_finite


class Pipeline:
    """A bundle's engines, tokenizer and scheduler, ready to draw.  A context manager: leaving it frees the engines."""

    def __init__(
        self, bundle: Bundle, components: Components, tokenizer: Tokenizer, scheduler_config: SchedulerConfig
    ) -> None:
        """Use `Pipeline.load`; the parts are taken apart here for tests and embedders."""
        self.bundle, self.components, self.tokenizer = bundle, components, tokenizer
        self.scheduler_config = scheduler_config

    @classmethod
    def load(cls, bundle: str | Path | None = None, *, device: Literal["auto", "cpu", "cuda"] = "auto") -> Pipeline:
        """Open a bundle (a folder, or the name of an exported model; None: the only one there is), load its engines.

        BundleError: missing or damaged; DependencyError: no engine library; EngineError; UsageError: device."""
        opened = Bundle.open(find_bundle(None if bundle is None else str(bundle)))
        components = Components(opened, choose_device(device))
        components.preload()
        tokenizer = Tokenizer.from_bytes({name: opened.read(path) for name, path in opened.under("tokenizer").items()})
        scheduler = parse_json(opened.read("scheduler/scheduler_config.json"), "scheduler_config.json")
        return cls(opened, components, tokenizer, SchedulerConfig.from_dict(scheduler))

    @property
    def manifest(self) -> Manifest:
        return self.bundle.manifest

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        eta: float | None = None,
        seed: int | Sequence[int] | None = None,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        scheduler: str | None = None,
        rng: Literal["cpu", "cuda"] = "cpu",
        prompt_weighting: bool = True,
        truncate: bool = False,
        latents: Array | None = None,
        callback: Callable[[Step], object] | None = None,
    ) -> Result:
        """Draw pictures; argument names are diffusers', ranges are in `Request`, None means the bundle's own default.

        latents: (B, 4, height/8, width/8) float32 unit noise to start from instead of the seeds' noise.
        callback: called after every step; return False to stop early and get the picture as far as it came.
        """
        request = make_request(
            self.manifest.defaults,
            prompt,
            negative_prompt=negative_prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            eta=eta,
            seed=seed,
            num_images_per_prompt=num_images_per_prompt,
            height=height,
            width=width,
            scheduler=scheduler,
            rng=rng,
            prompt_weighting=prompt_weighting,
            truncate=truncate,
        )
        generation = self.start(request, latents=latents)
        for step in generation:
            if callback is not None and callback(step) is False:
                generation.stop()
        return generation.result()

    def start(self, request: Request, *, latents: Array | None = None) -> Generation:
        """Check a request against this bundle and encode its prompts; the steps run as the Generation is iterated."""
        self._check_size(request)
        if latents is not None:
            expected = (request.num_images, *self.latent_shape(request))
            if latents.shape != expected or latents.dtype != np.float32:
                got = f"{latents.dtype}{latents.shape}"
                raise UsageError("latents", got=got, accepted=f"float32{expected}")
        return Generation(self, request, latents)

    def scheduler(self, request: Request) -> SchedulerConfig:
        """The sampler that a request names, with the checkpoint's own training schedule."""
        config = self.scheduler_config
        return config if request.scheduler is None else config.switched(resolve(request.scheduler))

    def parameters(self, request: Request, image: int) -> Parameters:
        """What picture `image` of a request should say about itself."""
        return Parameters(
            prompt=request.prompt_of(image),
            negative_prompt=request.negative_prompt_of(image),
            num_inference_steps=request.num_inference_steps,
            scheduler=self.scheduler(request).label,
            guidance_scale=request.guidance_scale,
            seed=request.seeds[image],
            width=request.width,
            height=request.height,
            model=self.manifest.name,
            model_hash=self.manifest.model_hash,
            rng=request.rng,
            version=f"sd-lean {__version__}",
        )

    def encode_prompts(self, request: Request) -> PromptEmbeddings:
        return encode_prompts(
            self.components.engine("text_encoder"),
            self.tokenizer,
            request.prompts,
            request.negative_prompts if request.guided else None,
            weighting=request.prompt_weighting,
            truncate=request.truncate,
        )

    def decode_latents(self, latents: Array) -> Array:
        """(B, 4, h, w) float32 latents → (B, 3, 8h, 8w) float32 samples in about [-1, 1], one picture at a time."""
        decoder, scale = self.components.engine("vae_decoder"), np.float32(self.manifest.latent.scaling_factor)
        samples = [decoder.run({"latent_sample": one[None] / scale})["sample"] for one in latents]
        for index, sample in enumerate(samples):
            if not all_finite(sample):
                raise NumericalError(
                    f"VAE decoder output of picture {index + 1}",
                    got="NaN or infinity",
                    remedy="export the bundle with --precision fp32",
                )
        return np.concatenate(samples)

    def latent_shape(self, request: Request) -> tuple[int, int, int]:
        latent = self.manifest.latent
        return latent.channels, request.height // latent.pixels, request.width // latent.pixels

    def _check_size(self, request: Request) -> None:
        _, _, rows, columns = self._unet_ranges()
        pixels = self.manifest.latent.pixels
        for name, size, (low, high) in (("height", request.height, rows), ("width", request.width, columns)):
            if size % pixels or not low * pixels <= size <= high * pixels:
                nearest = min(max(round(size / pixels), low), high) * pixels
                accepted = f"multiples of {pixels} from {low * pixels} to {high * pixels}"
                raise UsageError(name, got=size, accepted=accepted, remedy=f"nearest: {nearest}")

    def _unet_ranges(self) -> tuple[tuple[int, int], ...]:
        """Smallest and largest size of the UNet's input: rows, channels, height and width in latent cells."""
        return next(s for s in self.components.engine("unet").inputs if s.name == "sample").ranges

    def batches(self, request: Request) -> list[range]:
        """The request's pictures in batches that the UNet takes; guidance needs two rows a picture."""
        size = max(self._unet_ranges()[0][1] // (2 if request.guided else 1), 1)
        return [range(i, min(i + size, request.num_images)) for i in range(0, request.num_images, size)]

    def close(self) -> None:
        self.components.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Generation:
    """A request being drawn.  Iterate for its steps, then ask for the `result()`, which runs what steps remain.

    Nothing runs but inside `next()` and `result()`: dropping the object cancels the work, and after `stop()` the result
    is the pictures begun so far, as far as they came.
    """

    def __init__(self, pipeline: Pipeline, request: Request, latents: Array | None = None) -> None:
        self._pipeline, self.request = pipeline, request
        started = time.perf_counter()
        self._embeddings = pipeline.encode_prompts(request)  # (P, T, D) for P prompts
        self._encode_seconds, self._denoise_seconds = time.perf_counter() - started, 0.0
        self._plan = make_plan(pipeline.scheduler(request), request.num_inference_steps, eta=request.eta)
        self._batches = pipeline.batches(request)
        self._latents: list[Array] = []  # of finished batches, and of the one under way
        self._steps = self._run(latents)

    def __len__(self) -> int:
        """The number of steps (UNet evaluations) in all."""
        return len(self._batches) * len(self._plan.timesteps)

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        started = time.perf_counter()
        try:
            return next(self._steps)
        finally:
            self._denoise_seconds += time.perf_counter() - started

    def _run(self, latents: Array | None) -> Generator[Step]:
        """The whole flow of the latents, batch by batch."""
        request, pipeline, plan = self.request, self._pipeline, self._plan
        image_shape = pipeline.latent_shape(request)  # (4, h, w)
        guidance = Guidance(request.guidance_scale, request.guidance_rescale)
        for number, images in enumerate(self._batches):
            noise = NoiseSource([request.seeds[i] for i in images], request.rng)
            unit = noise.draw(image_shape) if latents is None else latents[images.start : images.stop]  # (B, 4, h, w)
            first = unit * np.float32(plan.init_noise_scale)  # (B, 4, h, w), the UNet's first input
            hidden = self._embeddings.rows([i // request.num_images_per_prompt for i in images])  # (B or 2B, T, D)
            self._latents.append(first)
            for done in denoise(pipeline.components.engine("unet"), plan, first, hidden, guidance, noise):
                self._latents[-1] = done.latents
                index = number * len(plan.timesteps) + done.index
                yield Step(index, len(self), images, done.timestep, done.latents)

    def stop(self) -> None:
        """No further step is run."""
        self._steps.close()

    def latents(self) -> Array:
        """(B, 4, h, w) float32 latents of every picture begun so far, as far as they came."""
        return np.concatenate(self._latents)

    def result(self) -> Result:
        """Run what steps remain and decode.  NumericalError rather than a black picture."""
        for _ in self:
            pass
        latents = self.latents()  # (B, 4, h, w)
        started = time.perf_counter()
        samples = self._pipeline.decode_latents(latents)  # (B, 3, 8h, 8w)
        decode_seconds = time.perf_counter() - started
        return Result(
            request=self.request,
            samples=samples,
            latents=latents,
            seeds=self.request.seeds[: len(latents)],
            timings=Timings(self._encode_seconds, self._denoise_seconds, decode_seconds),
            truncated=self._embeddings.truncated,
        )
