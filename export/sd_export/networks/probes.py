"""Inputs of the kinds that an autoencoder meets, for finding out whether its values outgrow float16.

Tamer inputs, such as noise of deviation 1, would miss the checkpoints that draw black pictures.  Imports numpy only: an
engine is tried on the same inputs, where no torch need be installed.
"""

from __future__ import annotations

import numpy as np
from sd_runtime.tensor import Array

PROBE_CELLS = 24  # latent height and width of the probes: peaks depend on what is in a picture, hardly on its size


def latent_probes(
    channels: int, scaling_factor: float, height: int = PROBE_CELLS, width: int = PROBE_CELLS
) -> list[Array]:
    """Latents (1, channels, height, width) such as a decoder meets: noise of the latents' own deviation, and something
    smooth and strong."""
    random = np.random.default_rng(0)
    noise = random.standard_normal((1, channels, height, width), np.float32)
    coarse = random.standard_normal((1, channels, 3, 3), np.float32)
    smooth = coarse[:, :, np.arange(height) * 3 // height][..., np.arange(width) * 3 // width]
    return [probe / np.float32(scaling_factor) for probe in (noise, 2 * smooth + np.float32(0.1) * noise)]


def picture_probes(pixels: int, height: int = PROBE_CELLS, width: int = PROBE_CELLS) -> list[Array]:
    """Pictures (1, 3, pixels · height, pixels · width) in -1 to 1 such as an encoder meets: noise, a gradient,
    black and white squares."""
    shape = (1, 3, pixels * height, pixels * width)
    noise = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    down, across = (np.linspace(-1, 1, side, dtype=np.float32) for side in shape[2:])
    gradient = np.broadcast_to(across, shape).copy()
    squares = np.sign(np.sin(down * 20)[:, None] * np.sin(across * 20)) + 0 * gradient
    return [noise, gradient, squares.astype(np.float32)]
