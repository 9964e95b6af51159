"""The UNet: noisy latents, a timestep and the prompt's hidden states → the prediction that samplers step by.

sample (R, C, h, w), timestep (R,) or (1,), encoder_hidden_states (R, T, D) float32 → out_sample (R, C, h, w)
timestep_cond (R, G) float32, where the network was trained to guide itself (latent consistency models)
"""

from __future__ import annotations

import numpy as np

from ..engines.protocol import Engine
from ..tensor import Array, Dim


def sample_ranges(unet: Engine) -> tuple[tuple[int, int], ...]:
    """Smallest and largest size of `sample`: rows, channels, height and width in latent cells."""
    return next(spec for spec in unet.inputs if spec.name == "sample").ranges


def most_positions(unet: Engine) -> int:
    """The most tokens of a prompt, T, that the network attends to."""
    return next(spec for spec in unet.inputs if spec.name == "encoder_hidden_states").ranges[1][1]


def takes_timestep_per_row(unet: Engine) -> bool:
    """Whether each row has a timestep of its own; bundles of version 0.1.0 take one for all rows."""
    return isinstance(next(spec for spec in unet.inputs if spec.name == "timestep").shape[0], Dim)


def guidance_width(unet: Engine) -> int | None:
    """G, the width of the embedding by which the network is told the guidance scale; None: it is not told."""
    widths = [spec.ranges[1][1] for spec in unet.inputs if spec.name == "timestep_cond"]
    return widths[0] if widths else None


def embed_guidance(scale: float, width: int) -> Array:
    """(width,) float32 sinusoids of 1000 w with w = scale − 1: diffusers' get_guidance_scale_embedding, after Kingma et
    al., Variational Diffusion Models, 2021, and Luo et al., arXiv 2310.04378, section 4.2.

    Rounded to float32 where diffusers rounds: the angles are thousands of radians, which magnifies a last digit."""
    half = width // 2
    decay = np.log(np.float32(10000)) / np.float32(half - 1)
    exponents = -decay * np.arange(half, dtype=np.float32)
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = (np.float32(scale - 1) * np.float32(1000) * frequencies).astype(np.float64)
    return np.concatenate([np.sin(angles), np.cos(angles), np.zeros(width % 2)]).astype(np.float32)
