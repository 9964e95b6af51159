"""A whole bundle with TensorRT engines on the fake GPU: chosen where they fit, replaced aloud where they do not."""

from __future__ import annotations

import logging
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundle_with_engines import (
    HERE,
    REQUEST,
    VERSION,
    assert_same_pictures,
    built_as_planned,
    copy_with_engines,
    on_cpu,
)
from fake_cuda import FakeGpu
from fake_onnxruntime import FakeOnnxRuntime
from fake_tensorrt import FakeTensorRT, Runtime
from sd_export.tensorrt_.cli import build_parser
from sd_export.tensorrt_.plan import parse_batches, parse_size
from sd_runtime.bundle.bundle import Bundle
from sd_runtime.bundle.manifest import MANIFEST, EngineRecord
from sd_runtime.engines.gpu.gpu import WARM_UP_RUNS
from sd_runtime.engines.tensorrt_.rebuild import rebuild
from sd_runtime.errors import BundleError, DependencyError, EngineError, NumericalError
from sd_runtime.loop.device import DeviceDenoiser
from sd_runtime.loop.guidance import Guidance
from sd_runtime.pipeline import Pipeline
from sd_runtime.request import make_request
from sd_runtime.result import Step


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    return FakeTensorRT(FakeGpu().install(monkeypatch), VERSION).install(monkeypatch)


@pytest.fixture
def machine(tensorrt: FakeTensorRT) -> FakeGpu:
    return tensorrt.gpu


@pytest.fixture
def bundle(demo_bundle: Path, tmp_path: Path) -> Path:
    return copy_with_engines(demo_bundle, tmp_path / "bundle")


# ---- engines that fit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed", [{}, {"num_images_per_prompt": 3, "scheduler": "dpmpp_2m"}, {"guidance_scale": 1.0}]
)
def test_draws_on_the_gpu_what_the_cpu_draws(
    machine: FakeGpu, bundle: Path, demo_bundle: Path, changed: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with Pipeline.load(bundle, device="cuda") as pipeline:
        assert isinstance(pipeline.loops.denoiser(Guidance(7.5)), DeviceDenoiser)
        result = pipeline(**(REQUEST | changed))
    assert result.decoded is not None and result.decoded.pixels is not None
    assert machine.log.count("enqueue out_sample") == 6 + 2 * WARM_UP_RUNS  # of two recordings
    assert machine.log.count("enqueue pixels") == len(result.images) + WARM_UP_RUNS
    assert_same_pictures(result, on_cpu(demo_bundle, **changed))
    assert not caplog.records


def test_closing_the_pipeline_frees_the_gpu(tensorrt: FakeTensorRT, bundle: Path) -> None:
    with Pipeline.load(bundle) as pipeline:
        pipeline(**REQUEST)
        pipeline.close()  # and again on leaving
    tensorrt.engines.clear()
    assert tensorrt.gpu.memory.live == 0
    with pytest.raises(EngineError, match="the pipeline was closed"):
        pipeline(**REQUEST)


def test_fault_52_closed_while_it_draws(tensorrt: FakeTensorRT, bundle: Path) -> None:
    """Nothing more begins on the GPU, and what a request under way still has goes when it ends."""
    for rescale in (0.0, 0.7):  # the device leads the loop, then the host
        pipeline = Pipeline.load(bundle, device="cuda")
        generation = pipeline.start(pipeline(**REQUEST, guidance_rescale=rescale).request)
        next(generation)
        pipeline.close()
        with pytest.raises(EngineError, match=r"the (GPU|pipeline) was closed"):
            list(generation)
        with pytest.raises(EngineError, match="the pipeline was closed"):
            generation.result()
        tensorrt.engines.clear()
        del generation, pipeline
        assert tensorrt.gpu.memory.live == 0


def test_guidance_rescale_is_not_linear_and_runs_on_the_host_over_the_same_engines(
    machine: FakeGpu, bundle: Path, demo_bundle: Path
) -> None:
    changed = {"guidance_rescale": 0.7}
    with Pipeline.load(bundle) as pipeline:
        result = pipeline(**REQUEST, **changed)
    assert "graph" not in machine.log[: machine.log.index("enqueue pixels")]
    assert_same_pictures(result, on_cpu(demo_bundle, **changed))


def test_without_an_engine_for_the_step_the_host_leads(machine: FakeGpu, demo_bundle: Path, tmp_path: Path) -> None:
    made = copy_with_engines(demo_bundle, tmp_path / "b", lambda r: None if r.component == "sampler_step" else r)
    with Pipeline.load(made) as pipeline:
        assert not isinstance(pipeline.loops.denoiser(Guidance(7.5)), DeviceDenoiser)
        assert_same_pictures(pipeline(**REQUEST), on_cpu(demo_bundle))
    assert machine.log.count("enqueue out_sample") == 6


def test_fault_26_two_threads_get_what_one_gets(machine: FakeGpu, bundle: Path, demo_bundle: Path) -> None:
    with Pipeline.load(bundle) as pipeline, ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda seed: pipeline(**REQUEST | {"seed": seed}), range(4))
        for seed, result in enumerate(results):
            assert_same_pictures(result, on_cpu(demo_bundle, seed=seed))


