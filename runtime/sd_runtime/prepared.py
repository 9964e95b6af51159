"""Prepared: a request made ready to run, once: its plan, its prompts and pictures encoded, its pictures in batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .inputs import Inputs
from .loop.guidance import Guidance
from .networks.vae import Posterior
from .prompt import PromptEmbeddings
from .request import Request
from .sampling import SamplingPlan


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


def in_batches(count: int, sizes: Sequence[int]) -> tuple[range, ...]:
    """Pictures 0 … count − 1 in batches of these sizes, the largest that fits first; where none fits, all at once."""
    batches, first = [], 0
    while first < count:
        left = count - first
        size = max((size for size in sizes if size <= left), default=left)
        batches.append(range(first, first + size))
        first += size
    return tuple(batches)
