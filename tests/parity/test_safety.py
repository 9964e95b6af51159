"""The safety checker without a network: pictures prepared as transformers does, verdicts as diffusers reaches them."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker, cosine_distance
from PIL import Image
from sd_runtime.errors import BundleError, NumericalError
from sd_runtime.networks.safety_checker import ImageProcessor, SafetyChecker, adjusted
from sd_runtime.tensor import Array

try:
    from transformers import CLIPImageProcessorPil as Reference
except ImportError:  # before transformers 5, where it works with Pillow under its plain name
    from transformers import CLIPImageProcessor as Reference

# Stable Diffusion 1.5's, as it was written in 2022.
PUBLISHED = {
    "crop_size": 224,
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": 224,
}


def processor(**changes: Any) -> ImageProcessor:
    return ImageProcessor.from_bytes(json.dumps(PUBLISHED | changes).encode())


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise on waves: every frequency is there."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 7), np.cos(y / 11), np.sin((x + y) / 23)], axis=-1) * 90 + 128
    return Image.fromarray(np.clip(waves + random.normal(0, 30, waves.shape), 0, 255).astype(np.uint8))


# ---- pixels ----------------------------------------------------------------------------------------------------------


SIZES = [(512, 512), (224, 224), (64, 64), (512, 768), (768, 512), (225, 224), (1024, 64), (301, 997), (8, 1024)]


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_pixels_are_transformers(width: int, height: int) -> None:
    """Bit for bit, from a file of 2022 and from one of today."""
    image = picture(width, height)
    reference = Reference()
    expected = reference(image, return_tensors="np").pixel_values[0]
    assert expected.dtype == np.float32 and expected.shape == (3, 224, 224)
    assert np.array_equal(processor()(image), expected)
    today = ImageProcessor.from_bytes(reference.to_json_string().encode())
    assert np.array_equal(today(image), expected)


def test_other_sizes_are_transformers() -> None:
    settings = {"size": {"shortest_edge": 37}, "crop_size": {"height": 21, "width": 30}}
    image = picture(100, 71)
    assert np.array_equal(
        processor(**settings)(image), Reference(**settings)(image, return_tensors="np").pixel_values[0]
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"do_center_crop": False}, "do_center_crop: got False, accepted true"),
        ({"resample": 2}, "accepted resample 3"),
        ({"rescale_factor": 1.0}, "rescale_factor 1/255"),
        ({"size": {"height": 224, "width": 224}}, "size: got"),
        ({"size": "large"}, "size: got large"),
        ({"crop_size": 300}, "crop_size: got .*300.*, accepted at most size, 224"),
        ({"image_std": [0.2, 0.2]}, "image_std: got .*, accepted three positive numbers"),
        ({"image_mean": None}, "image_mean: accepted three positive numbers"),
    ],
)
def test_what_is_done_otherwise_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        processor(**changes)


def test_not_an_object() -> None:
    with pytest.raises(BundleError, match="accepted a JSON object"):
        ImageProcessor.from_bytes(b"[]")


# ---- verdicts --------------------------------------------------------------------------------------------------------


def diffusers_verdicts(embeddings: torch.Tensor, concepts: dict[str, torch.Tensor]) -> list[bool]:
    """StableDiffusionSafetyChecker's forward, on embeddings in the place of its networks."""
    checker = SimpleNamespace(vision_model=lambda pixels: (None, pixels), visual_projection=lambda x: x, **concepts)
    images = np.ones((len(embeddings), 1))
    _, verdicts = StableDiffusionSafetyChecker.forward(checker, embeddings, images)
    return list(verdicts)


@pytest.mark.parametrize("threshold", [0.3, 0.4, 0.5])
def test_verdicts_are_diffusers(threshold: float) -> None:
    """Also of pictures within a thousandth of a threshold, and of those that call for care."""
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(3000, 12, generator=generator)
    concepts = {
        "special_care_embeds": torch.randn(3, 12, generator=generator),
        "special_care_embeds_weights": torch.rand(3, generator=generator) * 0.1 + threshold,
        "concept_embeds": torch.randn(17, 12, generator=generator),
        "concept_embeds_weights": torch.rand(17, generator=generator) * 0.2 + threshold,
    }
    special, concept = (
        (cosine_distance(embeddings, concepts[name]) - concepts[f"{name}_weights"]).numpy()
        for name in ("special_care_embeds", "concept_embeds")
    )
    ours = [bool((adjusted(*rows) > 0).any()) for rows in zip(special, concept, strict=True)]
    assert ours == diffusers_verdicts(embeddings, concepts)
    assert sum(ours) > 100
    strict = [bool((np.round(row, 3) > 0).any()) for row in concept]
    assert strict != ours  # care changes some


class FakeEngine:
    """Scores pictures by their brightness."""

    inputs = outputs = ()

    def place(self, name: str, array: Array) -> Array:
        return array

    def run(self, feeds: Any) -> dict[str, Array]:
        level = feeds["clip_input"].mean(axis=(1, 2, 3), keepdims=False)[:, None]
        return {"special_scores": np.full((1, 3), -1, np.float32), "concept_scores": level.repeat(17, axis=1)}

    def close(self) -> None: ...


def test_each_picture_has_its_own_verdict() -> None:
    checker = SafetyChecker(FakeEngine(), processor())
    samples = np.full((3, 3, 16, 24), -0.8, np.float32)
    samples[1] = 0.8
    assert checker(samples) == (False, True, False)


def test_no_picture_passes_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = {"special_scores": np.zeros((1, 3), np.float32), "concept_scores": np.full((1, 17), np.nan, np.float32)}
    monkeypatch.setattr(FakeEngine, "run", lambda self, feeds: broken)
    with pytest.raises(NumericalError, match="safety checker's scores of picture 1"):
        SafetyChecker(FakeEngine(), processor())(np.zeros((1, 3, 8, 8), np.float32))
