"""The whole pipeline on the demo bundle against diffusers' StableDiffusionPipeline with the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from demo_reference import NEGATIVE, PROMPT, SETTINGS, generators, psnr, switched
from diffusers import StableDiffusionPipeline
from reference_schedulers import BrownianTape, scheduler_module
from sd_runtime import NumericalError, Pipeline, UsageError, make_request
from sd_runtime.pipeline import Generation
from sd_runtime.sampling.registry import PRESETS

SAMPLERS = ("pndm", "ddim", "euler", "euler_a", "lms", "dpmpp_2m", "dpmpp_2m_karras")


@pytest.mark.parametrize("scheduler", SAMPLERS)
def test_same_picture(pipe: Pipeline, reference: StableDiffusionPipeline, scheduler: str) -> None:
    """≥ 60 dB, for two pictures of one call, with and without the negative prompt's help."""
    theirs = switched(reference, scheduler)(
        [PROMPT] * 2, negative_prompt=[NEGATIVE] * 2, num_inference_steps=12, generator=generators(7, 8),
        output_type="np", **SETTINGS,
    ).images  # fmt: skip
    ours = pipe(
        PROMPT, negative_prompt=NEGATIVE, num_inference_steps=12, seed=7, num_images_per_prompt=2, scheduler=scheduler
    )
    assert ours.seeds == (7, 8)
    assert psnr(ours.arrays, theirs) >= 60
    assert theirs.std() > 0.05  # a picture, not a solid colour that anything would equal


# diffusers' UniPC bh1 divides by an infinite h where the last sigma is 0: all NaN (ours is finite, and compared with it
# ending at sigma_min in test_schedulers_parity).
COMPARED = [preset.aliases[0] for sampler, preset in PRESETS if sampler.diffusers_class is not None]
EVERY_SAMPLER = [name for name in COMPARED if name != "unipc_bh1"]
WARPED = ("euler_karras", "dpmpp_2m_exponential", "unipc_karras", "dpmpp_2m_sde_karras")


@pytest.mark.parametrize("scheduler", [*EVERY_SAMPLER, *WARPED])
def test_every_sampler(
    pipe: Pipeline, reference: StableDiffusionPipeline, scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """≥ 55 dB for every name that sd-run lists and diffusers has, the stochastic ones with the same noise."""
    (generator,) = generators(7)
    brownian = BrownianTape(lambda: torch.randn((1, 4, 16, 16), generator=generator).numpy())
    monkeypatch.setattr(scheduler_module("DPMSolverSDE"), "BrownianTreeNoiseSampler", lambda *_: brownian)
    eta = 0.3 if scheduler == "tcd" else None
    arguments = {"num_inference_steps": 8, "guidance_scale": 2.5, "height": 128, "width": 128}
    theirs = switched(reference, scheduler)(
        PROMPT, generator=[generator], output_type="np", eta=eta or 0.0, **arguments
    ).images
    ours = pipe(PROMPT, seed=7, scheduler=scheduler, eta=eta, **arguments)  # type: ignore[arg-type]
    assert psnr(ours.arrays, theirs) >= 55
    assert theirs.std() > 0.05


def test_bundles_own_settings(pipe: Pipeline, reference: StableDiffusionPipeline) -> None:
    theirs = switched(reference, "PNDMScheduler")(
        PROMPT, num_inference_steps=25, generator=generators(3), output_type="np", **SETTINGS
    ).images
    ours = pipe(PROMPT, seed=3)
    assert psnr(ours.arrays, theirs) >= 60
    assert ours.images[0].size == (128, 128)


def test_another_size_without_guidance(pipe: Pipeline, reference: StableDiffusionPipeline) -> None:
    """guidance_scale ≤ 1 runs one row a picture; 72 × 136 is a size that nothing was traced at."""
    arguments = {"num_inference_steps": 6, "guidance_scale": 1.0, "height": 72, "width": 136}
    theirs = switched(reference, "euler")(PROMPT, generator=generators(5), output_type="np", **arguments).images
    ours = pipe(PROMPT, seed=5, scheduler="euler", **arguments)  # type: ignore[arg-type]
    assert ours.samples.shape == (1, 3, 72, 136)
    assert psnr(ours.arrays, theirs) >= 60


def test_a_seed_is_a_picture_whatever_the_batch(pipe: Pipeline) -> None:
    batch = pipe([PROMPT, "a small red ring on a white background"], seed=[11, 12], num_inference_steps=5)
    alone = pipe(PROMPT, seed=11, num_inference_steps=5)
    assert psnr(batch.arrays[:1], alone.arrays) >= 80


def test_given_latents(pipe: Pipeline) -> None:
    noise = torch.randn((1, 4, 16, 16), generator=generators(9)[0]).numpy()
    assert (
        psnr(
            pipe(PROMPT, latents=noise, num_inference_steps=4).arrays,
            pipe(PROMPT, seed=9, num_inference_steps=4).arrays,
        )
        >= 80
    )
    with pytest.raises(UsageError, match=r"latents: got float32\(1, 4, 8, 8\), accepted float32\(1, 4, 16, 16\)"):
        pipe(PROMPT, latents=noise[:, :, :8, :8])


def test_iterate_and_stop(pipe: Pipeline) -> None:
    generation = pipe.start(make_request(pipe.manifest.defaults, PROMPT, seed=1, num_inference_steps=6))
    assert isinstance(generation, Generation) and len(generation) == 7
    for step in generation:
        if step.index == 2:
            generation.stop()
    partial = generation.result()
    assert partial.samples.shape == (1, 3, 128, 128)
    called: list[int] = []
    pipe(PROMPT, seed=1, num_inference_steps=6, callback=lambda step: called.append(step.index) or step.index < 3)  # type: ignore[func-returns-value]
    assert called == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 100}, "width: got 100, accepted multiples of 8 from 64 to 1024; nearest: 96"),
        ({"height": 2048}, "height: got 2048, .*nearest: 1024"),
        ({"scheduler": "euler_b"}, "scheduler: got euler_b, accepted nearest: euler"),
        ({"num_inference_steps": 0}, "num_inference_steps: got 0"),
    ],
)
def test_bad_arguments(pipe: Pipeline, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        pipe(PROMPT, **arguments)


def test_no_black_picture_from_a_decoder_that_overflows(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = pipe.engines.engine("vae_decoder")
    broken = {"sample": np.full((1, 3, 128, 128), np.nan, np.float32)}
    monkeypatch.setattr(type(decoder), "run", lambda self, feeds: broken)
    with pytest.raises(NumericalError, match="VAE decoder output of picture 1"):
        pipe.decode_latents(np.zeros((1, 4, 16, 16), np.float32))


def test_timings_and_repr(pipe: Pipeline) -> None:
    result = pipe(PROMPT, seed=1, num_inference_steps=2)
    assert result.timings.denoise > 0 and result.timings.total < 60
    assert len(repr(result)) < 2000


def test_threads(pipe: Pipeline, demo_bundle: Path) -> None:
    with Pipeline.load(demo_bundle, device="cpu", threads=1) as single:
        ours = single(PROMPT, seed=1, num_inference_steps=2)
    assert psnr(ours.arrays, pipe(PROMPT, seed=1, num_inference_steps=2).arrays) > 80
    with pytest.raises(UsageError, match="threads: got 0, accepted at least 1"):
        Pipeline.load(demo_bundle, threads=0)
