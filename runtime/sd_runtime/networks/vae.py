"""The autoencoder's two halves: pictures (B, 3, H, W) in [-1, 1] ↔ latents (B, C, h, w) of about unit variance.

Kingma & Welling 2013 (arXiv 1312.6114): the encoder answers with a Gaussian over latents, of which image-to-image takes
a sample.  Pictures go through one at a time: the largest of all activations are here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..engines.protocol import Engine
from ..errors import EXPORT_IN_FP32, NumericalError
from ..tensor import Array, all_finite


@dataclass(frozen=True)
class Posterior:
    """What the encoder says of B pictures: a Gaussian over their latents, already scaled.

    mean, deviation: (B, C, h, w) float32."""

    mean: Array
    deviation: Array

    def take(self, pictures: Sequence[int]) -> Posterior:
        """The posterior of some pictures, in this order; a picture may come several times."""
        return Posterior(self.mean[list(pictures)], self.deviation[list(pictures)])

    def sample(self, noise: Array) -> Array:
        """(B, C, h, w) float32 latents, from unit noise of that shape."""
        latents: Array = self.mean + self.deviation * noise
        return latents


def encode(vae_encoder: Engine, samples: Array, scaling_factor: float) -> Posterior:
    """(B, 3, H, W) float32 samples in [-1, 1] → the posterior of their latents.

    NumericalError: the encoder overflowed."""
    check_finite(samples, "samples of picture")
    rows = [vae_encoder.run({"sample": one[None]})["latent_parameters"] for one in samples]  # each (1, 2C, h, w)
    output = np.concatenate(rows)
    check_finite(output, "VAE encoder output of picture", EXPORT_IN_FP32)
    mean, log_variance = np.split(output, 2, axis=1)
    deviation = np.exp(np.float32(0.5) * np.clip(log_variance, -30, 20))  # diffusers' limits
    scale = np.float32(scaling_factor)
    return Posterior(mean * scale, deviation * scale)


@dataclass(frozen=True)
class Decoded:
    """What the decoder made of B latents.

    samples: (B, 3, H, W) float32, nominally in [-1, 1]; pixels: (B, H, W, 3) uint8, None where nobody has made them.
    NumericalError, rather than a black picture: the decoder, which is called `network`, overflowed."""

    samples: Array
    pixels: Array | None = None
    network: str = "VAE decoder"

    def __post_init__(self) -> None:
        check_finite(self.samples, f"{self.network} output of picture", EXPORT_IN_FP32)

    def blacked_out(self, pictures: Sequence[bool]) -> Decoded:
        """The same pictures, black where `pictures` is true."""
        samples, black = self.samples.copy(), np.array(pictures)
        samples[black] = -1
        if self.pixels is None:
            return Decoded(samples)
        pixels = self.pixels.copy()
        pixels[black] = 0
        return Decoded(samples, pixels)


def decode(decoder: Engine, latents: Array, scaling_factor: float, network: str = "VAE decoder") -> Decoded:
    """(B, C, h, w) float32 latents → their pictures.  NumericalError: the decoder, called `network`, overflowed."""
    scale = np.float32(scaling_factor)
    samples = np.concatenate([decoder.run({"latent_sample": one[None] / scale})["sample"] for one in latents])
    return Decoded(samples, network=network)


def check_finite(pictures: Array, what: str, remedy: str | None = None) -> None:
    """NumericalError that names the first of (B, …) that holds NaN or infinity."""
    for index, one in enumerate(pictures):
        if not all_finite(one):
            raise NumericalError(f"{what} {index + 1}", got="NaN or infinity", remedy=remedy)
