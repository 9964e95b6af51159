"""SD-Turbo (Sauer et al. 2023), Stable Diffusion 2.1 distilled to one step.

Its networks are Stable Diffusion 2.1's.  What tells it, whatever its folder is called, is its scheduler: Euler steps
from the end of the schedule over a UNet that predicts noise.  Stable Diffusion 2.x as published steps by DDIM, PNDM or
Euler from the front.  Steps and guidance scale are those of its model card."""

from __future__ import annotations

from .base import Configs, Family, text_width


def _recognises(name: str, configs: Configs) -> bool:
    scheduler = configs["scheduler"]
    from_the_end = scheduler.get("timestep_spacing") == "trailing" and not scheduler.get("rescale_betas_zero_snr")
    euler = scheduler.get("_class_name") in ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
    noise = scheduler.get("prediction_type", "epsilon") == "epsilon"
    return name == "sd-turbo" or (text_width(configs) == 1024 and euler and from_the_end and noise)


FAMILY = Family("SD-Turbo", _recognises, steps=1, guidance_scale=0.0)
