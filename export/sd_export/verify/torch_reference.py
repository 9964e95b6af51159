"""A reference computed now: diffusers' own pipeline and networks, in float32 on the CPU.

The weights come through `source`, which fills transformers' and diffusers' modules and complains of every key that is
missing or left over; all else (tokenizer, sampler, guidance, the loop) is those libraries' code and none of ours.
"""

from __future__ import annotations

import importlib.metadata
import tempfile
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sd_runtime.sampling import resolve
from sd_runtime.tensor import Array

from ..networks.components import load
from ..source import Checkpoint, load_text_encoder, load_unet, load_vae
from ..source.checkpoint import SAFETY_CHECKER, TAESD
from .probe import TEXTS, Probe, sample_picture
from .reference import LATENTS, NOISE, PICTURE, TOKENS, Case, Reference
from .stopwatch import Stopwatch

LIBRARIES = ("torch", "diffusers", "transformers")
DRAWN = {"text_encoder", "unet", "vae_decoder"}  # what it takes to draw a picture
HIDDEN = "last_hidden_state"


def make_reference(
    checkpoint: Checkpoint, probe: Probe, components: Collection[str], *, threads: int | None = None
) -> Reference:
    """Run the networks named in `components`, and the whole pipeline if they suffice for a picture.

    `threads`: of torch, by default what it is set to; with one, the last digits do not depend on the machine's number
    of cores."""
    with _settings(threads):
        side = _TorchSide(checkpoint, probe)
        if "unet" in components:
            side.unet  # noqa: B018 – before the others: loading it takes half as much again for a moment
        side.add_tokens()
        if "text_encoder" in components:
            side.add_text_encoder()
        if "unet" in components:
            side.add_unet()
        if {"vae_decoder", "vae_encoder"} & set(components):
            side.add_vae(components)
        for name in (TAESD, SAFETY_CHECKER):
            if name in components:
                side.add_extra(name)
        if set(components) >= DRAWN:
            side.add_picture()
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return Reference(probe, side.texts, tuple(side.cases), side.tensors, versions, "computed now", side.timed.seconds)


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


