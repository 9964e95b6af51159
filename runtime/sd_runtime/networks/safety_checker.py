"""The safety checker: CLIP's picture encoder against the concepts that a picture must not show.

The network scores a picture against 3 concepts that call for care and 17 unwanted ones: the cosine between their CLIP
embeddings, above the concept's own threshold.  The verdict on the scores is that of diffusers'
StableDiffusionSafetyChecker, and the picture is prepared as transformers' CLIPImageProcessor does with Pillow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..bundle.schema import parse_json
from ..engines.protocol import Engine
from ..errors import BundleError, NumericalError
from ..images.convert import to_pictures
from ..tensor import Array, all_finite

if TYPE_CHECKING:
    from PIL.Image import Image

PREPROCESSOR = "feature_extractor/preprocessor_config.json"
BICUBIC = 3  # Pillow's number
MEAN, DEVIATION = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # of CLIP's training
STRICTER = np.float32(0.01)  # added to the later scores of a picture that meets a special concept


@dataclass(frozen=True)
class ImageProcessor:
    """CLIPImageProcessor: scaled so that the shorter edge is `edge` pixels, the middle cut out, normalised.

    crop: height and width that are cut out; mean, deviation: of red, green and blue, in [0, 1]."""

    edge: int
    crop: tuple[int, int]
    mean: tuple[float, float, float]
    deviation: tuple[float, float, float]

    @classmethod
    def from_bytes(cls, content: bytes) -> ImageProcessor:
        """A preprocessor_config.json, also as it was written in 2022.  BundleError: it asks for something else."""
        raw = parse_json(content, PREPROCESSOR)
        if not isinstance(raw, dict):
            raise BundleError(PREPROCESSOR, got=type(raw).__name__, accepted="a JSON object")
        for step in ("do_resize", "do_center_crop", "do_rescale", "do_normalize"):
            if raw.get(step, True) is not True:
                raise BundleError(f"{PREPROCESSOR}: {step}", got=raw[step], accepted="true")
        if raw.get("resample", BICUBIC) != BICUBIC or abs(raw.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-9:
            raise BundleError(PREPROCESSOR, got=raw, accepted=f"resample {BICUBIC}, rescale_factor 1/255")
        (edge,) = _sizes(raw, "size", ("shortest_edge",))
        height, width = _sizes(raw, "crop_size", ("height", "width"))
        if max(height, width) > edge:
            raise BundleError(f"{PREPROCESSOR}: crop_size", got=(height, width), accepted=f"at most size, {edge}")
        return cls(edge, (height, width), _colour(raw, "image_mean", MEAN), _colour(raw, "image_std", DEVIATION))

    def __call__(self, picture: Image) -> Array:
        """An RGB picture → (3, height, width) float32."""
        shorter = min(picture.size)
        width, height = (int(self.edge * side / shorter) for side in picture.size)
        pixels = np.asarray(picture.resize((width, height), BICUBIC))  # (H, W, 3) uint8
        top, left = ((size - cut) // 2 for size, cut in zip(pixels.shape, self.crop, strict=False))
        pixels = pixels[top : top + self.crop[0], left : left + self.crop[1]]
        unit = (pixels.astype(np.float64) * (1 / 255)).astype(np.float32)
        normal: Array = (unit - np.array(self.mean, np.float32)) / np.array(self.deviation, np.float32)
        return np.ascontiguousarray(normal.transpose(2, 0, 1))


class SafetyChecker:
    """A bundle's safety checker; called with pictures, it says which of them show unwanted concepts."""

    def __init__(self, engine: Engine, processor: ImageProcessor) -> None:
        self._engine, self._processor = engine, processor

    def __call__(self, samples: Array) -> tuple[bool, ...]:
        """(B, 3, H, W) float32 samples in [-1, 1] → whether each is to be withheld."""
        return tuple(bool((scores > 0).any()) for scores in self.scores(to_pictures(samples)))

    def scores(self, pictures: Sequence[Image]) -> Array:
        """RGB pictures → (B, 17) float32, rounded to thousandths; more than 0 in any of them is too much.

        NumericalError, rather than a picture that passes unseen: the network overflowed."""
        rows = []
        for index, picture in enumerate(pictures):
            output = self._engine.run({"clip_input": self._processor(picture)[None]})
            special, concept = output["special_scores"][0], output["concept_scores"][0]
            if not (all_finite(special) and all_finite(concept)):
                raise NumericalError(f"safety checker's scores of picture {index + 1}", got="NaN or infinity")
            rows.append(adjusted(special, concept))
        return np.stack(rows)


def adjusted(special: Array, concept: Array) -> Array:
    """One picture's raw scores, (3,) and (17,) float32 → (17,): diffusers' rounding, and its stricter view of pictures
    that call for care: from the first special concept that is met, all later scores are 0.01 higher."""
    adjustment = np.float32(0)
    for score in special:
        if np.round(score + adjustment, 3) > 0:
            adjustment = STRICTER
    scores: Array = np.round(concept + adjustment, 3)
    return scores


def _sizes(raw: Mapping[str, Any], field: str, names: tuple[str, ...]) -> list[int]:
    """The numbers of pixels called `names` in a field, which may be one number for all."""
    value = raw.get(field, 224)
    given = [value.get(name) for name in names] if isinstance(value, Mapping) else [value] * len(names)
    sizes = [size for size in given if isinstance(size, int) and 0 < size < 1 << 12]
    if len(sizes) != len(names):
        raise BundleError(f"{PREPROCESSOR}: {field}", got=value, accepted=f"pixels, or {{{', '.join(names)}}}")
    return sizes


def _colour(raw: Mapping[str, Any], name: str, default: list[float]) -> tuple[float, float, float]:
    value = raw.get(name, default)
    if not (isinstance(value, list) and len(value) == 3 and all(isinstance(x, (int, float)) and x > 0 for x in value)):
        raise BundleError(f"{PREPROCESSOR}: {name}", got=value, accepted="three positive numbers")
    return float(value[0]), float(value[1]), float(value[2])
