"""Stable Diffusion distilled to a few steps without another input: with a latent consistency LoRA merged in (Luo et al.
2023, LCM-LoRA), or by trajectory consistency (Zheng et al. 2024).  Their samplers draw with no other model, so the
scheduler tells them.  Steps and guidance scale are those of LCM-LoRA's model card; guidance 1 is none."""

from __future__ import annotations

from .base import Family

FAMILY = Family(
    "Stable Diffusion distilled to a few steps",
    lambda name, configs: configs["scheduler"].get("_class_name") in ("LCMScheduler", "TCDScheduler"),
    steps=4,
    guidance_scale=1.0,
)