class _TorchSide:
    """Collects cases and tensors; networks are loaded when first needed and shared by all that use them."""

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
        return load_text_encoder(self.checkpoint)

    @cached_property
    def unet(self) -> Any:
        return load_unet(self.checkpoint)

    @cached_property
    def vae(self) -> Any:
        return load_vae(self.checkpoint)

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

    # ---- tensors ----

    def put(self, name: str, tensor: Any) -> str:
        """Remember a tensor and return its name."""
        self.tensors[name] = np.ascontiguousarray(tensor.numpy() if isinstance(tensor, torch.Tensor) else tensor)
        return name

    def tensor(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self.tensors[name])

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the picture's latents."""
        channels = self.checkpoint.configs["unet"].get("in_channels", 4)
        blocks = self.checkpoint.configs["vae"].get("block_out_channels", (64,))
        pixels = 2 ** (len(blocks) - 1)
        return 1, channels, self.probe.height // pixels, self.probe.width // pixels

    def add_tokens(self) -> None:
        positions = self.checkpoint.configs["text_encoder"].get("max_position_embeddings", 77)
        ids = self.tokenizer(list(self.texts), padding="max_length", max_length=positions, truncation=True)["input_ids"]
        self.put(TOKENS, np.array(ids, np.int64))
        self.put(NOISE, torch.randn(self.shape, generator=self._generator()))

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.probe.seed)

    def hidden_states(self) -> str:
        """The negative prompt's and the prompt's hidden states (2, 77, D)."""
        if HIDDEN not in self.tensors:
            ids = self.tensor(TOKENS)[:2]
            self.put("prompt_ids", ids)
            encoder = self.text_encoder
            self.put(HIDDEN, self.timed("text_encoder", lambda: encoder(ids)[0]))
        return HIDDEN

    def clean_latents(self) -> torch.Tensor:
        """(1, C, h, w): what the VAE makes of the sample picture, scaled as the UNet sees latents."""
        if "posterior" not in self.tensors:
            picture = self.tensor(self.put("sample_picture", sample_picture(self.probe.height, self.probe.width)))
            vae = self.vae
            posterior = self.timed("vae_encoder", lambda: vae.encode(picture).latent_dist)
            self.put("posterior", posterior.parameters)
        mean: torch.Tensor = self.tensor("posterior").chunk(2, dim=1)[0]
        return mean * float(self.vae.config.scaling_factor)

    def add_text_encoder(self) -> None:
        hidden = self.hidden_states()
        self.cases.append(Case("text_encoder", "hidden states", {"input_ids": "prompt_ids"}, HIDDEN, hidden))

    def add_unet(self) -> None:
        """The UNet alone, on the sample picture's latents with ever less noise."""
        from diffusers import DDPMScheduler

        training = DDPMScheduler.from_config(self.scheduler.config)
        shared = {"encoder_hidden_states": self.hidden_states()}
        condition: dict[str, torch.Tensor] = {}
        if (width := self.unet.config.time_cond_proj_dim) is not None:
            told = torch.full((2,), self.probe.guidance_scale - 1)
            condition["timestep_cond"] = self.pipeline.get_guidance_scale_embedding(told, embedding_dim=width)
            shared["timestep_cond"] = self.put("timestep_cond", condition["timestep_cond"])
        for timestep in self.probe.timesteps:
            noisy = training.add_noise(self.clean_latents(), self.tensor(NOISE), torch.tensor([timestep]))
            sample = noisy.repeat(2, 1, 1, 1)

            def call(sample: torch.Tensor = sample, timestep: int = timestep) -> torch.Tensor:
                output: torch.Tensor = self.unet(sample, timestep, self.tensor(HIDDEN), **condition)[0]
                return output

            own = {
                "sample": self.put(f"unet.{timestep}.sample", sample),
                "timestep": self.put(f"unet.{timestep}.timestep", np.array([timestep], np.float32)),
            }
            expected = self.put(f"unet.{timestep}.out_sample", self.timed("unet", call))
            self.cases.append(Case("unet", f"timestep {timestep}", own | shared, "out_sample", expected))

    def add_vae(self, components: Collection[str]) -> None:
        """There and back again: the sample picture, encoded and decoded."""
        self.clean_latents()
        if "vae_encoder" in components:
            feeds = {"sample": "sample_picture"}
            self.cases.append(Case("vae_encoder", "sample picture", feeds, "latent_parameters", "posterior"))
        if "vae_decoder" in components:
            latents = self.tensor(self.put("latent_sample", self.tensor("posterior").chunk(2, dim=1)[0]))
            decoded = self.timed("vae_decoder", lambda: self.vae.decode(latents).sample)
            feeds, expected = {"latent_sample": "latent_sample"}, self.put("decoded", decoded)
            self.cases.append(Case("vae_decoder", "sample picture", feeds, "sample", expected))

    def add_extra(self, name: str) -> None:
        """A network that diffusers' pipeline calls only sometimes, as it is traced: see `modules`."""
        network = load(name, self.checkpoint)
        (feed,) = network.signature.inputs
        if name == TAESD:
            source = self.put(f"{name}.{feed.name}", self.clean_latents())
        else:
            side = feed.ranges[-1][0]
            source = self.put(f"{name}.{feed.name}", sample_picture(side, side))
        outputs = self.timed(name, lambda: network.module(self.tensor(source)))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        for spec, output in zip(network.signature.outputs, outputs, strict=True):
            expected = self.put(f"{name}.out.{spec.name}", output)
            self.cases.append(Case(name, spec.name.replace("_", " "), {feed.name: source}, spec.name, expected))

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
        if hasattr(self.pipeline.scheduler, "noise_sampler"):  # a Brownian tree; both sides draw from the seed instead
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
