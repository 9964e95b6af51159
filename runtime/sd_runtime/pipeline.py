"""From prompt to picture: the one file that sees all parts.

    prompt ─tokens─▶ embeddings (B, T, D) ─▶ latents (B, 4, h, w), denoised step by step ─▶ picture (B, 3, 8h, 8w)

`Pipeline.load(bundle)` once, then call it: `pipe("a red star", seed=7).images[0]`.  For progress, previews and
cancelling, `pipe.start(request)` returns a `Generation`: iterate over its steps, then ask for its `result()`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np

from .bundle.bundle import Bundle, find_bundle
from .bundle.manifest import Manifest
from .bundle.safetensors_file import open_safetensors
from .engines.loader import EAGER, Components
from .errors import UsageError
from .generation import Generation
from .images.convert import Picture, Resize, from_pictures
from .images.metadata import Parameters
from .images.preview import SD1_PREVIEW
from .inputs import NO_INPUTS, Inputs, check_latents, check_size, make_inputs
from .loop.host import Guidance
from .networks.safety_checker import PREPROCESSOR, ImageProcessor, SafetyChecker
from .networks.vae import Decoded, Posterior, decode, encode
from .prompt import PromptEmbeddings, TokenEmbeddings, Tokenizer, encode_prompts, load_textual_inversion
from .provenance import describe
from .request import DEFAULT_STRENGTH, Request, make_request
from .result import Result, Step
from .sampling import SamplingPlan, SchedulerConfig, make_plan, resolve
from .tensor import Array

TOKEN_EMBEDDING = "text_model.embeddings.token_embedding.weight"


class Pipeline:
    """A bundle's engines, tokenizer and scheduler, ready to draw.  A context manager: leaving it frees the engines."""

    def __init__(
        self,
        bundle: Bundle,
        components: Components,
        tokenizer: Tokenizer,
        scheduler_config: SchedulerConfig,
        safety_checker: SafetyChecker | None = None,
    ) -> None:
        """Use `Pipeline.load`; the parts are taken apart here for tests and embedders."""
        self.bundle, self.components, self.tokenizer = bundle, components, tokenizer
        self.scheduler_config = scheduler_config
        self.safety_checker = safety_checker  # as in diffusers, None turns it off
        self.inversions: dict[str, Array] = {}  # the words of textual inversions, each with its vectors (k, D)
        preview = bundle.manifest.latent.preview
        self.preview_matrix = SD1_PREVIEW if preview is None else np.array(preview, np.float32)

    @classmethod
    def load(
        cls,
        bundle: str | Path | None = None,
        *,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        threads: int | None = None,
        safety_checker: bool = True,
    ) -> Pipeline:
        """Open a bundle (a folder, or the name of an exported model; None: the only one there is), load its engines.

        threads: how many each network takes on the CPU; None: one a core.
        safety_checker: run the bundle's, if it has one: pictures that it withholds are black.
        BundleError: missing or damaged; DependencyError: no engine library; EngineError; UsageError: device."""
        if threads is not None and threads < 1:
            raise UsageError("threads", got=threads, accepted="at least 1")
        opened = Bundle.open(find_bundle(None if bundle is None else str(bundle)))
        components = Components.open(opened, device, threads=threads)
        checked = safety_checker and "safety_checker" in opened.manifest.components
        components.preload((*EAGER, "safety_checker") if checked else EAGER)
        checker = None
        if checked:
            processor = ImageProcessor.from_bytes(opened.read(PREPROCESSOR))
            checker = SafetyChecker(components.engine("safety_checker"), processor)
        return cls.assemble(opened, components, checker)

    @classmethod
    def assemble(cls, bundle: Bundle, components: Components, safety_checker: SafetyChecker | None = None) -> Pipeline:
        """A pipeline with these engines, each of which may as well be loaded only when it is first needed.

        BundleError: the tokenizer's or the sampler's files are damaged."""
        tokenizer = Tokenizer.from_bytes({name: bundle.read(path) for name, path in bundle.under("tokenizer").items()})
        scheduler_config = SchedulerConfig.from_bytes(bundle.read("scheduler/scheduler_config.json"))
        return cls(bundle, components, tokenizer, scheduler_config, safety_checker)

    @property
    def manifest(self) -> Manifest:
        return self.bundle.manifest

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        image: Picture | Sequence[Picture] | None = None,
        strength: float | None = None,
        resize: Resize = "crop",
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
        fast_decoder: bool = False,
        latents: Array | None = None,
        decode: bool = True,
        callback: Callable[[Step], object] | None = None,
    ) -> Result:
        """Draw pictures; argument names are diffusers', ranges are in `Request`, None means the bundle's own default.

        image: what to change instead of starting from noise alone: one for all prompts, or one each, of the kinds that
        `image.from_pictures` takes; strength, by default 0.8, is how much of it is noised away.
        latents: (B, 4, height/8, width/8) float32 unit noise to start from instead of the seeds' noise.
        decode: False leaves it at the latents.
        callback: called after every step; return False to stop early and get the picture as far as it came.
        """
        if image is not None and strength is None:
            strength = DEFAULT_STRENGTH
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
            strength=strength,
            resize=resize,
            prompt_weighting=prompt_weighting,
            truncate=truncate,
            fast_decoder=fast_decoder,
        )
        generation = self.start(request, image=image, latents=latents)
        for step in generation:
            if callback is not None and callback(step) is False:
                generation.stop()
        return generation.result(decode=decode)

    def start(
        self,
        request: Request,
        *,
        image: Picture | Sequence[Picture] | None = None,
        latents: Array | None = None,
    ) -> Generation:
        """Check a request against this bundle and encode its prompts; the steps run as the Generation is iterated."""
        return Generation(self, request, self.inputs(request, image=image, latents=latents))

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

    def scheduler(self, request: Request) -> SchedulerConfig:
        """The sampler that a request names, with the checkpoint's own training schedule."""
        config = self.scheduler_config
        return config if request.scheduler is None else config.switched(resolve(request.scheduler))

    def parameters(self, request: Request, image: int, inputs: Inputs = NO_INPUTS) -> Parameters:
        """What picture `image` of a request should say about itself: what `sd-run --from-image` repeats it from."""
        return describe(
            request,
            image,
            inputs,
            manifest=self.manifest,
            own_scheduler=self.scheduler_config,
            inversions=self.inversions,
        )

    def load_textual_inversion(self, path: str | Path, token: str | None = None) -> str:
        """Learn a word from a .safetensors file and return it; `token` is the word if the file's own will not do.

        UsageError: not such a file, of another width than this model's, or a word that is taken."""
        word, vectors = load_textual_inversion(Path(path), token)
        inversions = {**self.inversions, word: vectors}
        if len(inversions) == len(self.inversions):
            raise UsageError("textual inversion: word", got=word, accepted="a word that is not taken")
        TokenEmbeddings(self._token_embeddings(), inversions)  # checks them together
        self.inversions = inversions
        return word

    def _token_embeddings(self) -> Array:
        """(V, D), the text encoder's own table, memory-mapped; its file's digest was checked when it was loaded."""
        weights = self.bundle.component("text_encoder").weights
        return open_safetensors(self.bundle.path(weights or ""))[TOKEN_EMBEDDING]

    def encode_prompts(self, request: Request) -> PromptEmbeddings:
        learnt = TokenEmbeddings(self._token_embeddings(), self.inversions) if self.inversions else None
        return encode_prompts(
            self.components.engine("text_encoder", "embeds" if learnt else "plain"),
            self.tokenizer,
            request.prompts,
            request.negative_prompts if self.guidance(request).on else None,
            weighting=request.prompt_weighting,
            truncate=request.truncate,
            embeddings=learnt,
        )

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
        width, height = width or defaults.width, height or defaults.height
        check_size(height, width, self._unet_ranges(), self.manifest.latent.pixels)
        posterior = self.encode_samples(from_pictures(image, width=width, height=height, resize=resize))
        return (
            posterior.mean if noise is None else posterior.sample(check_latents("noise", noise, posterior.mean.shape))
        )

    def encode_samples(self, samples: Array) -> Posterior:
        """(B, 3, 8h, 8w) float32 samples in [-1, 1] → what the VAE encoder says of their latents."""
        return encode(self.components.engine("vae_encoder"), samples, self.manifest.latent.scaling_factor)

    def decode_latents(self, latents: Array, *, fast: bool = False) -> Array:
        """(B, 4, h, w) float32 latents → (B, 3, 8h, 8w) float32 samples, nominally in [-1, 1]; `fast`: by the TAESD."""
        return self.decode(latents, fast=fast).samples

    def decode(self, latents: Array, *, fast: bool = False) -> Decoded:
        """The same, with the pixels of the pictures where the GPU has made them."""
        if fast:
            return decode(self.components.engine("taesd"), latents, 1.0)  # it takes latents as the UNet leaves them
        decoder, scaling_factor = self.components.device_decoder, self.manifest.latent.scaling_factor
        if decoder is not None:
            return decoder(latents, scaling_factor)
        return decode(self.components.engine("vae_decoder"), latents, scaling_factor)

    def latent_shape(self, request: Request) -> tuple[int, int, int]:
        latent = self.manifest.latent
        return latent.channels, request.height // latent.pixels, request.width // latent.pixels

    def check(self, request: Request) -> None:
        """UsageError if the bundle cannot draw this: its size, or its sampler with these steps."""
        check_size(request.height, request.width, self._unet_ranges(), self.manifest.latent.pixels)
        if request.fast_decoder and "taesd" not in self.manifest.components:
            remedy = f"add one: sd-export --model {self.manifest.source.id} --taesd madebyollin/taesd --force"
            raise UsageError("fast_decoder", got=True, accepted="a bundle that has one", remedy=remedy)
        self.plan(request)

    def guidance(self, request: Request) -> Guidance:
        """How the request's pictures are guided: the UNet's inputs tell whether it does that itself."""
        return Guidance(request.guidance_scale, request.guidance_rescale, self._guidance_width())

    def _guidance_width(self) -> int | None:
        """Of the embedding by which the UNet is told the guidance scale; None: it is not told."""
        told = [spec.ranges[1][1] for spec in self.components.engine("unet").inputs if spec.name == "timestep_cond"]
        return told[0] if told else None

    def plan(self, request: Request) -> SamplingPlan:
        """The request's sampler and steps as a table."""
        strength = 1.0 if request.strength is None else request.strength
        return make_plan(
            self.scheduler(request),
            request.num_inference_steps,
            strength=strength,
            eta=request.eta,
            keep_steps=self._guidance_width() is not None,
        )

    def _unet_ranges(self) -> tuple[tuple[int, int], ...]:
        """Smallest and largest size of the UNet's input: rows, channels, height and width in latent cells."""
        return next(s for s in self.components.engine("unet").inputs if s.name == "sample").ranges

    def batches(self, request: Request) -> list[range]:
        """The request's pictures in batches that the UNet takes, the largest first; guidance needs two rows a picture.

        On the CPU one by one: more at once gain nothing there, and take memory in proportion."""
        rows = 2 if self.guidance(request).on else 1
        most = max(min(self._unet_ranges()[0][1] // rows, self._most_at_once()), 1)
        sizes = self.components.batch_sizes(most, rows, self.latent_shape(request))
        batches, first = [], 0
        while first < request.num_images:
            left = request.num_images - first
            size = max((size for size in sizes if size <= left), default=left)
            batches.append(range(first, first + size))
            first += size
        return batches

    def _most_at_once(self) -> int:
        """Pictures for which the sampler step has a state, in bundles that have one."""
        step = self.manifest.components.get("sampler_step")
        states = [] if step is None else [spec for spec in step.graph().inputs if spec.name == "state"]
        return min((state.ranges[1][1] for state in states), default=self._unet_ranges()[0][1])

    def close(self) -> None:
        self.components.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
