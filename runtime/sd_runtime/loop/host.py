"""The denoising loop led by the host: UNet, classifier-free guidance, one row of the sampling plan, and again."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import numpy as np

from ..engines.protocol import Engine, placing
from ..errors import EXPORT_IN_FP32, NumericalError
from ..noise import NoiseSource
from ..sampling import SamplingPlan
from ..tensor import Array, all_finite
from .guidance import Guidance, guide


@dataclass(frozen=True)
class Evaluated:
    """What one evaluation of the UNet, and the sampler after it, left behind.

    latents: (B, C, h, w) float32, read-only: the UNet's next input, after the last step the picture's latents."""

    index: int
    total: int
    timestep: float
    latents: Array

    def __post_init__(self) -> None:
        self.latents.setflags(write=False)  # the loop goes on from them


def overflow(plan: SamplingPlan, index: int, sample: Array, output: Array) -> NumericalError:
    """What was the first to hold NaN or infinity in an evaluation whose guided prediction does."""
    step = f"step {index + 1} of {len(plan)} (timestep {plan.timesteps[index]:g})"
    if not all_finite(sample):
        what, remedy = f"latents before {step}", "lower `guidance_scale`, or take another sampler"
    elif not all_finite(output):
        what, remedy = f"UNet output in {step}", EXPORT_IN_FP32
    else:
        what, remedy = f"prediction after guidance in {step}", "lower `guidance_scale` or `guidance_rescale`"
    return NumericalError(what, got="NaN or infinity", remedy=remedy)


def denoise(
    unet: Engine,
    plan: SamplingPlan,
    latents: Array,
    encoder_hidden_states: Array,
    guidance: Guidance,
    noise: NoiseSource,
) -> Generator[Evaluated]:
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
            with np.errstate(over="ignore", invalid="ignore"):  # what overflows is an error below
                prediction = guide(output, guidance) if guidance.on else output  # (B, C, h, w)
            if not all_finite(prediction):
                raise overflow(plan, index, sample, output)
            fresh = noise.draw(tuple(image_shape)).ravel() if plan.draws[index] else None
            with np.errstate(over="ignore", invalid="ignore"):
                state = plan.advance(index, state, prediction.ravel(), fresh)
            yield Evaluated(index, len(plan.timesteps), float(plan.timesteps[index]), state[0].reshape(latents.shape))
