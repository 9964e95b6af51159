"""Image to image against diffusers' StableDiffusionImg2ImgPipeline, and the autoencoder's halves against its VAE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from demo_data import render, training_scenes
from demo_reference import PROMPT, generators, psnr, switched
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from PIL import Image
from sd_runtime import BundleError, NumericalError, Pipeline, UsageError, make_request
from sd_runtime.bundle.bundle import Bundle
from sd_runtime.images.convert import from_pictures, to_pictures

OTHER = "a small red ring on a white background"
SETTINGS: dict[str, Any] = {"num_inference_steps": 10, "guidance_scale": 2.5}


@pytest.fixture(scope="module")
def changing(reference: StableDiffusionPipeline) -> StableDiffusionImg2ImgPipeline:
    pipeline = StableDiffusionImg2ImgPipeline(**reference.components, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def drawings() -> list[Image.Image]:
    return [Image.fromarray(render(scene)) for scene in training_scenes(2)]


SAMPLERS = ("pndm", "ddim", "euler", "euler_a", "dpmpp_2m_karras", "heun", "unipc")


@pytest.mark.parametrize("scheduler", SAMPLERS)
def test_same_picture(
    pipe: Pipeline, changing: StableDiffusionImg2ImgPipeline, drawings: list[Image.Image], scheduler: str
) -> None:
    expected = switched(changing, scheduler)(
        PROMPT, drawings[0], 0.65, generator=generators(3), output_type="np", **SETTINGS
    ).images
    ours = pipe(PROMPT, image=drawings[0], strength=0.65, seed=3, scheduler=scheduler, **SETTINGS)
    assert psnr(ours.arrays, expected) >= 60
    assert psnr(ours.arrays[0], np.asarray(drawings[0]) / 255) < 25  # it was changed
    assert ours.timings.encode_image > 0


@pytest.mark.parametrize(("strength", "steps"), [(0.1, 1), (0.8, 8), (1.0, 10)])
def test_strength(
    pipe: Pipeline,
    changing: StableDiffusionImg2ImgPipeline,
    drawings: list[Image.Image],
    strength: float,
    steps: int,
) -> None:
    expected = switched(changing, "ddim")(
        PROMPT, drawings[1], strength, generator=generators(4), output_type="np", **SETTINGS
    ).images
    request = make_request(pipe.manifest.defaults, PROMPT, strength=strength, seed=4, scheduler="ddim", **SETTINGS)
    generation = pipe.start(request, image=drawings[1])
    assert len(generation) == steps
    assert psnr(generation.result().arrays, expected) >= 60


def test_an_image_each_and_several_pictures_of_each(
    pipe: Pipeline, changing: StableDiffusionImg2ImgPipeline, drawings: list[Image.Image]
) -> None:
    expected = switched(changing, "ddim")(
        [PROMPT, OTHER], drawings, 0.8, generator=generators(1, 2), output_type="np", **SETTINGS
    ).images
    ours = pipe([PROMPT, OTHER], image=drawings, seed=1, scheduler="ddim", **SETTINGS)  # 0.8 unless said otherwise
    assert psnr(ours.arrays, expected) >= 60
    twice = pipe(
        [PROMPT, OTHER], image=drawings, seed=[1, 5, 2, 6], num_images_per_prompt=2, scheduler="ddim", **SETTINGS
    )
    assert psnr(twice.arrays[::2], ours.arrays) >= 80
    hashes = [parameters.extra["Init image hash"] for parameters in twice.parameters]
    assert hashes[0] == hashes[1] != hashes[2] == hashes[3]


def test_image_at_another_size(
    pipe: Pipeline, changing: StableDiffusionImg2ImgPipeline, drawings: list[Image.Image]
) -> None:
    """Stretched to the request's size, which for diffusers has to be done beforehand."""
    stretched = to_pictures(from_pictures(drawings[0], width=136, height=72, resize="stretch"))
    expected = switched(changing, "euler")(
        PROMPT, stretched, 0.5, generator=generators(3), output_type="np", **SETTINGS
    ).images
    ours = pipe(
        PROMPT, image=drawings[0], strength=0.5, seed=3, scheduler="euler", width=136, height=72, resize="stretch",
        **SETTINGS,
    )  # fmt: skip
    assert psnr(ours.arrays, expected) >= 60
    assert ours.parameters[0].extra["Resize mode"] == "stretch"


def test_paths_and_arrays_are_images_too(pipe: Pipeline, drawings: list[Image.Image], tmp_path: Path) -> None:
    drawings[0].save(tmp_path / "a.png")
    arguments: dict[str, Any] = {"strength": 0.3, "seed": 1, "num_inference_steps": 4}
    whole = pipe(PROMPT, image=drawings[0], **arguments).samples
    for image in (tmp_path / "a.png", str(tmp_path / "a.png"), np.asarray(drawings[0])):
        assert (pipe(PROMPT, image=image, **arguments).samples == whole).all()


