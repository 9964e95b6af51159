"""The guided denoising loop on the host: UNet, classifier-free guidance, one row of the sampling plan, and again.

Classifier-free guidance: Ho & Salimans 2022, arXiv 2207.12598, equation 6, in the form diffusers uses:
ε̂ = ε_uncond + guidance_scale · (ε_text − ε_uncond), with guidance_scale = 1 + w.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import numpy as np

from .engines.protocol import Engine
from .errors import NumericalError
from .noise import NoiseSource
from .sampling import SamplingPlan
from .tensor import Array, all_finite


@dataclass(frozen=True)
class Guidance:
    """How the two predictions are combined; `scale` ≤ 1 means that only the prompt is run (one UNet row a picture)."""

    scale: float
    rescale: float = 0.0

    @property
    def on(self) -> bool:
        return self.scale > 1.0


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
    hidden = unet.place("encoder_hidden_states", encoder_hidden_states)  # (R, T, D)
    sample = np.empty((rows, *image_shape), np.float32)  # (R, C, h, w)
    halves = sample.reshape(-1, *latents.shape)  # (R / B, B, C, h, w)
    timestep = np.empty(1, np.float32)
    state = plan.initial_state(latents)  # (S, B·C·h·w); row 0 is the UNet's input
    for index in range(len(plan.timesteps)):
        halves[:] = state[0].reshape(latents.shape)
        timestep[0] = plan.timesteps[index]
        output = unet.run({"sample": sample, "timestep": timestep, "encoder_hidden_states": hidden})["out_sample"]
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
