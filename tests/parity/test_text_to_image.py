"""Text to image with every setting that diffusers has too, against diffusers; and what comes with a result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from demo_reference import NEGATIVE, PROMPT, SETTINGS, generators, psnr, switched
from diffusers import StableDiffusionPipeline
from sd_runtime import Pipeline, UsageError, make_request
from sd_runtime.images.convert import to_pixels
from sd_runtime.images.metadata import read_parameters, save_png
from sd_runtime.result import Step

OTHER = "a small red ring on a white background"


def theirs(reference: StableDiffusionPipeline, scheduler: str, prompt: str | list[str], **arguments: Any) -> np.ndarray:
    settings = SETTINGS | {"num_inference_steps": 8, "output_type": "np"}
    pictures: np.ndarray = switched(reference, scheduler)(prompt, **(settings | arguments)).images
    return pictures


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_eta(pipe: Pipeline, reference: StableDiffusionPipeline, eta: float) -> None:
    expected = theirs(reference, "ddim", PROMPT, eta=eta, generator=generators(4))
    ours = pipe(PROMPT, scheduler="ddim", eta=eta, seed=4, num_inference_steps=8)
    assert psnr(ours.arrays, expected) >= 60


@pytest.mark.parametrize("share", [0.3, 0.7, 1.0])
def test_guidance_rescale(pipe: Pipeline, reference: StableDiffusionPipeline, share: float) -> None:
    arguments = {"guidance_scale": 9.0, "guidance_rescale": share}
    expected = theirs(reference, "euler", PROMPT, generator=generators(4), **arguments)
    ours = pipe(PROMPT, scheduler="euler", seed=4, num_inference_steps=8, **arguments)  # type: ignore[arg-type]
    assert psnr(ours.arrays, expected) >= 60
    assert psnr(ours.arrays, pipe(PROMPT, scheduler="euler", seed=4, num_inference_steps=8).arrays) < 40


def test_prompts_negative_prompts_and_seeds_one_each(pipe: Pipeline, reference: StableDiffusionPipeline) -> None:
    """Two pictures a prompt: seeds and prompts go together as diffusers orders them."""
    seeds, negatives = (3, 2**64 - 1, 0, 17), [NEGATIVE, "blue"]
    expected = theirs(
        reference, "euler_a", [PROMPT, OTHER], negative_prompt=negatives, num_images_per_prompt=2,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
    )  # fmt: skip
    ours = pipe(
        [PROMPT, OTHER], negative_prompt=negatives, num_images_per_prompt=2, seed=seeds, scheduler="euler_a",
        num_inference_steps=8,
    )  # fmt: skip
    assert ours.seeds == seeds
    assert psnr(ours.arrays, expected) >= 60


@pytest.mark.parametrize("scheduler", ["dpmpp_2m", "euler_a"])
def test_initial_latents(pipe: Pipeline, reference: StableDiffusionPipeline, scheduler: str) -> None:
    """Noise of another origin; what a stochastic sampler draws later still comes from the seed."""
    noise = np.random.default_rng(0).standard_normal((1, 4, 16, 16)).astype(np.float32)
    expected = theirs(reference, scheduler, PROMPT, latents=torch.from_numpy(noise), generator=generators(9))
    ours = pipe(PROMPT, latents=noise, seed=9, scheduler=scheduler, num_inference_steps=8)
    assert psnr(ours.arrays, expected) >= 60
    assert "Latents hash" in ours.parameters[0].extra


def test_latents_alone_and_their_picture(pipe: Pipeline, reference: StableDiffusionPipeline) -> None:
    ours = pipe(PROMPT, seed=2, num_inference_steps=8, scheduler="ddim", decode=False)
    expected = theirs(reference, "ddim", PROMPT, generator=generators(2), output_type="latent").numpy()
    assert np.abs(ours.latents - expected).max() <= 1e-4 * np.abs(expected).max()
    with pytest.raises(UsageError, match="latents alone; ask for decode=True"):
        _ = ours.images
    whole = pipe(PROMPT, seed=2, num_inference_steps=8, scheduler="ddim")
    assert (pipe.decode_latents(ours.latents) == whole.samples).all()
    assert (np.asarray(whole.images[0]) == to_pixels(whole.samples)[0]).all()
    assert np.abs(whole.arrays[0] - np.asarray(whole.images[0]) / 255).max() <= 0.5 / 255 + 1e-6


def test_a_picture_does_not_depend_on_its_neighbours(pipe: Pipeline) -> None:
    """To the bit, on the CPU, even beside a prompt of three chunks; else --from-image could not repeat it."""
    together = pipe([PROMPT, "a star, " * 60], seed=[3, 4], num_inference_steps=3)
    alone = pipe(PROMPT, seed=3, num_inference_steps=3)
    assert (together.samples[0] == alone.samples[0]).all()


def test_textual_inversion(pipe: Pipeline, demo_bundle: Path, tmp_path: Path) -> None:
    """A learnt word of two vectors, here those of another word, draws what diffusers draws with it."""
    from demo_reference import load_reference
    from safetensors.torch import save_file

    reference = load_reference()  # of its own: it learns a word
    table = reference.text_encoder.get_input_embeddings().weight.detach()
    learnt = table[[300, 310]] * 1.5
    save_file({"<thing>": learnt.contiguous()}, tmp_path / "thing.safetensors")
    reference.load_textual_inversion(tmp_path / "thing.safetensors")
    prompt = "a large <thing> star on a blue background"
    expected = theirs(reference, "euler", prompt, generator=generators(6))
    with Pipeline.load(demo_bundle, device="cpu") as ours:
        assert ours.load_textual_inversion(tmp_path / "thing.safetensors") == "<thing>"
        result = ours(prompt, seed=6, num_inference_steps=8, scheduler="euler")
        assert psnr(result.arrays, expected) >= 60
        assert result.parameters[0].extra["TI hashes"].startswith("<thing>: ")
        assert "TI hashes" not in ours(PROMPT, seed=6, num_inference_steps=1).parameters[0].extra
        with pytest.raises(UsageError, match="textual inversion: word: got <thing>, accepted a word that is not taken"):
            ours.load_textual_inversion(tmp_path / "thing.safetensors")
    assert psnr(pipe(prompt, seed=6, num_inference_steps=8, scheduler="euler").arrays, expected) < 40


def test_previews_resemble_the_picture(pipe: Pipeline) -> None:
    """The last preview is closer to its own picture, cell by cell, than to another one's."""
    last: list[Step] = []
    result = pipe([PROMPT, OTHER], seed=1, num_inference_steps=8, callback=last.append)
    shown = [np.asarray(step.previews[0], float) for step in last if (step.index + 1) % 9 == 0]
    assert shown[0].shape == (16, 16, 3)
    cells = [np.asarray(picture.reduce(8), float) for picture in result.images]
    for own, other in ((0, 1), (1, 0)):
        assert np.abs(shown[own] - cells[own]).mean() < np.abs(shown[own] - cells[other]).mean() / 2


