"""What a family's file says of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Configs = Mapping[str, Mapping[str, Any]]

# The inpainting class also serves ordinary 4-channel UNets; `check.check_networks` tells them apart.
CLASSIC_PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
)


@dataclass(frozen=True)
class Family:
    """Checkpoints that are recognised, drawn and recommended alike.

    phrase          for people
    recognises      of a checkpoint's name and the configs of its networks
    steps           usual number of inference steps; diffusers' default
    guidance_scale  usual guidance scale; diffusers' default
    pipelines       diffusers' classes that model_index.json may name.  The first, in diffusers and by the same name in
                    optimum, draws pictures from text with the bundle
    """

    phrase: str
    recognises: Callable[[str, Configs], bool]
    steps: int = 50
    guidance_scale: float = 7.5
    pipelines: tuple[str, ...] = CLASSIC_PIPELINES


def text_width(configs: Configs) -> int:
    """Of a token's hidden state, which tells Stable Diffusion's versions apart."""
    width: int = configs["text_encoder"].get("hidden_size", 512)  # transformers' default
    return width
