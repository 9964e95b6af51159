"""From prompt to picture: the one file that sees all parts.

    prompt ─tokens─▶ embeddings (B, T, D) ─▶ latents (B, 4, h, w), denoised step by step ─▶ picture (B, 3, 8h, 8w)

`Pipeline.load(bundle)` once, then call it: `pipe("a red star", seed=7).images[0]`.  For progress, previews and
cancelling, `pipe.start(request)` returns a `Generation`: iterate over its steps, then ask for its `result()`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from .bundle.bundle import Bundle, find_bundle
from .bundle.catalogue import EAGER
from .bundle.manifest import Manifest
from .engines.backend import Backend
from .engines.engines import Engines
from .errors import UsageError
from .fields import Resize, check
from .generation import Generation, Stages
from .images.convert import Picture, from_pictures
from .images.metadata import Parameters
from .images.preview import SD1_PREVIEW
from .inputs import NO_INPUTS, Inputs, as_latents, check_size, make_inputs
from .loop.guidance import Guidance
from .loop.placement import Loops
from .networks.safety_checker import PREPROCESSOR, ImageProcessor, SafetyChecker
from .networks.text_encoder import CONFIG, vocabulary_size
from .networks.unet import guidance_width, sample_ranges
from .networks.vae import Posterior, encode
from .notices import warn
from .prepared import Prepared, in_batches
from .prompt import PromptEmbeddings, Tokenizer
from .prompt_encoder import PromptEncoder
from .provenance import describe, unused
from .request import DEFAULT_STRENGTH, Options, Request, check_request, make_request
from .result import Result, Step
from .sampling import SamplingPlan, SchedulerConfig, make_plan, resolve
from .tensor import Array

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Pipeline:
    """A bundle's engines, tokenizer and scheduler, ready to draw.  A context manager: leaving it frees the engines."""

    def __init__(
        self,
        bundle: Bundle,
        engines: Engines,
        tokenizer: Tokenizer,
        scheduler_config: SchedulerConfig,
        safety_checker: SafetyChecker | None = None,
    ) -> None:
        """Use `Pipeline.load`; the parts are taken apart here for tests and embedders."""
        self.bundle, self.engines, self.tokenizer = bundle, engines, tokenizer
        self.prompts = PromptEncoder(bundle, engines, tokenizer)
        self.loops = Loops(bundle, engines)
        self.scheduler_config = scheduler_config
        self.safety_checker = safety_checker  # as in diffusers, None turns it off
        preview = bundle.manifest.latent.preview
        self.preview_matrix = SD1_PREVIEW if preview is None else np.array(preview, np.float32)

    @classmethod
    def load(
        cls,
        bundle: str | Path | Bundle | None = None,
        *,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        threads: int | None = None,
        safety_checker: bool = True,
        backends: Sequence[str | Backend] | None = None,
    ) -> Pipeline:
        """Open a bundle (a folder, or the name of an exported model; None: the only one there is), load its engines.

        threads: how many each network takes on the CPU; None: one a core.
        safety_checker: run the bundle's, if it has one: pictures that it withholds are black.
        backends: what runs the networks, in order of preference: names of `engines.registry.BACKENDS` or backends of
        your own; None: TensorRT where its engines fit this machine, ONNX Runtime for the rest.
        BundleError: missing or damaged; DependencyError: no engine library; EngineError; UsageError: device, backends.
        """
        if not isinstance(bundle, Bundle):
            bundle = Bundle.open(find_bundle(None if bundle is None else str(bundle)))
        engines = Engines.open(bundle, device, threads=threads, backends=backends)
        checked = safety_checker and "safety_checker" in bundle.manifest.components
        engines.preload((*EAGER, "safety_checker") if checked else EAGER)
        checker = None
        if checked:
            processor = ImageProcessor.from_bytes(bundle.read(PREPROCESSOR))
            checker = SafetyChecker(engines.engine("safety_checker"), processor)
        return cls.assemble(bundle, engines, checker)

    @classmethod
    def assemble(cls, bundle: Bundle, engines: Engines, safety_checker: SafetyChecker | None = None) -> Pipeline:
        """A pipeline with these engines, each of which may as well be loaded only when it is first needed.

        BundleError: the tokenizer's or the sampler's files are damaged."""
        tokenizer = Tokenizer.from_bytes({name: bundle.read(path) for name, path in bundle.under("tokenizer").items()})
        if CONFIG in bundle.manifest.files:
            tokenizer.check_ids(vocabulary_size(bundle.read(CONFIG)))
        scheduler_config = SchedulerConfig.from_bytes(bundle.read("scheduler/scheduler_config.json"))
        return cls(bundle, engines, tokenizer, scheduler_config, safety_checker)

    @property
    def manifest(self) -> Manifest:
        return self.bundle.manifest

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        image: Picture | Sequence[Picture] | None = None,
        latents: Array | None = None,
        decode: bool = True,
        callback: Callable[[Step], object] | None = None,
        **options: Unpack[Options],
    ) -> Result:
        """Draw pictures; argument names are diffusers', those of `options` are the fields of `Request`, with the ranges
        and defaults of `fields.FIELDS`; what is None or left out is the bundle's own default.

        image: what to change instead of starting from noise alone: one for all prompts, or one each, of the kinds that
        `from_pictures` takes; strength, by default 0.8, is how much of it is noised away.
        latents: (B, 4, height/8, width/8) unit noise to start from instead of the seeds' noise.
        decode: False leaves it at the latents.
        callback: called after every step; one that returns False, or anything else that is false but None, stops the
        run, and the picture is there as far as it came.
        """
        if image is not None and options.get("strength") is None:
            options["strength"] = DEFAULT_STRENGTH
        generation = self.start(make_request(self.manifest.defaults, prompt, **options), image=image, latents=latents)
        generation.run(callback)
        return generation.result(decode=decode)

    def start(
        self,
        request: Request,
        *,
        image: Picture | Sequence[Picture] | None = None,
        latents: Array | None = None,
    ) -> Generation:
        """Prepare a request; the steps run as the Generation is iterated."""
        for notice in self.notices(request):
            warn(notice)
        return self.generate(self.prepare(request, self.inputs(request, image=image, latents=latents)))

    def inputs(
        self,
        request: Request,
        *,
        image: Picture | Sequence[Picture] | None = None,
        latents: Array | None = None,
    ) -> Inputs:
        """What a request starts from, checked against it and against this bundle.  UsageError, as `make_inputs`."""
        self.check(request)
        return make_inputs(request, self.latent_shape(request), image, latents)

    def prepare(
        self, request: Request, inputs: Inputs = NO_INPUTS, embeddings: PromptEmbeddings | None = None
    ) -> Prepared:
        """Make a request ready to run: its prompts and its pictures are encoded here, once.

        embeddings: what `encode_prompts` gave for the same prompts."""
        plan, started = self.plan(request), time.perf_counter()
        embeddings = self.encode_prompts(request) if embeddings is None else embeddings
        encoded = time.perf_counter()
        posterior = None if inputs.pictures is None else self.encode_samples(inputs.pictures)
        return Prepared(
            request=request,
            inputs=inputs,
            latent=self.latent_shape(request),
            plan=plan,
            guidance=self.guidance(request),
            embeddings=embeddings,
            posterior=posterior,
            batches=self.batches(request),
            encode_prompt_seconds=encoded - started,
            encode_image_seconds=time.perf_counter() - encoded,
        )

    def generate(self, prepared: Prepared) -> Generation:
        """What runs a prepared request on this pipeline's networks."""
        if not isinstance(prepared, Prepared):
            raise UsageError("prepared", got=repr(prepared), accepted="what `prepare` gives")
        return Generation(prepared, self.stages(prepared))

    def stages(self, prepared: Prepared) -> Stages:
        """What a prepared request runs through on this pipeline's networks."""
        return Stages(
            denoiser=self.loops.denoiser,
            decode=self.loops.decode,
            safety_checker=self.safety_checker,
            preview_matrix=self.preview_matrix,
            parameters=partial(self.parameters, prepared.request, inputs=prepared.inputs),
        )

    def scheduler(self, request: Request) -> SchedulerConfig:
        """The sampler that a request names, with the checkpoint's own training schedule."""
        config = self.scheduler_config
        if not isinstance(config, SchedulerConfig):
            remedy = "make one with SchedulerConfig.from_dict, or name a sampler as `scheduler`"
            raise UsageError("scheduler_config", got=type(config).__name__, accepted="SchedulerConfig", remedy=remedy)
        return config if request.scheduler is None else config.switched(resolve(request.scheduler))

    def parameters(self, request: Request, image: int, inputs: Inputs = NO_INPUTS) -> Parameters:
        """What picture `image` of a request should say about itself: enough to repeat it."""
        own, words, told = self.scheduler_config, self.prompts.inversions, self.guidance(request)
        return describe(request, image, inputs, told, manifest=self.manifest, own_scheduler=own, inversions=words)

    def notices(self, request: Request) -> list[str]:
        """What a request asks for that has no effect, a line each; `start` says it, too."""
        return unused(request, self.guidance(request))

    def load_textual_inversion(self, path: str | Path, token: str | None = None) -> str:
        """Learn a word from a .safetensors file and return it; `token` is the word if the file's own will not do.

        UsageError: not such a file, of another width than this model's, or a word that is taken."""
        return self.prompts.learn(path, token)

    def encode_prompts(self, request: Request) -> PromptEmbeddings:
        return self.prompts.encode(request, negative=self.guidance(request).on)

    def encode_image(
        self,
        image: Picture | Sequence[Picture],
        *,
        width: int | None = None,
        height: int | None = None,
        resize: Resize = "crop",
        noise: Array | None = None,
    ) -> Array:
        """Pictures → (B, 4, h, w) latents, the inverse of `decode_latents`; by default at the bundle's own size.

        They are the most likely ones or, with unit `noise` (B, 4, h, w) float32, a sample of what the encoder says."""
        defaults = self.manifest.defaults
        width, height = defaults.width if width is None else width, defaults.height if height is None else height
        check("width", width)
        check("height", height)
        check_size(height, width, sample_ranges(self.engines.engine("unet")), self.manifest.latent.pixels)
        posterior = self.encode_samples(from_pictures(image, width=width, height=height, resize=resize))
        return posterior.mean if noise is None else posterior.sample(as_latents("noise", noise, posterior.mean.shape))

    def encode_samples(self, samples: Array) -> Posterior:
        """(B, 3, 8h, 8w) float32 samples in [-1, 1] → what the VAE encoder says of their latents."""
        return encode(self.engines.engine("vae_encoder"), samples, self.manifest.latent.scaling_factor)

    def decode_latents(self, latents: Array, *, fast: bool = False) -> Array:
        """(B, 4, h, w) float32 latents → (B, 3, 8h, 8w) float32 samples, nominally in [-1, 1]; `fast`: by the TAESD."""
        checked = as_latents("latents", latents, (None, self.manifest.latent.channels, None, None))
        return self.loops.decode(checked, fast=fast).samples

    def latent_shape(self, request: Request) -> tuple[int, int, int]:
        latent = self.manifest.latent
        return latent.channels, request.height // latent.pixels, request.width // latent.pixels

    def check(self, request: Request) -> None:
        """UsageError if the bundle cannot draw this: its size, its sampler with these steps, or its prompts."""
        check_request(request)
        ranges = sample_ranges(self.engines.engine("unet"))
        check_size(request.height, request.width, ranges, self.manifest.latent.pixels)
        if request.fast_decoder and "taesd" not in self.manifest.components:
            remedy = f"add one: sd-export --model {self.manifest.source.id} --taesd madebyollin/taesd --force"
            raise UsageError("fast_decoder", got=True, accepted="a bundle that has one", remedy=remedy)
        self.plan(request)
        self.prompts.tokenize(request, negative=self.guidance(request).on)

    def guidance(self, request: Request) -> Guidance:
        """How the request's pictures are guided: the UNet's inputs tell whether it does that itself."""
        check_request(request)
        return Guidance(request.guidance_scale, request.guidance_rescale, guidance_width(self.engines.engine("unet")))

    def plan(self, request: Request) -> SamplingPlan:
        """The request's sampler and steps as a table."""
        check_request(request)
        strength = 1.0 if request.strength is None else request.strength
        distilled = guidance_width(self.engines.engine("unet")) is not None
        config, steps = self.scheduler(request), request.num_inference_steps
        return make_plan(config, steps, strength=strength, eta=request.eta, keep_steps=distilled)

    def batches(self, request: Request) -> tuple[range, ...]:
        """The request's pictures in batches that the UNet takes; guidance needs two rows a picture."""
        rows = 2 if self.guidance(request).on else 1
        most = max(min(sample_ranges(self.engines.engine("unet"))[0][1] // rows, self.loops.most_pictures), 1)
        return in_batches(request.num_images, self.engines.batch_sizes(most, rows, self.latent_shape(request)))

    def close(self) -> None:
        self.loops.close()
        self.engines.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
