"""What the pipeline hands out: a Step after each UNet evaluation, a Result at the end."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from .image import to_pictures
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
    latents        (len(images), 4, h, w) float32; valid until the next step, copy what you keep
    """

    index: int
    total: int
    images: range
    timestep: float
    latents: Array


@dataclass(frozen=True)
class Timings:
    """Seconds of wall-clock time by stage."""

    encode_prompt: float
    denoise: float
    decode: float

    @property
    def total(self) -> float:
        return self.encode_prompt + self.denoise + self.decode


@dataclass(frozen=True)
class Result:
    """The pictures of a request.

    samples    (B, 3, H, W) float32, nominally in [-1, 1]: what the VAE decoder made
    latents    (B, 4, h, w) float32: what it made them from
    seeds      one a picture
    truncated  per prompt the words that `truncate` dropped, "" where none
    """

    request: Request
    samples: Array = field(repr=False)
    latents: Array = field(repr=False)
    seeds: tuple[int, ...]
    timings: Timings
    truncated: tuple[str, ...] = ()

    @cached_property
    def images(self) -> list[Image]:
        """PIL pictures, RGB, 8 bits a channel, rounded as diffusers rounds."""
        return to_pictures(self.samples)

    @property
    def arrays(self) -> Array:
        """(B, H, W, 3) float32 in [0, 1]: what diffusers returns for output_type="np"."""
        scaled: Array = np.clip(self.samples * np.float32(0.5) + np.float32(0.5), 0, 1)
        return scaled.transpose(0, 2, 3, 1)
