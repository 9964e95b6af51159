"""From what a user asks for to engines and shapes: no TensorRT is needed for that."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from sd_export.tensorrt_.plan import BuildOptions, form_for, parse_batches, parse_size, plan_builds
from sd_runtime.bundle.manifest import MANIFEST, Component, Manifest
from sd_runtime.errors import BundleError, UsageError
from sd_runtime.tensor import TensorSpec


@pytest.fixture
def manifest(demo_bundle: Path) -> Manifest:
    return Manifest.from_bytes((demo_bundle / MANIFEST).read_bytes())


def options(**fields: object) -> BuildOptions:
    return BuildOptions(Path("bundle"), **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("version", "form"),
    [
        ("8.5.3", "trt-legacy"),
        ("8.6.1", "trt-legacy"),
        ("10.0.1", "trt-basic"),
        ("10.13.3.9", "trt-basic"),
        ("10.14.1", "trt-basic"),
        ("10.15.0", "trt-basic"),
        ("11.4.0", "trt-basic"),
    ],
)
def test_each_version_gets_a_graph_that_it_parses(manifest: Manifest, version: str, form: str) -> None:
    assert form_for(manifest, options(), version) == (form, "fp32")


def test_precisions_that_cannot_be_had_say_why(manifest: Manifest) -> None:
    half = replace(manifest, precision="fp16")
    assert form_for(half, options(), "11.4.0") == ("trt-basic", "fp16")
    assert form_for(manifest, options(precision="bf16"), "10.15.0") == ("trt-bf16", "bf16")
    with pytest.raises(UsageError, match=r"precision bf16: got a fp16 bundle and TensorRT 11\.4"):
        form_for(half, options(precision="bf16"), "11.4.0")
    with pytest.raises(UsageError, match=r"precision bf16: got a fp32 bundle and TensorRT 10\.13"):
        form_for(manifest, options(precision="bf16"), "10.13.0")
    with pytest.raises(UsageError, match="accepted fp32, the bundle's; sd-export --model demo --precision fp16"):
        form_for(manifest, options(precision="fp16"), "11.4.0")
    with pytest.raises(UsageError, match=r"TensorRT: got 8\.4\.1, accepted 8\.5 or newer"):
        form_for(manifest, options(), "8.4.1")


def test_by_default_one_exact_engine_and_one_dynamic_fallback(manifest: Manifest) -> None:
    builds = {planned.label: planned for planned in plan_builds(manifest, options(), "11.4.0")}
    assert list(builds) == [
        "unet 128x128 batch 1",
        "vae_decoder 128x128 batch 1",
        "unet dynamic",
        "vae_decoder dynamic",
        "vae_encoder dynamic",
        "text_encoder dynamic",
        "sampler_step guided",
        "sampler_step plain",
        "pixels plain",
    ]
    exact = builds["unet 128x128 batch 1"]
    assert exact.shapes["sample"] == (2, 4, 16, 16) and exact.shapes["timestep"] == (2,)
    assert all(allowed.min == allowed.max for allowed in exact.profile.values())
    fallback = builds["unet dynamic"].profile
    assert (fallback["sample"].min, fallback["sample"].opt) == ((1, 4, 16, 16), (2, 4, 16, 16))
    assert fallback["sample"].max == (2, 4, 96, 96)  # 768 pixels, one picture with guidance
    assert (fallback["encoder_hidden_states"].min[1], fallback["encoder_hidden_states"].max[1]) == (77, 231)
    decoder = builds["vae_decoder dynamic"].profile["latent_sample"]
    assert (decoder.min, decoder.max) == ((1, 4, 16, 16), (1, 4, 96, 96))
    assert builds["vae_encoder dynamic"].profile["sample"].max == (1, 3, 768, 768)


def test_every_size_and_batch_asked_for_is_an_engine_of_its_own(manifest: Manifest) -> None:
    asked = options(sizes=((512, 512), (512, 768), (1024, 512)), batches=(1, 2, 4), fallback=False)
    everything = plan_builds(manifest, asked, "11.4.0")
    assert [planned.label for planned in everything if planned.component == "vae_decoder"] == [
        f"vae_decoder {size} batch 1" for size in ("512x512", "512x768", "1024x512")
    ]
    builds = [planned for planned in everything if planned.component == "unet"]
    assert len(builds) == 9 and not any("dynamic" in planned.label for planned in builds)
    assert builds[4].label == "unet 512x768 batch 2"
    assert builds[4].shapes["sample"] == (4, 4, 96, 64)  # rows, channels, height, width
    assert builds[4].shapes["encoder_hidden_states"][:2] == (4, 77)


def test_the_fallback_reaches_as_far_as_what_was_asked_for(manifest: Manifest) -> None:
    builds = plan_builds(manifest, options(sizes=((1024, 64),), batches=(4,)), "11.4.0")
    fallback = next(planned for planned in builds if planned.label == "unet dynamic").profile["sample"]
    assert (fallback.min, fallback.opt, fallback.max) == ((1, 4, 8, 8), (8, 4, 8, 128), (8, 4, 128, 128))


def test_models_without_guidance_take_one_row_a_picture(manifest: Manifest) -> None:
    turbo = replace(manifest, defaults=replace(manifest.defaults, guidance_scale=1.0))
    graph = manifest.components["unet"].graphs["trt-basic"]
    scale = TensorSpec("timestep_cond", "float32", (graph.inputs[0].shape[0], 256))
    told = replace(graph, inputs=(*graph.inputs, scale))
    unet = replace(manifest.components["unet"], graphs={"plain": told, "trt-basic": told})
    consistency = replace(manifest, components={**manifest.components, "unet": unet})
    for model in (turbo, consistency):
        exact, *rest = plan_builds(model, options(batches=(3,)), "11.4.0")
        assert exact.label == "unet 128x128 batch 3" and exact.shapes["sample"][0] == 3
        fallback = next(planned for planned in rest if planned.label == "unet dynamic").profile["sample"]
        assert (fallback.opt[0], fallback.max[0]) == (3, 6 if model is turbo else 3)  # guidance may be asked for
    assert exact.profile["timestep_cond"].opt == (3, 256)


def test_loop_graphs_take_what_the_networks_take(manifest: Manifest) -> None:
    builds = {planned.label: planned.profile for planned in plan_builds(manifest, options(batches=(1, 4)), "8.5.3")}
    step = builds["sampler_step guided"]
    assert step["model_output"].min[0] == 2 and step["model_output"].max == (8, 4, 96, 96)
    assert step["coefficients"].max == (2048, 8, 10) and step["timesteps"].max == (2049,)
    assert builds["sampler_step plain"]["model_output"].max[0] == 8  # without guidance the UNet's rows are pictures
    assert builds["unet dynamic"]["sample"].max[0] == 8
    assert builds["pixels plain"]["sample"].max == (4, 3, 768, 768)


def test_what_the_bundle_lacks(manifest: Manifest) -> None:
    networks = {name: manifest.components[name] for name in ("unet", "text_encoder")}
    labels = [planned.label for planned in plan_builds(replace(manifest, components=networks), options(), "11.4.0")]
    assert labels == ["unet 128x128 batch 1", "unet dynamic", "text_encoder dynamic"]
    old = {"unet": Component(networks["unet"].weights, {"plain": networks["unet"].graph()})}
    with pytest.raises(
        BundleError, match="no trt-basic graph of unet; export it again: sd-export --model demo --force"
    ):
        plan_builds(replace(manifest, components=old), options(), "11.4.0")


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"sizes": ((513, 512),)}, "size: got 513x512, accepted WIDTHxHEIGHT, multiples of 64"),
        ({"sizes": ((2048, 512),)}, "size: got 2048x512"),
        ({"batches": ()}, "batch: got"),
        ({"batches": (0,)}, "accepted 1 to 16 pictures"),
        ({"precision": "int8"}, "precision: got int8, accepted fp32, fp16, bf16"),
    ],
)
def test_options_that_make_no_sense(fields: dict[str, object], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        options(**fields)


def test_flags_are_read() -> None:
    assert parse_size("512x768") == (512, 768) and parse_size("64X128") == (64, 128)
    assert parse_batches("1,2,4") == (1, 2, 4) and parse_batches("2,2") == (2,)
    for text in ("512", "x512", "512x", "axb", "-1x5"):
        with pytest.raises(UsageError, match="size: got"):
            parse_size(text)
    with pytest.raises(UsageError, match="batch: got"):
        parse_batches("1,two")
