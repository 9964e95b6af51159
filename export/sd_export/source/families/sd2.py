"""Stable Diffusion 2.0 and 2.1 (OpenCLIP ViT-H), in diffusers layout only: a single file does not tell whether its UNet
predicts noise or velocity."""

from __future__ import annotations

from .base import Family, text_width

FAMILY = Family("Stable Diffusion 2.x", lambda name, configs: text_width(configs) == 1024)
