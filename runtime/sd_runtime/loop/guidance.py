"""Classifier-free guidance: Ho & Salimans 2022, arXiv 2207.12598, equation 6, in the form diffusers uses:
ε̂ = ε_uncond + guidance_scale · (ε_text − ε_uncond), with guidance_scale = 1 + w.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..networks.unet import embed_guidance
from ..tensor import Array


@dataclass(frozen=True)
class Guidance:
    """How a picture is drawn towards its prompt: by two predictions that are combined, or within the network.

    `scale` ≤ 1 means that only the prompt is run (one UNet row a picture).  So does `width`, which a network has that
    was trained to guide itself (latent consistency models): it is told the scale by an embedding of that width."""

    scale: float
    rescale: float = 0.0
    width: int | None = None

    @property
    def on(self) -> bool:
        """Whether there are two predictions to combine."""
        return self.scale > 1.0 and self.width is None

    def inputs(self, rows: int) -> dict[str, Array]:
        """What the network is told: nothing, or `timestep_cond` (rows, width) float32."""
        if self.width is None:
            return {}
        return {"timestep_cond": np.tile(embed_guidance(self.scale, self.width), (rows, 1))}


def guide(output: Array, guidance: Guidance) -> Array:
    """(2·B, …) predictions, negative first → (B, …) guided ones."""
    uncond, text = output[: len(output) // 2], output[len(output) // 2 :]
    guided = text - uncond
    guided *= np.float32(guidance.scale)
    guided += uncond
    return rescale_guidance(guided, text, guidance.rescale) if guidance.rescale else guided


def rescale_guidance(guided: Array, text: Array, share: float) -> Array:
    """Pull the guided prediction's standard deviation back to the prompt's: arXiv 2305.08891, equations 15 and 16."""
    axes = tuple(range(1, guided.ndim))
    deviation = text.std(axis=axes, ddof=1, keepdims=True) / guided.std(axis=axes, ddof=1, keepdims=True)
    rescaled: Array = guided * (share * deviation + (1 - share)).astype(guided.dtype)
    return rescaled
