"""What the pipeline hands out: a Step after each UNet evaluation, a Result at the end."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from .errors import UsageError
from .images.convert import to_pictures
from .images.metadata import Parameters
from .images.preview import preview
from .networks.vae import Decoded
from .request import Request
from .tensor import Array

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Step:
    """One finished UNet evaluation.

    index, total   of all evaluations of the request, from 0
    images         which pictures of the request are in this batch
    timestep       the training timestep that the UNet was given
    sigma          the noise level σ that is left: model_input = (x0 + σ · noise) / √(1 + σ²)
    model_input    (len(images), 4, h, w) float32, read-only: the UNet's next input, after the last step the latents
    latent_scale   latents = latent_scale · model_input
    preview_matrix model_input → colours, see `preview`
    """

    index: int
    total: int
    images: range
    timestep: float
    sigma: float
    model_input: Array = field(repr=False)
    latent_scale: float
    preview_matrix: Array = field(repr=False)

    @cached_property
    def latents(self) -> Array:
        """(len(images), 4, h, w) float32, read-only: the sampler's own latents, as diffusers hands them to callbacks.

        Samplers that work on x = x0 + σ · noise (Euler, Heun, LMS, DPM2 and their kin) keep x, whose range is that of
        σ; the others keep the UNet's input."""
        if self.latent_scale == 1:
            return self.model_input
        latents: Array = self.model_input * np.float32(self.latent_scale)
        latents.setflags(write=False)
        return latents

    @property
    def previews(self) -> list[Image]:
        """What the pictures look like by now, a pixel a latent cell: guessed from the latents, without the decoder, and
        not seen by a safety checker."""
        return preview(self.model_input, self.preview_matrix)


@dataclass(frozen=True)
class Timings:
    """Seconds of wall-clock time by stage."""

    encode_prompt: float
    encode_image: float
    denoise: float
    decode: float
    safety_checker: float = 0.0

    @property
    def total(self) -> float:
        return self.encode_prompt + self.encode_image + self.denoise + self.decode + self.safety_checker


@dataclass(frozen=True)
class Result:
    """Pictures of a request: all, or those of one batch.

    indices     which pictures of the request they are
    latents     (B, 4, h, w) float32
    decoded     what the VAE decoder made of them; None: it was not asked
    seeds       one a picture
    parameters  what each picture should say about itself, for `metadata.save_png`
    truncated   per prompt the words that `truncate` dropped, "" where none

    nsfw_content_detected: whether the safety checker withheld each picture, which then is black (its latents are as
    they were); None: none was asked, or there are only latents.
    """

    request: Request
    indices: range
    latents: Array = field(repr=False)
    decoded: Decoded | None = field(repr=False)
    seeds: tuple[int, ...]
    parameters: tuple[Parameters, ...] = field(repr=False)
    timings: Timings
    truncated: tuple[str, ...] = ()
    nsfw_content_detected: tuple[bool, ...] | None = None

    @property
    def samples(self) -> Array:
        """(B, 3, H, W) float32, nominally in [-1, 1].  UsageError if only the latents were asked for."""
        if self.decoded is None:
            raise UsageError("this result is latents alone", remedy="ask for decode=True, or call decode_latents")
        return self.decoded.samples

    @cached_property
    def images(self) -> list[Image]:
        """PIL pictures, RGB, 8 bits a channel, rounded as diffusers rounds."""
        if self.decoded is None or self.decoded.pixels is None:
            return to_pictures(self.samples)
        from PIL.Image import fromarray

        return [fromarray(pixels) for pixels in self.decoded.pixels]

    @property
    def arrays(self) -> Array:
        """(B, H, W, 3) float32 in [0, 1]: what diffusers returns for output_type="np"."""
        scaled: Array = np.clip(self.samples * np.float32(0.5) + np.float32(0.5), 0, 1)
        return scaled.transpose(0, 2, 3, 1)