def test_the_autoencoder_equals_diffusers(
    pipe: Pipeline, reference: StableDiffusionPipeline, drawings: list[Image.Image]
) -> None:
    samples = from_pictures(drawings, width=136, height=72, resize="stretch")
    noise = np.random.default_rng(0).standard_normal((2, 4, 9, 17)).astype(np.float32)
    scale = reference.vae.config.scaling_factor
    with torch.no_grad():
        told = reference.vae.encode(torch.from_numpy(samples)).latent_dist
        back = reference.vae.decode(told.mean).sample.numpy()
    mean = pipe.encode_image(drawings, width=136, height=72, resize="stretch")
    sampled = pipe.encode_image(drawings, width=136, height=72, resize="stretch", noise=noise)
    np.testing.assert_allclose(mean, told.mean.numpy() * scale, atol=2e-4)
    np.testing.assert_allclose(sampled, (told.mean + told.std * torch.from_numpy(noise)).numpy() * scale, atol=2e-4)
    np.testing.assert_allclose(pipe.decode_latents(mean), back, atol=5e-4)


def test_round_trip(pipe: Pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    """What encoding and decoding cost a picture of the kind that the model knows; -s shows the figure."""
    pictures = [Image.fromarray(render(scene)) for scene in training_scenes(16)]
    back = to_pictures(pipe.decode_latents(pipe.encode_image(pictures)))
    loss = [psnr(np.asarray(a) / 255, np.asarray(b) / 255) for a, b in zip(pictures, back, strict=True)]
    with capsys.disabled():
        print(f"\nround trip of 16 drawings: {np.mean(loss):.1f} dB on average, {min(loss):.1f} dB at worst")
    assert np.mean(loss) >= 28


def test_encode_image_refuses_what_the_encoder_cannot_take(pipe: Pipeline, drawings: list[Image.Image]) -> None:
    with pytest.raises(UsageError, match=r"width: got 100, accepted multiples of 8 .*nearest: 96"):
        pipe.encode_image(drawings, width=100)
    with pytest.raises(UsageError, match=r"noise: got float32\(1, 4, 16, 16\), accepted float32\(2, 4, 16, 16\)"):
        pipe.encode_image(drawings, noise=np.zeros((1, 4, 16, 16), np.float32))


def test_without_the_encoder(demo_bundle: Path, drawings: list[Image.Image]) -> None:
    bundle = Bundle.open(demo_bundle)
    del bundle.manifest.components["vae_encoder"]
    with Pipeline.load(bundle, device="cpu") as pipeline, pytest.raises(BundleError, match="has no vae_encoder"):
        pipeline(PROMPT, image=drawings[0])


def test_an_encoder_that_overflows(
    pipe: Pipeline, drawings: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = pipe.engines.engine("vae_encoder")
    broken = {"latent_parameters": np.full((1, 8, 16, 16), np.inf, np.float32)}
    monkeypatch.setattr(type(encoder), "run", lambda self, feeds: broken)
    with pytest.raises(NumericalError, match="VAE encoder output of picture 1"):
        pipe.encode_image(drawings[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strength": 0.5}, "`strength` without an image to change: got 0.5; give the image, or leave `strength` out"),
        ({"image": "nowhere.png"}, "picture: got nowhere.png"),
        ({"image": np.zeros((8, 8, 3), np.uint8), "strength": 0.0}, "strength: got 0.0, accepted more than 0"),
        ({"image": np.zeros((8, 8, 3), np.uint8), "strength": 0.01}, "strength: got 0.01, accepted at least 0.04"),
        ({"image": np.zeros((8, 8, 3), np.uint8), "strength": 2.0}, "strength: got 2.0, accepted numbers from 0 to 1"),
        ({"image": np.zeros((3, 8, 8, 3), np.uint8)}, "number of images: got 3, accepted 1 or 1"),
        ({"image": np.zeros((8, 8, 3), np.uint8), "resize": "zoom"}, "resize: got zoom, accepted crop, fit, stretch"),
        ({"image": np.zeros((8, 8, 3), np.uint8), "latents": np.zeros((1, 4, 16, 16), np.float32)}, "one of them"),
        ({"latents": np.full((1, 4, 16, 16), np.nan, np.float32)}, "latents: got NaN or infinity"),
        ({"latents": [1.0]}, "latents: got list"),
    ],
)
def test_bad_arguments(pipe: Pipeline, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        pipe(PROMPT, **arguments)
