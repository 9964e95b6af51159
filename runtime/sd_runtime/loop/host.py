"""The denoising loop led by the host: UNet, classifier-free guidance, one row of the sampling plan, and again.

Evaluations are values: a `Denoising` says what the UNet is to be asked, and goes on from the answer.  `denoise` asks
for one of them alone; a service asks for those of many requests at once, each at its own step of its own sampler.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..engines.protocol import Engine, placing
from ..errors import EXPORT_IN_FP32, NumericalError
from ..networks.unet import takes_timestep_per_row
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


@dataclass(frozen=True)
class Evaluation:
    """What the UNet is asked next: its inputs, R rows of each.

    sample      (R, C, h, w) float32, of the caller until the next evaluation
    timestep    that of all rows
    conditions  inputs that stay the same from one evaluation to the next, by name, each with R rows
    """

    sample: Array
    timestep: float
    conditions: Mapping[str, Array]

    @property
    def rows(self) -> int:
        return len(self.sample)

    @property
    def timesteps(self) -> Array:
        """(R,) float32."""
        return np.full(self.rows, self.timestep, np.float32)


class Denoising:
    """Pictures on their way from noise to latents: hands out evaluations of the UNet and takes its predictions.

    It calls nothing, so that whoever holds several of them decides which are evaluated when, and which together:

        while (evaluation := denoising.evaluation()) is not None:
            evaluated = denoising.advance(...)      # with what the UNet answers
    """

    def __init__(
        self, plan: SamplingPlan, latents: Array, encoder_hidden_states: Array, guidance: Guidance, noise: NoiseSource
    ) -> None:
        """latents: (B, C, h, w) float32, the UNet's first input; encoder_hidden_states: (R, T, D) float32 with
        R = 2·B rows, the negative prompts' first, when guidance is on, else R = B."""
        self._plan, self._guidance, self._noise = plan, guidance, noise
        rows, self._shape = len(encoder_hidden_states), latents.shape  # R, (B, C, h, w)
        self.conditions = {"encoder_hidden_states": encoder_hidden_states} | guidance.inputs(rows)
        self._sample = np.empty((rows, *latents.shape[1:]), np.float32)  # (R, C, h, w)
        self._state = plan.initial_state(latents)  # (S, B·C·h·w); row 0 is the UNet's input
        self.index = 0  # evaluations that were taken

    def __len__(self) -> int:
        """Evaluations in all."""
        return len(self._plan)

    def evaluation(self) -> Evaluation | None:
        """What to ask the UNet now; None after the last."""
        if self.index == len(self._plan):
            return None
        self._sample.reshape(-1, *self._shape)[:] = self._state[0].reshape(self._shape)  # (R / B, B, C, h, w)
        return Evaluation(self._sample, float(self._plan.timesteps[self.index]), self.conditions)

    def advance(self, output: Array) -> Evaluated:
        """Guidance and a row of the plan, from the UNet's answer (R, C, h, w) float32.

        NumericalError names the step that went wrong."""
        plan, index = self._plan, self.index
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is an error below
            prediction = guide(output, self._guidance) if self._guidance.on else output  # (B, C, h, w)
        if not all_finite(prediction):
            raise overflow(plan, index, self._sample, output)
        fresh = self._noise.draw(self._shape[1:]).ravel() if plan.draws[index] else None
        with np.errstate(over="ignore", invalid="ignore"):
            self._state = plan.advance(index, self._state, prediction.ravel(), fresh)
        self.index += 1
        return Evaluated(index, len(plan), float(plan.timesteps[index]), self._state[0].reshape(self._shape))


def denoise(
    unet: Engine,
    plan: SamplingPlan,
    latents: Array,
    encoder_hidden_states: Array,
    guidance: Guidance,
    noise: NoiseSource,
) -> Generator[Evaluated]:
    """Run every evaluation of `plan`, yielding after each.  Stop iterating to stop the work.

    The arguments are those of `Denoising`.  NumericalError names the step that went wrong.
    """
    denoising, each = Denoising(plan, latents, encoder_hidden_states, guidance, noise), takes_timestep_per_row(unet)
    with placing(unet, denoising.conditions) as placed:
        while (evaluation := denoising.evaluation()) is not None:
            timestep = evaluation.timesteps if each else evaluation.timesteps[:1]
            output = unet.run({"sample": evaluation.sample, "timestep": timestep, **placed})["out_sample"]
            yield denoising.advance(output)


def evaluate_together(unet: Engine, evaluations: Sequence[Evaluation]) -> list[Array]:
    """The UNet's answers (R, C, h, w) to evaluations of equal shapes, from one run over all their rows.

    It takes a UNet with a timestep for each row.  EngineError: more rows than it takes, or its own."""
    feeds = {
        "sample": np.concatenate([evaluation.sample for evaluation in evaluations]),  # (ΣR, C, h, w)
        "timestep": np.concatenate([evaluation.timesteps for evaluation in evaluations]),  # (ΣR,)
    }
    for name in evaluations[0].conditions:
        feeds[name] = np.concatenate([evaluation.conditions[name] for evaluation in evaluations])
    output = unet.run(feeds)["out_sample"]  # (ΣR, C, h, w)
    ends = np.cumsum([evaluation.rows for evaluation in evaluations])
    return np.split(output, ends[:-1])
