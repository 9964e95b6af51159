"""Prepared: a request made ready to run, once: its plan, its prompts and pictures encoded, its pictures in batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .inputs import Inputs
from .loop.guidance import Guidance
from .networks.vae import Posterior
from .noise import NoiseSource
from .prompt import PromptEmbeddings
from .request import Request
from .sampling import SamplingPlan
from .tensor import Array


@dataclass(frozen=True)
class Start:
    """What B pictures start from: the UNet's first input (B, C, h, w), encoder_hidden_states (B or 2 B, T, D), negative
    prompts first, and the seeds' noise from here on."""

    latents: Array
    encoder_hidden_states: Array
    noise: NoiseSource


@dataclass(frozen=True)
class Prepared:
    """All that `Generation` needs to know of a request; nothing in it changes while the request runs.

    latent                (C, h, w) of one picture
    embeddings            of the P prompts and, with guidance, of their negative prompts
    posterior             what the VAE encoder says of the 1 or P pictures to change; None: there are none
    batches               which pictures of the request the UNet takes at once, in turn
    encode_*_seconds      what encoding the prompts and the pictures took
    """

    request: Request
    inputs: Inputs
    latent: tuple[int, int, int]
    plan: SamplingPlan
    guidance: Guidance
    embeddings: PromptEmbeddings
    posterior: Posterior | None
    batches: tuple[range, ...]
    encode_prompt_seconds: float
    encode_image_seconds: float

    def start(self, images: range) -> Start:
        """What the pictures `images` of the request start from; the noise is drawn here."""
        request, plan, shape = self.request, self.plan, self.latent
        noise = NoiseSource([request.seeds[i] for i in images], request.rng)
        prompts = [i // request.num_images_per_prompt for i in images]
        if self.posterior is not None:  # a seed's first noise samples the picture's latents, its second is laid on them
            rows = [self.inputs.row_of(request, i) for i in images]
            clean = self.posterior.take(rows).sample(noise.draw(shape))
            latents = np.float32(plan.start_signal) * clean + np.float32(plan.start_noise) * noise.draw(shape)
        else:
            given = self.inputs.latents
            unit = noise.draw(shape) if given is None else given[images.start : images.stop]
            latents = unit * np.float32(plan.init_noise_scale)
        return Start(latents, self.embeddings.rows(prompts), noise)


def in_batches(count: int, sizes: Sequence[int]) -> tuple[range, ...]:
    """Pictures 0 … count − 1 in batches of these sizes, the largest that fits first; where none fits, all at once."""
    batches, first = [], 0
    while first < count:
        left = count - first
        size = max((size for size in sizes if size <= left), default=left)
        batches.append(range(first, first + size))
        first += size
    return tuple(batches)
