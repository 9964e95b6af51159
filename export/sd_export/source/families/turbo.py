"""SD-Turbo (Sauer et al. 2023), Stable Diffusion 2.1 distilled to one step.  No file of it tells that: its name does.

Steps and guidance scale are those of its model card."""

from __future__ import annotations

from .base import Family

FAMILY = Family("SD-Turbo", lambda name, configs: name == "sd-turbo", steps=1, guidance_scale=0.0)
