"""A picture says how to repeat it: drawn, read and drawn again, it has the same pixels."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from sd_runtime import Pipeline
from sd_runtime.cli.recall import differences, recall
from sd_runtime.cli.run import main
from sd_runtime.cli.settings import Settings
from sd_runtime.images.metadata import Parameters, parse_parameters, read_parameters, save_png
from sd_runtime.sampling import SchedulerConfig

PROMPT = "a large (yellow:1.2) star, on a [blue] background"
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "another sampler": {"scheduler": "dpmpp_2m_karras", "seed": -3, "num_inference_steps": 5},
    "by its class": {"scheduler": "UniPCMultistepScheduler"},
    "noise of its own": {"scheduler": "tcd", "eta": 0.123456789, "rng": "cuda", "seed": 2**64 - 1},
    "all the rest": {
        "negative_prompt": "red\nNegative prompt: Steps: 3, Sampler: x, Seed: 1",
        "guidance_scale": 1 / 3 + 5,
        "guidance_rescale": 2 / 3,
        "height": 72,
        "width": 64,
        "prompt_weighting": False,
        "truncate": True,
    },
    "changed": {"image": "start.png", "strength": 0.55, "resize": "fit", "scheduler": "euler_a"},
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pipe: Pipeline) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Pipeline, "load", classmethod(lambda cls, bundle, **options: pipe))
    monkeypatch.setattr(pipe, "close", lambda: None)
    Image.effect_mandelbrot((90, 60), (-2, -1, 1, 1), 20).convert("RGB").save("start.png")
    return tmp_path


def pixels(path: str) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_drawn_in_python_repeated_by_sd_run(
    folder: Path, pipe: Pipeline, demo_bundle: Path, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Picture 2 of 3, so that its own seed has to be found."""
    arguments = {"seed": 7, "num_inference_steps": 4} | settings
    result = pipe(PROMPT, num_images_per_prompt=3 if arguments["seed"] < 2**63 else 1, **arguments)
    save_png(result.images[-1], "a.png", parameters=result.parameters[-1])
    image = ["--image", settings["image"]] if "image" in settings else []
    assert main(["--from-image", "a.png", "--model", str(demo_bundle), "--output", "b.png", *image]) == 0
    assert pixels("a.png") == pixels("b.png")
    assert read_parameters("a.png") == read_parameters("b.png")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("load ")


def test_flags_change_details(folder: Path, pipe: Pipeline, demo_bundle: Path) -> None:
    result = pipe(PROMPT, seed=7, num_inference_steps=4, scheduler="euler")
    save_png(result.images[0], "a.png", parameters=result.parameters[0])
    flags = ["--seed", "8", "--output", "b.png", "a star", "--model", str(demo_bundle)]
    assert main(["--from-image", "a.png", *flags]) == 0
    assert read_parameters("b.png") == replace(read_parameters("a.png"), seed=8, prompt="a star")


