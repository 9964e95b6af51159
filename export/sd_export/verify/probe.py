"""What is compared: every choice that the outputs of a reference depend on."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from sd_runtime.request import Defaults, Request, make_request
from sd_runtime.tensor import Array

PROMPT = "a large yellow star on a blue background"
NEGATIVE_PROMPT = "blurry"
# Text on which tokenizers differ: case, accents in two forms, numbers, scripts without blanks, added tokens.
TEXTS = ("It's 3.5 m — NAÏVE cafe\u0301 No. 1024!", "東京タワー 🗼 “Ⅷ”", "<|endoftext|> ... ,,  \u00a0x")
SHORT_STEPS = 6
SHORT_CELLS = 16, 24  # latent height and width: unequal, so that no axis is taken for another


@dataclass(frozen=True)
class Probe:
    """One picture to draw with both sides, and what else to compare on the way.

    timesteps  at which the UNet is compared on its own, from noise to picture
    scheduler  a name of the runtime's; None is the checkpoint's own sampler
    The other fields are those of `sd_runtime.request.Request`."""

    prompt: str
    negative_prompt: str
    seed: int
    num_inference_steps: int
    guidance_scale: float
    height: int
    width: int
    timesteps: tuple[int, ...]
    scheduler: str | None = None

    def request(self, defaults: Defaults) -> Request:
        """The same for the runtime, its prompts read without weights."""
        return make_request(
            defaults,
            self.prompt,
            negative_prompt=self.negative_prompt,
            seed=self.seed,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            height=self.height,
            width=self.width,
            scheduler=self.scheduler,
            prompt_weighting=False,
            truncate=True,
        )


def usual_timesteps(num_train_timesteps: int) -> tuple[int, ...]:
    """Nearly noise, half way, nearly done: 981, 501 and 21 of 1000."""
    return tuple(round(num_train_timesteps * share) + 1 for share in (0.98, 0.5, 0.02))


def full_probe(defaults: Defaults, num_train_timesteps: int) -> Probe:
    """One picture as the model's authors recommend it."""
    return Probe(
        PROMPT,
        NEGATIVE_PROMPT,
        seed=1,
        num_inference_steps=defaults.num_inference_steps,
        guidance_scale=defaults.guidance_scale,
        height=defaults.height,
        width=defaults.width,
        timesteps=usual_timesteps(num_train_timesteps),
    )


def short_probe(defaults: Defaults, num_train_timesteps: int, pixels: int) -> Probe:
    """What an export compares before it publishes, and stores: a few steps on a small picture; `pixels` a cell."""
    height, width = (cells * pixels for cells in SHORT_CELLS)
    steps = min(SHORT_STEPS, defaults.num_inference_steps)
    return replace(full_probe(defaults, num_train_timesteps), num_inference_steps=steps, height=height, width=width)


def sample_picture(height: int, width: int) -> Array:
    """(1, 3, height, width) float32 in [-1, 1]: a disc with a soft edge on colours that run across, and fine stripes.

    Made by exact arithmetic and one square root, so that it is the same everywhere."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    across, down = x / max(width - 1, 1), y / max(height - 1, 1)
    distance = np.sqrt((across - 0.4) ** 2 + (down - 0.5) ** 2)
    disc = np.clip((0.3 - distance) * 20, 0, 1)
    stripes = ((x // 4 + y // 4) % 2) * (across > 0.75)
    red, green, blue = across * (1 - disc) + disc, down * (1 - disc) + 0.8 * disc, 0.6 * (1 - disc) + 0.3 * stripes
    return (np.stack([red, green, blue])[None] * 2 - 1).clip(-1, 1).astype(np.float32)