def test_stopping_early_gives_the_picture_as_far_as_it_came(machine: FakeGpu, bundle: Path) -> None:
    with Pipeline.load(bundle) as pipeline:
        stopped = pipeline(**REQUEST, callback=lambda step: step.index < 2)
        machine.log.clear()
        whole = pipeline(**REQUEST)
    assert machine.log.count("enqueue out_sample") == 6  # recorded once, although the first run was cancelled
    assert stopped.latents.shape == whole.latents.shape
    assert not np.allclose(stopped.latents, whole.latents)


def test_fault_23_a_decoder_that_overflows_gives_no_black_picture(machine: FakeGpu, bundle: Path) -> None:
    with Pipeline.load(bundle) as pipeline:
        latents = np.full((2, 4, 16, 16), 3e37, np.float32)
        with pytest.raises(NumericalError, match="VAE decoder output of picture 1: got NaN or infinity"):
            pipeline.decode_latents(latents)
        assert np.isfinite(pipeline.decode_latents(np.zeros_like(latents))).all()
        with pytest.raises(NumericalError, match=r"^latents of picture 2: got NaN or infinity$"):
            pipeline.loops.decode(np.stack([np.zeros_like(latents[0]), np.full_like(latents[0], np.nan)]))


# ---- engines as they are planned, and requests that they were not built for ------------------------------------------

LONG = ", ".join(f"a large red star number {i}" for i in range(50))  # more than 3 chunks of 77 tokens
EXACT: dict[str, Any] = {"fallback": False}
CHECKED = {"guidance_rescale": 0.7}  # a loop that the host leads


