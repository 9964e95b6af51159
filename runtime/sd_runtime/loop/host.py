"""The guided denoising loop on the host: UNet, classifier-free guidance, one row of the sampling plan, and again.

Classifier-free guidance: Ho & Salimans 2022, arXiv 2207.12598, equation 6, in the form diffusers uses:
ε̂ = ε_uncond + guidance_scale · (ε_text − ε_uncond), with guidance_scale = 1 + w.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import numpy as np

from ..engines.protocol import Engine, placing
from ..errors import NumericalError
from ..noise import NoiseSource
from ..sampling import SamplingPlan
from ..tensor import Array, all_finite


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


@dataclass(frozen=True)
class Step:
    """What one UNet evaluation left behind.

    latents: (B, C, h, w) float32, the UNet's next input (after the last step: the picture's latents); a view into the
    loop's own memory, valid until the next step is asked for: copy what you keep."""

    index: int
    total: int
    timestep: float
    latents: Array


def denoise(
    unet: Engine,
    plan: SamplingPlan,
    latents: Array,
    encoder_hidden_states: Array,
    guidance: Guidance,
    noise: NoiseSource,
) -> Generator[Step]:
    """Run every evaluation of `plan`, yielding after each.  Stop iterating to stop the work.

    latents: (B, C, h, w) float32, the UNet's first input; encoder_hidden_states: (R, T, D) float32 with R = 2·B rows,
    the negative prompts' first, when guidance is on, else R = B.  NumericalError names the step that went wrong.
    """
    _, *image_shape = latents.shape
    rows = encoder_hidden_states.shape[0]
    inputs = {"encoder_hidden_states": encoder_hidden_states} | guidance.inputs(rows)  # (R, T, D), (R, G)
    sample = np.empty((rows, *image_shape), np.float32)  # (R, C, h, w)
    halves = sample.reshape(-1, *latents.shape)  # (R / B, B, C, h, w)
    timestep = np.empty(1, np.float32)
    state = plan.initial_state(latents)  # (S, B·C·h·w); row 0 is the UNet's input
    with placing(unet, inputs) as placed:
        for index in range(len(plan.timesteps)):
            halves[:] = state[0].reshape(latents.shape)
            timestep[0] = plan.timesteps[index]
            output = unet.run({"sample": sample, "timestep": timestep, **placed})["out_sample"]
            prediction = guide(output, guidance) if guidance.on else output  # (B, C, h, w)
            if not all_finite(prediction):
                raise NumericalError(
                    f"UNet output in step {index + 1} of {len(plan.timesteps)} (timestep {plan.timesteps[index]:g})",
                    got="NaN or infinity",
                    remedy="lower guidance_scale, or export the bundle with --precision fp32",
                )
            fresh = noise.draw(tuple(image_shape)).ravel() if plan.draws[index] else None
            state = plan.advance(index, state, prediction.ravel(), fresh)
            yield Step(index, len(plan.timesteps), float(plan.timesteps[index]), state[0].reshape(latents.shape))


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
