"""A reference computed now: diffusers' own pipeline and networks, in float32 on the CPU.

The weights come through `networks.loading`, which fills transformers' and diffusers' modules and refuses every key that
is missing or left over; all else (tokenizer, sampler, guidance, the loop) is those libraries' code and none of ours.
"""

from __future__ import annotations

import importlib.metadata
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sd_runtime.bundle.catalogue import ALWAYS
from sd_runtime.sampling import resolve
from sd_runtime.tensor import Array

from ..networks.base import Network
from ..networks.registry import REGISTRY, find
from ..signature import Sizes
from ..source import Checkpoint
from .probe import TEXTS, Probe, sample_picture
from .reference import LATENTS, NOISE, PICTURE, TOKENS, Case, Reference
from .stopwatch import Stopwatch

LIBRARIES = ("torch", "diffusers", "transformers")
DRAWING = set(ALWAYS) & {entry.name for entry in REGISTRY}  # the networks that every picture needs


def make_reference(
    checkpoint: Checkpoint, probe: Probe, components: Collection[str], *, threads: int | None = None
) -> Reference:
    """Run the networks named in `components`, and the whole pipeline if they suffice for a picture.

    `threads`: of torch, by default what it is set to; with one, the last digits do not depend on the machine's number
    of cores."""
    with _settings(threads):
        made = TorchReference(checkpoint, probe)
        if "unet" in components:
            made.unet  # noqa: B018 – before the others: loading it takes half as much again for a moment
        made.add_inputs()
        for entry in REGISTRY:
            if entry.name in components:
                entry.network().reference(made)
        if set(components) >= DRAWING:
            made.add_picture()
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return Reference(probe, made.texts, tuple(made.cases), made.tensors, versions, "computed now", made.timed.seconds)


@contextmanager
def _settings(threads: int | None) -> Iterator[None]:
    """Without gradients, without the libraries' advice, with this many threads."""
    from transformers.utils import logging

    before, verbosity = torch.get_num_threads(), logging.get_verbosity()
    logging.set_verbosity_error()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads(before)
        logging.set_verbosity(verbosity)