@pytest.mark.parametrize(
    ("build", "changed", "batches"),
    [
        ({}, {"guidance_scale": 1.0, "num_images_per_prompt": 2}, [2]),
        ({"batches": (4,)}, {"guidance_scale": 1.0, "num_images_per_prompt": 9}, [8, 1]),
        ({"guidance_scale": 1.0}, {"guidance_scale": 4.0}, [1]),
        (EXACT | {"batches": (1, 2, 4)}, {"num_images_per_prompt": 3}, [2, 1]),
        (EXACT | {"batches": (1, 2, 4)}, {"num_images_per_prompt": 6, "guidance_scale": 1.0}, [4, 2]),
        ({}, {"width": 256, "height": 192, "num_images_per_prompt": 2}, [1, 1]),
    ],
)
def test_planned_engines_draw_what_they_are_asked_for(
    machine: FakeGpu,
    demo_bundle: Path,
    tmp_path: Path,
    build: dict[str, Any],
    changed: dict[str, Any],
    batches: list[int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    changed = {"num_inference_steps": 3} | changed
    with Pipeline.load(built_as_planned(demo_bundle, tmp_path / "b", **build)) as pipeline:
        result = pipeline(**(REQUEST | changed))
        assert [len(images) for images in pipeline.batches(result.request)] == batches
    assert "graph" in machine.log
    assert_same_pictures(result, on_cpu(demo_bundle, **changed))
    assert not caplog.records


@pytest.mark.parametrize("library", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("build", "changed", "why", "flags"),
    [
        ({}, {"prompt": LONG}, "engines take prompts of up to 231 tokens", None),
        ({}, {"prompt": LONG} | CHECKED, "engines take prompts of up to 231 tokens", None),
        (EXACT, {"guidance_scale": 1.0}, "no TensorRT engine of unet was built for these shapes", ""),
        (EXACT | {"batches": (2,)}, {}, r"got sample\(2, 4, 16, 16\).* accepted sample\(4, 4, 16, 16\)", "--batch 2"),
        (
            EXACT,
            {"width": 192, "height": 136},
            "built for pictures of 128x128, not 192x136; to build one that does",
            "--size 128x128 --size 192x128",
        ),
    ],
)
def test_what_no_engine_was_built_for_is_drawn_by_onnxruntime_aloud(
    tensorrt: FakeTensorRT,
    demo_bundle: Path,
    tmp_path: Path,
    library: str,
    build: dict[str, Any],
    changed: dict[str, Any],
    why: str,
    flags: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if library == "cuda":
        FakeOnnxRuntime(tensorrt.gpu).install(monkeypatch)
    made, changed = built_as_planned(demo_bundle, tmp_path / "b", **build), {"num_inference_steps": 3} | changed
    with Pipeline.load(made) as pipeline:
        results = [pipeline(**(REQUEST | changed)) for _ in range(2)]
        assert isinstance(pipeline.loops.denoiser(Guidance(7.5)), DeviceDenoiser)
    for result in results:
        assert_same_pictures(result, on_cpu(demo_bundle, **changed))
    (record,) = caplog.records
    assert re.search(why, record.getMessage())
    place = " on the CPU" if library == "cpu" else ""
    assert record.getMessage().endswith(f"; ONNX Runtime{place} is used instead")
    if flags is not None:
        assert f"; to build one that does: sd-export build {made} {flags}".rstrip() + ";" in record.getMessage()
        again = built_as_planned(demo_bundle, tmp_path / "again", **read_flags(flags))
        caplog.clear()
        with Pipeline.load(again) as pipeline:
            pipeline(**(REQUEST | changed))
        assert not caplog.records  # the command helped
    tensorrt.engines.clear()
    assert tensorrt.gpu.memory.live == 0


def test_a_network_on_the_cpu_disturbs_no_copy_that_is_under_way(
    machine: FakeGpu, demo_bundle: Path, tmp_path: Path
) -> None:
    """The loop on the GPU fetches a step's latents while the next one runs."""
    request, trails = REQUEST | {"width": 192}, []
    for bundle in (built_as_planned(demo_bundle, tmp_path / "b", **EXACT), demo_bundle):
        steps: list[Step] = []
        with Pipeline.load(bundle, device="cpu" if bundle is demo_bundle else "cuda") as pipeline:
            pipeline(**request, callback=steps.append)
        trails.append([step.latents for step in steps])
    for ours, expected in zip(*trails, strict=True):
        assert np.abs(ours - expected).max() < 1e-3


def read_flags(flags: str) -> dict[str, Any]:
    """The options of `BuildOptions` that a command line stands for."""
    args = build_parser().parse_args(["bundle", *flags.split()])
    sizes = tuple(parse_size(size) for size in args.size or ())
    return {
        "sizes": sizes,
        "batches": parse_batches(args.batch),
        "refittable": args.refittable,
        "fallback": args.fallback,
    }


def test_what_no_engine_was_built_for_without_onnxruntime(
    machine: FakeGpu, demo_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    made = built_as_planned(demo_bundle, tmp_path / "b", **EXACT)
    with Pipeline.load(made) as pipeline:
        pipeline(**REQUEST)
        message = (
            rf"built for pictures of 128x128, not 192x128; .* sd-export build {made} --size 128x128 --size 192x128;"
        )
        with pytest.raises(EngineError, match=message):
            pipeline(**REQUEST, width=192)
        with pytest.raises(EngineError, match=rf"got sample\(1, .*sd-export build {made}; ONNX Runtime would"):
            pipeline(**(REQUEST | {"guidance_scale": 1.0}))


def test_pictures_at_once_are_no_more_than_the_sampler_step_takes(
    machine: FakeGpu, demo_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeOnnxRuntime(machine).install(monkeypatch)
    with Pipeline.load(demo_bundle) as pipeline:
        for scale in (1.0, 7.5):
            request = make_request(pipeline.manifest.defaults, "a", num_images_per_prompt=20, guidance_scale=scale)
            assert [len(images) for images in pipeline.batches(request)] == [16, 4]


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--batch 1,2",
        "--size 128x128 --size 192x64 --batch 2,4",
        "--size 512x512 --refittable --no-fallback",
        "--no-fallback",
    ],
)
def test_the_rebuild_command_builds_the_same_again(demo_bundle: Path, tmp_path: Path, flags: str) -> None:
    made = Bundle.open(built_as_planned(demo_bundle, tmp_path / "a bundle", **read_flags(flags)))
    assert rebuild(made) == f"sd-export build '{made.root}' {flags}".rstrip()


def test_the_rebuild_command_keeps_the_precision(bundle: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    engines = tuple(replace(record, precision="bf16") for record in manifest.engines)
    assert rebuild(Bundle(bundle, replace(manifest, engines=engines))) == f"sd-export build {bundle} --precision bf16"


# ---- engines that do not fit -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"tensorrt": "10.9.0"},
            r"no TensorRT engine fits: engines/h200/unet-.*\.plan was built for TensorRT 10\.9\.0 on NVIDIA H200 .*; "
            r"this is TensorRT 10\.16\.0 on NVIDIA H200",
        ),
        (
            {"gpu": "NVIDIA A100-SXM4-80GB", "compute_capability": "8.0"},
            r"was built for TensorRT 10\.16\.0 on NVIDIA A100-SXM4-80GB \(compute capability 8\.0, .*; this is .* on "
            r"NVIDIA H200 \(compute capability 9\.0",
        ),
    ],
)
def test_fault_08_engines_for_another_machine(
    machine: FakeGpu,
    demo_bundle: Path,
    tmp_path: Path,
    other: dict[str, str],
    message: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    made = copy_with_engines(demo_bundle, tmp_path / "b", lambda r: replace(r, target=replace(HERE, **other)))
    with Pipeline.load(made) as pipeline:
        result = pipeline(**REQUEST)
    assert_same_pictures(result, on_cpu(demo_bundle))
    assert "graph" not in machine.log
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    rest = rf"; ONNX Runtime is used instead; to build engines on this machine: sd-export build {made}$"
    assert re.search(message + ".*" + rest, record.getMessage())


def test_components_whose_engines_do_not_fit_are_listed_once(
    machine: FakeGpu, demo_bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The UNet's alone is of this TensorRT; the sampler step was never built."""

    def upgraded_midway(record: EngineRecord) -> EngineRecord | None:
        if record.component in ("unet", "sampler_step"):
            return record if record.component == "unet" else None
        return replace(record, target=replace(HERE, tensorrt="10.9.0"))

    made = copy_with_engines(demo_bundle, tmp_path / "b", upgraded_midway)
    with Pipeline.load(made) as pipeline:
        assert_same_pictures(pipeline(**REQUEST), on_cpu(demo_bundle))
        (record,) = caplog.records
        assert re.fullmatch(
            r"no TensorRT engine for text_encoder, vae_decoder, pixels \(was built for TensorRT 10\.9\.0 on NVIDIA "
            r".*; this is TensorRT 10\.16\.0 on NVIDIA H200 .*\); sampler_step \(none was built\); ONNX Runtime is "
            rf"used there; to build what is missing: sd-export build {made}",
            record.getMessage(),
        )
        picture = np.zeros((128, 128, 3), np.uint8)
        for _ in range(2):
            pipeline.encode_image(picture)
    assert "no TensorRT engine for vae_encoder (none was built)" in caplog.records[1].getMessage()
    assert len(caplog.records) == 2


def test_engines_for_several_machines_lie_side_by_side(machine: FakeGpu, demo_bundle: Path, tmp_path: Path) -> None:
    made = copy_with_engines(demo_bundle, tmp_path / "b")
    manifest = Bundle.open(made).manifest
    foreign = [replace(record, target=replace(HERE, gpu="NVIDIA L4")) for record in manifest.engines]
    (made / MANIFEST).write_bytes(replace(manifest, engines=(*foreign, *manifest.engines)).to_bytes())
    with Pipeline.load(made) as pipeline:
        assert isinstance(pipeline.loops.denoiser(Guidance(7.5)), DeviceDenoiser)


def test_engines_built_from_other_graphs_or_weights(
    machine: FakeGpu, demo_bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number, change in enumerate(({"graph": "0" * 64}, {"weights": "0" * 64})):
        made = copy_with_engines(demo_bundle, tmp_path / str(number), lambda r, c=change: replace(r, **c))
        Pipeline.load(made).close()
    texts = [record.getMessage() for record in caplog.records]
    assert "was built from another unet/model_trt-basic.onnx than the bundle has now" in texts[0]
    assert "was built from another unet/model.safetensors than the bundle has now" in texts[1]


def test_without_tensorrt_or_gpu_it_is_said_once(
    machine: FakeGpu, bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    Pipeline.load(bundle).close()
    (record,) = caplog.records
    assert "TensorRT does not load" in record.getMessage() and "ONNX Runtime is used instead" in record.getMessage()
    with pytest.raises(DependencyError, match="device cuda: this ONNX Runtime has no CUDA provider"):
        Pipeline.load(bundle, device="cuda")


def test_on_the_cpu_tensorrt_is_not_even_imported(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    Pipeline.load(bundle, device="cpu").close()
    assert not caplog.records


def test_fault_03_a_damaged_engine_is_not_handed_to_tensorrt(
    machine: FakeGpu, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = bundle / "engines/h200/unet-trt-basic.plan"
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(data)
    seen: list[bytes] = []
    deserialize = Runtime.deserialize_cuda_engine

    def watched(runtime: Runtime, plan: bytes) -> Any:
        seen.append(plan)
        return deserialize(runtime, plan)

    monkeypatch.setattr(Runtime, "deserialize_cuda_engine", watched)
    with pytest.raises(BundleError, match=r"engines/h200/unet-trt-basic\.plan .* is damaged"):
        Pipeline.load(bundle)
    assert seen and bytes(data) not in seen


def test_fault_09_an_engine_that_does_not_load_is_an_error_and_frees_the_gpu(
    tensorrt: FakeTensorRT, bundle: Path
) -> None:
    tensorrt.damaged = True
    with pytest.raises(EngineError, match=r"cannot load the TensorRT engine engines/h200/.*\.plan"):
        Pipeline.load(bundle)
    assert tensorrt.gpu.memory.live == 0
    assert all(stream.closed for stream in tensorrt.gpu.streams.values())
