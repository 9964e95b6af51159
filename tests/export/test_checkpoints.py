"""Every architecture that is supported: a tiny random checkpoint, exported, run, and compared with diffusers."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import tiny_checkpoints
import torch
from demo_reference import generators, psnr
from diffusers import AutoencoderKL, AutoencoderTiny, EulerDiscreteScheduler, LatentConsistencyModelImg2ImgPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import cosine_distance
from fake_cuda import FakeGpu
from fake_onnxruntime import FakeOnnxRuntime
from sd_export.exporter import export
from sd_export.options import ExportOptions
from sd_export.tensorrt_.plan import BuildOptions, plan_builds
from sd_runtime import Bundle, Pipeline, Result, make_request
from sd_runtime.bundle.manifest import Defaults, Precision
from sd_runtime.cli.recall import recall
from sd_runtime.cli.run import main
from sd_runtime.engines.engines import Engines
from sd_runtime.errors import ExportError
from sd_runtime.images.convert import to_pictures
from sd_runtime.images.metadata import read_parameters
from sd_runtime.loop.device import DeviceDenoiser
from sd_runtime.networks.safety_checker import PREPROCESSOR, ImageProcessor, SafetyChecker, adjusted
from sd_runtime.sampling import SchedulerConfig
from sd_runtime.tensor import Array
from tiny_checkpoints import CHECKED, SEEDS, image_processor, load_reference, safety_checker, set_thresholds

NEEDED = ("text_encoder", "unet", "vae_decoder")
SIZE = {"height": 64, "width": 72}  # which nothing was traced at
PROMPT, NEGATIVE = "a large yellow star on a blue background", "red"


@dataclass(frozen=True)
class Exported:
    """A checkpoint, its bundle, and the networks from elsewhere that went into it."""

    checkpoint: Path
    bundle: Path
    vae: Path | None = None
    taesd: Path | None = None


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def sd1(place: Path) -> Exported:
    folder = place / "stable-diffusion-v1-4"
    tiny_checkpoints.stable_diffusion_1(folder)
    components = (*NEEDED, "safety_checker")
    return Exported(folder, export(ExportOptions(str(folder), output=place / "sd1", components=components)))


@pytest.fixture(scope="module")
def sd2(place: Path) -> Exported:
    """With another VAE than its own, and a fast decoder beside it."""
    folder, vae, taesd = (place / name for name in ("stable-diffusion-2-1", "another-vae", "taesd"))
    tiny_checkpoints.stable_diffusion_2(folder)
    tiny_checkpoints.tiny_vae(seed=9, scaling_factor=0.3).save_pretrained(vae)
    tiny_checkpoints.tiny_taesd().save_pretrained(taesd)
    options = ExportOptions(str(folder), output=place / "sd2", components=NEEDED, vae=str(vae), taesd=str(taesd))
    return Exported(folder, export(options), vae, taesd)


@pytest.fixture(scope="module")
def lcm(place: Path) -> Exported:
    folder = place / "lcm"
    tiny_checkpoints.latent_consistency_model(folder)
    components = (*NEEDED, "vae_encoder")
    return Exported(folder, export(ExportOptions(str(folder), output=place / "lcm-bundle", components=components)))


@pytest.fixture(scope="module")
def sd1_pipe(sd1: Exported) -> Iterator[Pipeline]:
    with Pipeline.load(sd1.bundle, device="cpu") as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def sd2_pipe(sd2: Exported) -> Iterator[Pipeline]:
    with Pipeline.load(sd2.bundle, device="cpu") as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def lcm_pipe(lcm: Exported) -> Iterator[Pipeline]:
    with Pipeline.load(lcm.bundle, device="cpu") as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def sd2_reference(sd2: Exported) -> Any:
    reference = load_reference(sd2.checkpoint)
    reference.vae = AutoencoderKL.from_pretrained(sd2.vae)
    return reference


def assert_same_picture(pipe: Pipeline, reference: Any, fast_decoder: bool = False, **settings: Any) -> Result:
    theirs = reference(PROMPT, generator=generators(7), output_type="np", **SIZE, **settings).images
    ours = pipe(PROMPT, seed=7, fast_decoder=fast_decoder, **SIZE, **settings)
    assert psnr(ours.arrays, theirs) >= 80
    assert theirs.std() > 0.05  # a picture, not a solid colour that anything would equal
    return ours


# ---- Stable Diffusion 1.4, and the safety checker --------------------------------------------------------------------


def reference_with_checker(sd1: Exported) -> Any:
    return load_reference(sd1.checkpoint, variant="fp16", feature_extractor=image_processor())


def test_stable_diffusion_1_with_its_safety_checker(sd1: Exported, sd1_pipe: Pipeline) -> None:
    """Both withhold the same pictures, and the others are the same."""
    theirs = reference_with_checker(sd1)(generator=generators(*SEEDS), output_type="np", **CHECKED)
    ours = sd1_pipe(seed=0, **CHECKED)
    assert ours.nsfw_content_detected == tuple(theirs.nsfw_content_detected)
    assert set(ours.nsfw_content_detected) == {True, False}
    assert psnr(ours.arrays, theirs.images) >= 80
    for picture, withheld, said in zip(ours.images, ours.nsfw_content_detected, ours.parameters, strict=True):
        assert (picture.getextrema() == ((0, 0),) * 3) == withheld
        assert said.extra["Safety checker"] == ("blacked out" if withheld else "passed")
    assert ours.timings.safety_checker > 0


def test_verdicts_are_diffusers_on_many_pictures(sd1: Exported, sd1_pipe: Pipeline) -> None:
    reference = reference_with_checker(sd1)
    unchecked = Pipeline(sd1_pipe.bundle, sd1_pipe.engines, sd1_pipe.tokenizer, sd1_pipe.scheduler_config)
    samples = unchecked(seed=100, **CHECKED | {"num_images_per_prompt": 40}).samples
    pictures = reference.image_processor.numpy_to_pil(np.clip(samples / 2 + 0.5, 0, 1).transpose(0, 2, 3, 1))
    pixels = reference.feature_extractor(pictures, return_tensors="pt").pixel_values
    _, expected = reference.safety_checker(clip_input=pixels, images=[np.ones(1)] * len(pictures))
    assert sd1_pipe.safety_checker is not None
    assert sd1_pipe.safety_checker(samples) == tuple(expected)
    assert 5 < sum(expected) < 35


def test_without_the_safety_checker(sd1: Exported) -> None:
    reference = reference_with_checker(sd1)
    reference.safety_checker = None
    with Pipeline.load(sd1.bundle, device="cpu", safety_checker=False) as pipe:
        result = assert_same_picture(pipe, reference, num_inference_steps=3, negative_prompt=NEGATIVE)
        assert result.nsfw_content_detected is None
        assert "Safety checker" not in result.parameters[0].extra
        assert pipe(PROMPT, num_inference_steps=1, decode=False).nsfw_content_detected is None


def test_latents_are_not_checked(sd1_pipe: Pipeline) -> None:
    result = sd1_pipe(PROMPT, num_inference_steps=1, decode=False)
    assert result.nsfw_content_detected is None


def test_sd_run_says_what_was_withheld(
    sd1: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--model", str(sd1.bundle), "--device", "cpu", "--steps", "2", "--width", "72", "--height", "64"]
    command = [CHECKED["prompt"], *flags, "--seed", "0", "--num-images", str(len(SEEDS)), "--output", "p-{seed}.png"]
    assert main(command) == 0
    said = {seed: read_parameters(tmp_path / f"p-{seed}.png").extra["Safety checker"] for seed in SEEDS}
    noted = capsys.readouterr().err
    for seed, verdict in said.items():
        assert (f"black, as the safety checker withheld it: p-{seed}.png" in noted) == (verdict == "blacked out")
    assert set(said.values()) == {"passed", "blacked out"}
    assert main([*command, "--overwrite", "--no-safety-checker"]) == 0
    assert "safety checker" not in capsys.readouterr().err
    assert all("Safety checker" not in read_parameters(tmp_path / f"p-{seed}.png").extra for seed in SEEDS)


def test_prompts_files_resume_whatever_the_safety_checker_said(
    sd1: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\n{CHECKED['prompt']}\n")
    flags = ["--model", str(sd1.bundle), "--device", "cpu", "--steps", "1", "--seed", "0", "--quiet"]
    assert main(["--prompts-file", "prompts.txt", *flags]) == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.png")}
    assert len(before) == 2
    assert main(["--prompts-file", "prompts.txt", *flags]) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.png")} == before


def test_bundle_says_whether_there_is_a_safety_checker(sd1_pipe: Pipeline, sd2_pipe: Pipeline) -> None:
    assert "safety_checker" in sd1_pipe.manifest.components
    assert "safety_checker" not in sd2_pipe.manifest.components
    assert sd2_pipe.safety_checker is None
    index = json.loads(sd1_pipe.bundle.read("model_index.json"))
    assert index["safety_checker"] == [None, None]  # optimum knows none in ONNX
    assert index["feature_extractor"] == ["transformers", "CLIPImageProcessor"]


def test_safety_checker_in_float16(sd1: Exported, sd1_pipe: Pipeline, tmp_path: Path) -> None:
    """What follows the network stays float32: scores are as near as its own rounding lets them be."""
    options = ExportOptions(
        str(sd1.checkpoint), output=tmp_path / "half", precision="fp16", components=("safety_checker",)
    )
    half = export(options) / "safety_checker" / "model.onnx"
    feeds = {"clip_input": np.random.default_rng(0).standard_normal((3, 3, 30, 30), np.float32)}
    scores = onnxruntime.InferenceSession(str(half), providers=["CPUExecutionProvider"]).run(None, feeds)
    expected = sd1_pipe.engines.engine("safety_checker").run(feeds)
    for got, name in zip(scores, ("special_scores", "concept_scores"), strict=True):
        np.testing.assert_allclose(got, expected[name], atol=1e-3)


@pytest.mark.parametrize("form", ["cpu", "trt-basic", "trt-legacy"])
def test_every_form_of_the_safety_checker_is_the_plain_one(sd1: Exported, sd1_pipe: Pipeline, form: str) -> None:
    graphs = sd1_pipe.manifest.components["safety_checker"].graphs
    feeds = {"clip_input": np.random.default_rng(1).standard_normal((2, 3, 30, 30), np.float32)}
    got, expected = (
        onnxruntime.InferenceSession(str(sd1.bundle / graphs[name].path), providers=["CPUExecutionProvider"]).run(
            None, feeds
        )
        for name in (form, "plain")
    )
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_engines_are_built_for_all_that_draws(sd1_pipe: Pipeline, sd2_pipe: Pipeline, lcm_pipe: Pipeline) -> None:
    options = BuildOptions(Path("bundle"), sizes=((64, 64),))
    builds = {planned.component: planned for planned in plan_builds(sd1_pipe.manifest, options, "11.4.0")}
    assert builds["safety_checker"].shapes == {"clip_input": (1, 3, 30, 30)}
    assert "taesd" in {planned.component for planned in plan_builds(sd2_pipe.manifest, options, "11.4.0")}
    (unet, *_) = plan_builds(lcm_pipe.manifest, options, "11.4.0")
    assert unet.shapes["timestep_cond"] == (1, 16)


def test_a_checkpoint_without_one_has_none_to_export(sd2: Exported, tmp_path: Path) -> None:
    options = ExportOptions(str(sd2.checkpoint), output=tmp_path / "none", components=("safety_checker",))
    with pytest.raises(ExportError, match="has no safety checker"):
        export(options)


VIT_L_14 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "projection_dim": 768,
}


def blocks(count: int) -> Array:
    """(count, 3, 256, 384) samples: coarse random colours, under more and more noise."""
    random = np.random.default_rng(0)
    coarse = random.uniform(-1, 1, (count, 3, 8, 8)).repeat(32, axis=2).repeat(48, axis=3)
    noise = random.normal(0, 0.3, coarse.shape) * np.linspace(0, 1, count)[:, None, None, None]
    return (coarse + noise).astype(np.float32)


def diffusers_scores(checker: Any, clip_input: torch.Tensor) -> Array:
    """(B, 17): what StableDiffusionSafetyChecker computes and does not hand out."""
    with torch.no_grad():
        embeddings = checker.visual_projection(checker.vision_model(clip_input)[1])
        special, concept = (
            (cosine_distance(embeddings, getattr(checker, name)) - getattr(checker, f"{name}_weights")).numpy()
            for name in ("special_care_embeds", "concept_embeds")
        )
    return np.stack([adjusted(*rows) for rows in zip(special, concept, strict=True)])


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_safety_checker_of_true_size(sd1: Exported, tmp_path: Path, precision: Precision) -> None:
    """CLIP ViT-L/14 with random weights, 1.2 GB in float32: the same scores, to the thousandths that count."""
    folder = Path(shutil.copytree(sd1.checkpoint, tmp_path / "true-size"))
    checker, processor, samples = safety_checker(**VIT_L_14), image_processor(224), blocks(12)
    pictures = to_pictures(samples)
    clip_input = processor(pictures, return_tensors="pt").pixel_values
    set_thresholds(checker, clip_input)
    (folder / "safety_checker/model.fp16.safetensors").unlink()
    checker.save_pretrained(folder / "safety_checker")
    processor.save_pretrained(folder / "feature_extractor")
    options = ExportOptions(
        str(folder), output=tmp_path / "bundle", precision=precision, components=("safety_checker",), verify=False
    )
    bundle = Bundle.open(export(options))
    engines = Engines.open(bundle, "cpu")
    ours = SafetyChecker(engines.engine("safety_checker"), ImageProcessor.from_bytes(bundle.read(PREPROCESSOR)))
    started = time.perf_counter()
    scores = ours.scores(pictures)
    seconds = (time.perf_counter() - started) / len(pictures)
    error = np.abs(scores - diffusers_scores(checker, clip_input)).max()
    print(f"safety checker {precision}: scores within {error:.3f} of diffusers', {seconds:.2f} s a picture")
    assert error <= 0.0011  # one thousandth, where a score lies between two
    if precision == "fp32":
        _, verdicts = checker(clip_input=clip_input, images=[np.ones(1)] * len(pictures))
        assert ours(samples) == tuple(verdicts)
        assert set(verdicts) == {True, False}
    engines.close()


# ---- Stable Diffusion 2.1, another VAE, a fast decoder, SD-Turbo -----------------------------------------------------


def test_stable_diffusion_2(sd2_pipe: Pipeline, sd2_reference: Any) -> None:
    assert_same_picture(sd2_pipe, sd2_reference, num_inference_steps=4, guidance_scale=5.0, negative_prompt=NEGATIVE)


def test_another_vae_is_named(sd2: Exported, sd2_pipe: Pipeline) -> None:
    manifest = sd2_pipe.manifest
    assert manifest.latent.scaling_factor == 0.3
    assert {name: part.id for name, part in manifest.parts.items()} == {"vae": "another-vae", "taesd": "taesd"}
    assert set(manifest.parts["vae"].files) == {"config.json", "diffusion_pytorch_model.safetensors"}
    result = sd2_pipe(PROMPT, num_inference_steps=1)
    assert result.parameters[0].extra["VAE"] == "another-vae"


def test_another_vae_is_another_bundle(sd2: Exported) -> None:
    options = ExportOptions(str(sd2.checkpoint), output=sd2.bundle, components=NEEDED, taesd=str(sd2.taesd))
    with pytest.raises(ExportError, match="exists: got a fp32 bundle of stable-diffusion-2-1; replace it with --force"):
        export(options)


def test_fast_decoder(sd2: Exported, sd2_pipe: Pipeline) -> None:
    reference = load_reference(sd2.checkpoint)
    reference.vae = AutoencoderTiny.from_pretrained(sd2.taesd)
    result = assert_same_picture(sd2_pipe, reference, fast_decoder=True, num_inference_steps=2)
    assert result.parameters[0].extra["VAE Decoder"] == "TAESD"
    settings, unknown = recall(result.parameters[0])
    assert settings.options["fast_decoder"] and not unknown
    assert np.array_equal(sd2_pipe.decode_latents(result.latents, fast=True), result.samples)
    assert psnr(sd2_pipe.decode_latents(result.latents) / 2 + 0.5, result.samples / 2 + 0.5) < 40


def test_sd_run_with_the_fast_decoder(sd2: Exported, lcm: Exported, tmp_path: Path, capsys: Any) -> None:
    flags = ["--steps", "1", "--device", "cpu", "--fast-decoder", "--output", str(tmp_path / "p.png")]
    assert main([PROMPT, "--model", str(sd2.bundle), *flags]) == 0
    assert read_parameters(tmp_path / "p.png").extra["VAE Decoder"] == "TAESD"
    capsys.readouterr()
    assert main([PROMPT, "--model", str(lcm.bundle), *flags, "--overwrite"]) == 2
    message = "--fast-decoder: got True, accepted a bundle that has one; add one: sd-export --model lcm --taesd"
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def turbo(place: Path) -> tuple[Path, Bundle]:
    """SD-Turbo has the networks of Stable Diffusion 2.1, which are exported above; here, its sampler and defaults."""
    folder = place / "sd-turbo"
    tiny_checkpoints.sd_turbo(folder)
    options = ExportOptions(str(folder), output=place / "turbo", components=("text_encoder",))
    return folder, Bundle.open(export(options))


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_sd_turbo(turbo: tuple[Path, Bundle], sd2_pipe: Pipeline, sd2_reference: Any, steps: int) -> None:
    folder, bundle = turbo
    assert bundle.manifest.defaults == Defaults(num_inference_steps=1, guidance_scale=0.0, height=64, width=64)
    config = SchedulerConfig.from_bytes(bundle.read("scheduler/scheduler_config.json"))
    pipe = Pipeline(sd2_pipe.bundle, sd2_pipe.engines, sd2_pipe.tokenizer, config)
    reference = type(sd2_reference)(
        **sd2_reference.components | {"scheduler": EulerDiscreteScheduler.from_pretrained(folder / "scheduler")}
    )
    reference.set_progress_bar_config(disable=True)
    assert_same_picture(pipe, reference, num_inference_steps=steps, guidance_scale=0.0)


# ---- latent consistency models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "guidance_scale"), [(1, 8.5), (4, 8.5), (8, 1.0)])
def test_latent_consistency_model(lcm: Exported, lcm_pipe: Pipeline, steps: int, guidance_scale: float) -> None:
    reference = load_reference(lcm.checkpoint)
    assert_same_picture(lcm_pipe, reference, num_inference_steps=steps, guidance_scale=guidance_scale)


def test_latent_consistency_models_are_told_the_guidance(lcm_pipe: Pipeline) -> None:
    assert lcm_pipe.manifest.defaults == Defaults(num_inference_steps=4, guidance_scale=8.5, height=64, width=64)
    assert json.loads(lcm_pipe.bundle.read("model_index.json"))["_class_name"] == "LatentConsistencyModelPipeline"
    request = make_request(lcm_pipe.manifest.defaults, PROMPT, negative_prompt=NEGATIVE, seed=1)
    assert not lcm_pipe.guidance(request).on  # one row a picture
    assert lcm_pipe.notices(request) == ["`negative_prompt` is not used: this model guides itself by its prompt alone"]
    assert lcm_pipe.parameters(request, 0).negative_prompt == ""
    told = lcm_pipe(PROMPT, seed=1), lcm_pipe(PROMPT, seed=1, guidance_scale=2.0)
    assert not np.array_equal(told[0].latents, told[1].latents)


@pytest.mark.parametrize(("steps", "strength"), [(4, 0.5), (1, 0.8)])
def test_latent_consistency_model_changes_a_picture(
    lcm: Exported, lcm_pipe: Pipeline, steps: int, strength: float
) -> None:
    """All steps are taken, whatever the strength."""
    reference = LatentConsistencyModelImg2ImgPipeline.from_pipe(load_reference(lcm.checkpoint))
    picture = np.random.default_rng(0).uniform(0, 1, (64, 72, 3)).astype(np.float32)
    settings = {"num_inference_steps": steps, "strength": strength, "guidance_scale": 8.5}
    theirs = reference(PROMPT, image=picture, generator=generators(7), output_type="np", **settings).images
    ours = lcm_pipe(PROMPT, image=picture, seed=7, **SIZE, **settings)
    assert psnr(ours.arrays, theirs) >= 80
    assert len(lcm_pipe.plan(ours.request)) == steps


def test_latent_consistency_model_on_a_device(
    lcm: Exported, lcm_pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop that never comes back to the host tells the network the guidance, too."""
    expected = lcm_pipe(PROMPT, seed=1)
    FakeOnnxRuntime(FakeGpu().install(monkeypatch)).install(monkeypatch)
    with Pipeline.load(lcm.bundle, device="cuda") as pipe:
        assert isinstance(pipe.loops.denoiser(pipe.guidance(expected.request)), DeviceDenoiser)
        np.testing.assert_allclose(pipe(PROMPT, seed=1).latents, expected.latents, atol=1e-4)