def test_a_step_tells_where_it_is(pipe: Pipeline) -> None:
    steps: list[tuple[int, float, tuple[int, ...]]] = []
    pipe(PROMPT, seed=1, num_inference_steps=3, scheduler="ddim",
         callback=lambda step: steps.append((step.index, step.timestep, step.latents.shape)))  # fmt: skip
    assert steps == [(0, 667.0, (1, 4, 16, 16)), (1, 334.0, (1, 4, 16, 16)), (2, 1.0, (1, 4, 16, 16))]


@pytest.mark.parametrize(
    "scheduler", ["euler", "euler_a", "euler_karras", "heun", "dpm2", "lms", "ddim", "pndm", "dpmpp_2m", "unipc", "lcm"]
)
def test_fault_51_a_steps_latents_are_those_that_diffusers_hands_out(
    pipe: Pipeline, reference: StableDiffusionPipeline, scheduler: str
) -> None:
    """x for the samplers that work on x, and with σ the way from one to the other; all of them stay as they were."""
    expected: list[np.ndarray] = []

    def keep(pipeline: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        expected.append(tensors["latents"].numpy().copy())
        return tensors

    theirs(reference, scheduler, PROMPT, generator=generators(4), callback_on_step_end=keep)
    steps: list[Step] = []
    result = pipe(PROMPT, scheduler=scheduler, seed=4, num_inference_steps=8, callback=steps.append)
    assert len(steps) == len(expected)
    for step, latents in zip(steps, expected, strict=True):
        np.testing.assert_allclose(step.latents, latents, atol=2e-3 * np.abs(latents).max())
    before, last = steps[-3], steps[-1]
    assert before.sigma > 0
    in_sigma_space = before.model_input * np.sqrt(1 + before.sigma**2)
    wanted = before.latents if scheduler in ("euler", "euler_a", "euler_karras", "heun", "dpm2", "lms") else None
    if wanted is not None:
        np.testing.assert_allclose(wanted, in_sigma_space, rtol=1e-5)
    else:
        assert before.latents is before.model_input
    assert np.array_equal(last.latents, result.latents) and np.array_equal(last.model_input, result.latents)


def test_fault_51_a_steps_latents_are_read_only(pipe: Pipeline) -> None:
    def blank(step: Step) -> None:
        for array in (step.latents, step.model_input):
            with pytest.raises(ValueError, match="read-only"):
                array[:] = 0

    settings: dict[str, Any] = {"seed": 4, "num_inference_steps": 3, "scheduler": "euler"}
    assert np.array_equal(pipe(PROMPT, callback=blank, **settings).latents, pipe(PROMPT, **settings).latents)


@pytest.mark.parametrize("answer", [False, np.bool_(False), 0, "", {}])
def test_fault_51_every_false_answer_of_a_callback_stops(pipe: Pipeline, answer: object) -> None:
    result = pipe(PROMPT, seed=1, num_inference_steps=4, scheduler="ddim", callback=lambda step: answer)
    assert result.parameters[0].extra["Stopped after"] == "1 of 4 steps"


@pytest.mark.parametrize("answer", [None, True, np.bool_(True), {"latents": None}])
def test_fault_51_no_other_answer_stops(pipe: Pipeline, answer: object) -> None:
    result = pipe(PROMPT, seed=1, num_inference_steps=3, scheduler="ddim", callback=lambda step: answer)
    assert "Stopped after" not in result.parameters[0].extra


def test_fault_51_an_answer_that_is_neither_true_nor_false(pipe: Pipeline) -> None:
    with pytest.raises(UsageError, match="answer of the callback: got ndarray, accepted None or True to go on"):
        pipe(PROMPT, seed=1, num_inference_steps=3, callback=lambda step: step.latents)


def test_a_stopped_picture_says_so(pipe: Pipeline) -> None:
    result = pipe([PROMPT, OTHER], seed=1, num_inference_steps=4, scheduler="ddim", callback=lambda s: s.index < 5)
    assert [p.extra.get("Stopped after") for p in result.parameters] == [None, "2 of 4 steps"]


def test_stopping_before_the_first_step_leaves_nothing(pipe: Pipeline) -> None:
    generation = pipe.start(make_request(pipe.manifest.defaults, PROMPT))
    generation.stop()
    with pytest.raises(UsageError, match="no picture was begun"):
        generation.result()


@pytest.mark.parametrize(("scale", "off"), [(0, True), (0.5, True), (1, True), (1.5, False)])
def test_what_guidance_leaves_out_is_said_and_not_recorded(
    pipe: Pipeline, caplog: pytest.LogCaptureFixture, scale: float, off: bool
) -> None:
    settings: dict[str, Any] = {"seed": 1, "num_inference_steps": 2, "guidance_scale": scale}
    plain = pipe(PROMPT, **settings)
    assert not caplog.records
    result = pipe(PROMPT, negative_prompt=NEGATIVE, guidance_rescale=0.5, **settings)
    assert np.array_equal(result.latents, plain.latents) is off
    told = result.parameters[0]
    assert (told.negative_prompt, told.extra) == (("", {}) if off else (NEGATIVE, {"Guidance rescale": "0.5"}))
    because = f"is not used: with a `guidance_scale` of {scale:g} guidance is off, it takes more than 1"
    said = [record.getMessage() for record in caplog.records]
    assert said == ([f"`{name}` {because}" for name in ("negative_prompt", "guidance_rescale")] if off else [])


def test_parameters_say_what_was_asked_for(pipe: Pipeline, tmp_path: Path) -> None:
    result = pipe(
        PROMPT, seed=5, num_inference_steps=2, scheduler="DDIM", eta=0.25, guidance_rescale=0.1, rng="cuda",
        prompt_weighting=False, truncate=True, height=64, width=72,
    )  # fmt: skip
    path = save_png(result.images[0], tmp_path / "a.png", parameters=result.parameters[0])
    told = read_parameters(path)
    assert told == result.parameters[0]
    assert (told.scheduler, told.seed, told.rng, told.width, told.height) == ("DDIM", 5, "cuda", 72, 64)
    assert told.extra == {"Eta": "0.25", "Guidance rescale": "0.1", "Emphasis": "None", "Truncate": "77"}
