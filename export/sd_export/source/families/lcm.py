"""Latent consistency models (Luo et al. 2023): Stable Diffusion whose UNet takes the guidance scale as an input."""

from __future__ import annotations

from .base import Family

FAMILY = Family(
    "LCM (latent consistency model)",
    lambda name, configs: configs["unet"].get("time_cond_proj_dim") is not None,
    steps=4,
    guidance_scale=8.5,
    pipelines=("LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline"),
)