def test_a_picture_to_change_must_be_given_again(
    folder: Path, pipe: Pipeline, demo_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = pipe(PROMPT, seed=7, num_inference_steps=4, image="start.png")
    save_png(result.images[0], "a.png", parameters=result.parameters[0])
    command = ["--from-image", "a.png", "--model", str(demo_bundle), "--output", "b.png"]
    assert main(command) == 2
    assert (
        "--strength without a picture to change: got 0.8; give the picture as --image, or leave --strength out"
        in capsys.readouterr().err
    )
    assert main([*command, "--image", "a.png"]) == 0
    assert "sd-run: not drawn as a.png was: Init image hash: " in capsys.readouterr().err


def test_a_sheet_that_is_not_full(folder: Path, demo_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--model", str(demo_bundle)]
    flags = ["a star", "--steps", "2", "--seed", "1", "--output", "a.png"]
    assert main([*flags, "--grid", "2x2", "--num-images", "3", *model]) == 0
    capsys.readouterr()
    assert main(["--from-image", "a.png", "--output", "b.png", *model]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("load ")
    assert pixels("a.png") == pixels("b.png")
    assert read_parameters("a.png") == read_parameters("b.png")
    assert main(["--from-image", "a.png", "--output", "c.png", "--grid", "1x2", *model]) == 0
    with Image.open("c.png") as sheet:
        assert sheet.size == (256, 128)


AUTOMATIC1111 = """a cat
Negative prompt: dog
Steps: 4, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 6.5, Seed: 5, Size: 64x72, Model hash: 6ce0161689, \
Model: v1-5-pruned-emaonly, Clip skip: 2, Hires upscale: 2, Denoising strength: 0.7, Version: v1.10.1"""


def test_a_picture_of_automatic1111(
    folder: Path, demo_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What can be had is; what cannot is named.  Its model is not here, but another is, and only one."""
    monkeypatch.setenv("SD_LEAN_HOME", str(folder))
    (folder / "bundles").mkdir()
    (folder / "bundles" / "demo").symlink_to(demo_bundle)
    chunks = PngInfo()
    chunks.add_text("parameters", AUTOMATIC1111)
    Image.new("RGB", (64, 72)).save("a.png", pnginfo=chunks)
    assert main(["--from-image", "a.png", "--output", "b.png"]) == 0
    unknown, different, *_ = capsys.readouterr().err.splitlines()
    assert unknown == "sd-run: not understood in a.png: Clip skip: 2; Hires upscale: 2; Denoising strength: 0.7"
    assert different.startswith("sd-run: not drawn as a.png was: Model hash: 6ce0161689, here ")
    told = read_parameters("b.png")
    assert (told.prompt, told.negative_prompt, told.scheduler, told.seed) == ("a cat", "dog", "DPM++ 2M Karras", 5)
    assert (told.rng, told.width, told.height, told.guidance_scale) == ("cuda", 64, 72, 6.5)


def test_what_other_programs_tell() -> None:
    def recalled(text: str) -> tuple[Settings, list[str]]:
        return recall(parse_parameters(f"a cat\nSteps: 4, Seed: 1, {text}"))

    settings, unknown = recalled("Sampler: DPM adaptive, Eta: 0.5, RNG: CPU")
    assert settings.options == {"negative_prompt": "", "num_inference_steps": 4, "seed": 1, "rng": "cpu"}
    assert unknown == ["Eta: 0.5", "Sampler: DPM adaptive"]
    settings, unknown = recalled("Sampler: DDIM, Eta: 0.5, Emphasis: None, Denoising strength: 0.25")
    told = {"scheduler": "DDIM", "eta": 0.5, "prompt_weighting": False, "strength": 0.25}
    assert told.items() <= settings.options.items()
    assert unknown == []
    settings, unknown = recalled("Sampler: DDIM, Denoising strength: much, Emphasis: No norm")
    assert not {"strength", "prompt_weighting"} & set(settings.options)
    assert unknown == ["Denoising strength: much", "Emphasis: No norm"]


OTHER_DEFAULTS = (
    {},
    {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"},
    {"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True, "solver_order": 3},
    {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver++", "solver_order": 1},
)
NAMES = (None, "euler", "EulerDiscreteScheduler", "dpmpp_2m", "DPMSolverMultistepScheduler", "ddim", "PNDMScheduler")


@pytest.mark.parametrize(("raw", "name"), list(itertools.product(OTHER_DEFAULTS, NAMES)))
def test_the_sampler_is_recalled_whatever_the_model_has(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, raw: dict[str, Any], name: str | None
) -> None:
    from sd_runtime import make_request

    base = {
        "_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "skip_prk_steps": True, "steps_offset": 1, "set_alpha_to_one": False,
    }  # fmt: skip
    monkeypatch.setattr(pipe, "scheduler_config", SchedulerConfig.from_dict(base | raw))
    request = make_request(pipe.manifest.defaults, PROMPT, scheduler=name)
    settings, unknown = recall(pipe.parameters(request, 0))
    again = settings.request(pipe.manifest.defaults)
    assert unknown == []
    ours, theirs = pipe.plan(request), pipe.plan(again)
    np.testing.assert_array_equal(ours.coefficients, theirs.coefficients)
    np.testing.assert_array_equal(ours.timesteps, theirs.timesteps)


def test_differences_are_named() -> None:
    told = Parameters("a", model_hash="1", version="sd-lean 0.0.1", extra={"TI hashes": "x: 1", "Eta": "0.5"})
    again = Parameters("a", model_hash="2", version="sd-lean 0.1.0")
    assert differences(told, again) == [
        "Model hash: 1, here 2", "Version: sd-lean 0.0.1, here sd-lean 0.1.0", "TI hashes: x: 1, here none",
    ]  # fmt: skip
    assert differences(told, told) == []
