"""diffusers' pipelines with the demo checkpoint's weights, and how pictures are compared with theirs."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import numpy as np
import torch
from diffusers import PNDMScheduler, StableDiffusionPipeline
from reference_schedulers import scheduler_module
from sd_export.source.resolve import DEMO_FOLDER
from sd_runtime.sampling import resolve
from sd_runtime.tensor import Array

PROMPT, NEGATIVE = "a large yellow star on a blue background", "red"
SETTINGS: dict[str, Any] = {"guidance_scale": 2.5, "height": 128, "width": 128}

AnyPipeline = TypeVar("AnyPipeline")


def load_reference() -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(DEMO_FOLDER, dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def switched(reference: AnyPipeline, scheduler: str) -> AnyPipeline:
    """The reference with another sampler, by diffusers' own from_config."""
    choice = resolve(scheduler)
    original = PNDMScheduler.from_pretrained(DEMO_FOLDER / "scheduler")
    class_name = choice.reference_class()
    other = getattr(scheduler_module(class_name.removesuffix("Scheduler")), class_name)
    reference.scheduler = other.from_config(original.config, **choice.overrides)  # type: ignore[attr-defined]
    return reference


def psnr(ours: Array, theirs: Array) -> float:
    """Peak signal to noise ratio in dB of pictures in [0, 1]."""
    error = float(np.mean((ours.astype(np.float64) - theirs) ** 2))
    return math.inf if error == 0 else -10 * math.log10(error)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]
