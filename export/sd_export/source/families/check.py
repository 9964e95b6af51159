"""Refuses, in one line that says what it is, every checkpoint that no family draws."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from sd_runtime.errors import ExportError, one_line

from . import FAMILIES, refused
from .base import Configs

PART_CLASSES = {
    "text_encoder": ("CLIPTextModel",),
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
SAFETY_CHECKER = "StableDiffusionSafetyChecker"


def unsupported(model: str, kind: str) -> ExportError:
    accepted = f"text to image with {', '.join(family.phrase for family in reversed(FAMILIES))}"
    return ExportError(f"model '{one_line(model)}' is {kind}, which is not supported", accepted=accepted)


def check_pipeline(model: str, model_index: Mapping[str, Any]) -> None:
    """Refuse a folder whose model_index.json names a pipeline, or a part, that is not of a family."""
    pipeline = str(model_index.get("_class_name"))
    if not any(pipeline in family.pipelines for family in FAMILIES):
        kinds = (kind for start, kind in refused.PIPELINES.items() if pipeline.startswith(start))
        raise unsupported(model, f"{next(kinds, 'another kind of model')} ({one_line(pipeline)})")
    for part, accepted in PART_CLASSES.items():
        if (found := class_of(model_index, part)) not in accepted:
            raise unsupported(model, f"a pipeline with {one_line(found)} as {part} where {accepted[0]} is needed")


def has_safety_checker(model: str, model_index: Mapping[str, Any]) -> bool:
    """Whether a pipeline names a safety checker.  Only one class of these exists; another is refused."""
    found = class_of(model_index, "safety_checker")
    if found not in (None, SAFETY_CHECKER):
        kind = f"a pipeline with {one_line(found)} as safety_checker where {SAFETY_CHECKER} is needed"
        raise unsupported(model, kind)
    return found is not None


def class_of(model_index: Mapping[str, Any], part: str) -> Any:
    """The class in an entry such as ["diffusers", "AutoencoderKL"]; None where there is none."""
    entry = model_index.get(part)
    return entry[1] if isinstance(entry, list) and len(entry) == 2 else None


def check_networks(model: str, configs: Configs) -> None:
    """Refuse networks that the classic pipeline does not drive."""
    unet, vae, text = configs["unet"], configs["vae"], configs["text_encoder"]
    for field, kind in refused.EXTRA_INPUTS.items():
        if unet.get(field) is not None:
            raise unsupported(model, kind)
    channels = unet.get("in_channels", 4)
    if channels != 4:
        known = refused.INPUT_CHANNELS.get(channels, "another kind of model") if isinstance(channels, int) else None
        raise unsupported(model, f"{known or 'malformed'} (a {one_line(channels)}-channel UNet)")
    if unet.get("out_channels", 4) != 4 or vae.get("latent_channels", 4) != 4:
        raise unsupported(model, "a model whose latents do not have 4 channels")
    width, expected = text.get("hidden_size", 512), unet.get("cross_attention_dim", 1280)  # the libraries' defaults
    if width != expected:
        raise ExportError(
            f"model '{one_line(model)}': text_encoder and unet do not fit together",
            got=f"hidden_size {width}, cross_attention_dim {expected}",
        )


def check_keys(model: str, keys: Iterable[str]) -> None:
    """Refuse a single file whose keys give another kind of model away."""
    keys = tuple(keys)
    for mark, kind in refused.KEYS:
        if any(re.search(mark, key) for key in keys):
            raise unsupported(model, kind)
