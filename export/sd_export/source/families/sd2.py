"""Stable Diffusion 2.0 and 2.1 (OpenCLIP ViT-H), and their configs as published, for single files, which hold none and
do not tell whether their UNet predicts noise (the models of 512 pixels) or velocity (those of 768)."""

from __future__ import annotations

from typing import Any

from . import sd1
from .base import Family, text_width

FAMILY = Family("Stable Diffusion 2.x", lambda name, configs: text_width(configs) == 1024)

HEAD_SIZE = 64  # of every attention, in the text encoder and in the UNet
TEXT_ENCODER: dict[str, Any] = sd1.TEXT_ENCODER | {"hidden_act": "gelu", "projection_dim": 512}
UNET: dict[str, Any] = sd1.UNET | {"use_linear_projection": True}
SCHEDULER: dict[str, Any] = sd1.SCHEDULER
# The models that predict velocity: their size, their sampler, and scores in float32, which they need in float16.
VELOCITY_UNET: dict[str, Any] = {"sample_size": 96, "upcast_attention": True}
VELOCITY_SCHEDULER: dict[str, Any] = sd1.SCHEDULER | {"_class_name": "DDIMScheduler"}