class TorchReference:
    """Collects cases and tensors.  The networks' files add theirs; see `networks.base.Network.reference`.

    The libraries' models are loaded when first needed and shared by all that use them.  Methods that make a tensor
    return its name."""

    def __init__(self, checkpoint: Checkpoint, probe: Probe) -> None:
        self.checkpoint, self.probe = checkpoint, probe
        self.texts = (probe.negative_prompt, probe.prompt, *TEXTS)
        self.cases: list[Case] = []
        self.tensors: dict[str, Array] = {}
        self.timed = Stopwatch()

    # ---- the libraries' objects ----

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import CLIPTokenizer

        with tempfile.TemporaryDirectory() as folder:
            for name, content in self.checkpoint.tokenizer.items():
                Path(folder, name).write_bytes(content)
            return CLIPTokenizer.from_pretrained(folder)

    @cached_property
    def text_encoder(self) -> Any:
        return find("text_encoder").model(self.checkpoint)

    @cached_property
    def unet(self) -> Any:
        return find("unet").model(self.checkpoint)

    @cached_property
    def vae(self) -> Any:
        return find("vae_encoder").model(self.checkpoint)

    @cached_property
    def scheduler(self) -> Any:
        """Of the class and settings that the probe names, as diffusers makes one from the checkpoint's."""
        import diffusers

        config = dict(self.checkpoint.configs["scheduler"])
        own = getattr(diffusers, config["_class_name"]).from_config(config)
        if self.probe.scheduler is None:
            return own
        choice = resolve(self.probe.scheduler)
        return getattr(diffusers, choice.reference_class()).from_config(own.config, **choice.overrides)

    @cached_property
    def pipeline(self) -> Any:
        """diffusers' StableDiffusionPipeline around them; it may correct the scheduler's settings."""
        from diffusers import StableDiffusionPipeline

        pipeline = StableDiffusionPipeline(
            self.vae, self.text_encoder, self.tokenizer, self.unet, self.scheduler, None, None,
            requires_safety_checker=False,
        )  # fmt: skip
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    # ---- tensors and cases ----

    def put(self, name: str, tensor: Any) -> str:
        """Keep a tensor of torch's or numpy's."""
        self.tensors[name] = np.ascontiguousarray(tensor.numpy() if isinstance(tensor, torch.Tensor) else tensor)
        return name

    def tensor(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self.tensors[name])

    def case(self, component: str, name: str, feeds: dict[str, str], output: str, expected: str) -> None:
        """Add a call of a network; see `Case`."""
        self.cases.append(Case(component, name, feeds, output, expected))

    def traced_cases(self, component: str, network: Network, tensor: torch.Tensor) -> None:
        """A case for each output of the module that is traced, of a network with one input and no library's own way
        to call it."""
        loaded = network.load(self.checkpoint)
        (spec,) = loaded.signature.inputs
        feeds = {spec.name: self.put(f"{component}.{spec.name}", tensor)}
        outputs = self.timed(component, lambda: loaded.module(tensor))
        for spec, output in zip(
            loaded.signature.outputs, outputs if isinstance(outputs, tuple) else (outputs,), strict=True
        ):
            expected = self.put(f"{component}.out.{spec.name}", output)
            self.case(component, spec.name.replace("_", " "), feeds, spec.name, expected)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the picture's latents."""
        sizes = Sizes.of(self.checkpoint.configs)
        return 1, sizes.channels, self.probe.height // sizes.pixels, self.probe.width // sizes.pixels

    def add_inputs(self) -> None:
        """The token ids of all texts, and the seed's first noise."""
        positions = Sizes.of(self.checkpoint.configs).positions
        ids = self.tokenizer(list(self.texts), padding="max_length", max_length=positions, truncation=True)["input_ids"]
        self.put(TOKENS, np.array(ids, np.int64))
        self.put(NOISE, torch.randn(self.shape, generator=self._generator()))

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.probe.seed)

    def prompt_ids(self) -> str:
        """The token ids of the negative prompt and of the prompt (2, 77)."""
        return self._once("prompt_ids", lambda: self.tensor(TOKENS)[:2])

    def hidden_states(self) -> str:
        """The negative prompt's and the prompt's hidden states (2, 77, D)."""
        ids, encoder = self.tensor(self.prompt_ids()), self.text_encoder
        return self._once("last_hidden_state", lambda: self.timed("text_encoder", lambda: encoder(ids)[0]))

    def guidance_embedding(self, rows: int) -> str:
        """What a latent consistency model's UNet gets of the guidance scale (rows, G)."""
        scales = torch.full((rows,), self.probe.guidance_scale - 1)
        width = self.unet.config.time_cond_proj_dim
        return self.put("timestep_cond", self.pipeline.get_guidance_scale_embedding(scales, embedding_dim=width))

    def sample_picture(self) -> str:
        """(1, 3, H, W): a picture that all networks are tried on, in the size of the probe."""
        return self._once("sample_picture", lambda: sample_picture(self.probe.height, self.probe.width))

    def square_picture(self, side: int) -> torch.Tensor:
        """(1, 3, side, side): the same picture in another size."""
        return torch.from_numpy(sample_picture(side, side))

    def posterior(self) -> str:
        """Mean and log variance (1, 2 C, h, w) that the VAE makes of the sample picture."""
        picture, vae = self.tensor(self.sample_picture()), self.vae
        return self._once(
            "posterior", lambda: self.timed("vae_encoder", lambda: vae.encode(picture).latent_dist).parameters
        )

    def posterior_mean(self) -> torch.Tensor:
        """(1, C, h, w), unscaled."""
        return self.tensor(self.posterior()).chunk(2, dim=1)[0]

    def clean_latents(self) -> torch.Tensor:
        """(1, C, h, w): the posterior's mean, scaled as the UNet sees latents."""
        return self.posterior_mean() * float(self.vae.config.scaling_factor)

    def noisy_latents(self, timestep: int) -> torch.Tensor:
        """(1, C, h, w): the clean latents with the noise of a training timestep."""
        from diffusers import DDPMScheduler

        training = DDPMScheduler.from_config(self.scheduler.config)
        noisy: torch.Tensor = training.add_noise(self.clean_latents(), self.tensor(NOISE), torch.tensor([timestep]))
        return noisy

    def _once(self, name: str, make: Callable[[], Any]) -> str:
        """The tensor `name`, made when first asked for."""
        return name if name in self.tensors else self.put(name, make())

    def add_picture(self) -> None:
        """The whole pipeline, with the latents after each step as the UNet meets them next."""
        trail: list[Array] = []

        def note(pipeline: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            latents, timesteps = values["latents"], pipeline.scheduler.timesteps
            if index + 1 < len(timesteps):
                latents = pipeline.scheduler.scale_model_input(latents, timesteps[index + 1])
            trail.append(latents.numpy().copy())
            return {}

        probe, generator = self.probe, self._generator()
        if hasattr(self.pipeline.scheduler, "noise_sampler"):  # a Brownian tree: both sides draw from the seed instead
            self.pipeline.scheduler.noise_sampler = lambda *_: torch.randn(self.shape, generator=generator)
        images = self.timed(
            "picture",
            lambda: (
                self.pipeline(
                    probe.prompt,
                    negative_prompt=probe.negative_prompt,
                    num_inference_steps=probe.num_inference_steps,
                    guidance_scale=probe.guidance_scale,
                    height=probe.height,
                    width=probe.width,
                    generator=generator,
                    output_type="np",
                    callback_on_step_end=note,
                ).images
            ),
            again=False,
        )
        self.put(LATENTS, np.stack(trail))
        self.put(PICTURE, images)
