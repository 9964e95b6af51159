"""A whole bundle with TensorRT engines on the fake GPU: chosen where they fit, replaced aloud where they do not."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from fake_cuda import FakeGpu
from fake_tensorrt import FakeTensorRT, Runtime, fake_plan
from sd_runtime.bundle import Bundle
from sd_runtime.denoise import Guidance
from sd_runtime.device_loop import DeviceDenoiser
from sd_runtime.engines.cuda import WARM_UP_RUNS
from sd_runtime.errors import BundleError, DependencyError, EngineError, NumericalError
from sd_runtime.manifest import MANIFEST, ComponentName, EngineRecord, Target, record_file
from sd_runtime.pipeline import Pipeline
from sd_runtime.result import Result
from tensorrt_rig import whole_range

VERSION = "10.16.0"
HERE = Target("NVIDIA H200", "9.0", VERSION, "13.0", "580.65.6")
BUILT = ("text_encoder", "unet", "vae_decoder", "sampler_step", "pixels")
REQUEST: dict[str, Any] = {
    "prompt": "a large red star on a blue background",
    "seed": 5,
    "num_inference_steps": 6,
    "scheduler": "euler_a",
}


def copy_with_engines(
    source: Path, target: Path, change: Callable[[EngineRecord], EngineRecord | None] = lambda record: record
) -> Path:
    """A copy of a bundle with an engine for every network and loop graph; `change` edits their entries."""
    for path in source.rglob("*"):
        if path.is_file():
            (target / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / path.relative_to(source))
    manifest = Bundle.open(source).manifest
    records, files = [], dict(manifest.files)
    for name in BUILT:
        component = manifest.components[name]
        for form in ("trt",) if "trt" in component.graphs else tuple(component.graphs):
            graph, path = component.graphs[form], f"engines/h200/{name}-{form}.plan"
            profile = whole_range(graph.inputs)
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            (target / path).write_bytes(fake_plan(target / graph.path, profile, tensorrt=VERSION))
            weights = None if component.weights is None else files[component.weights].digest
            digest = files[graph.path].digest
            record = EngineRecord(
                cast(ComponentName, name), form, path, "fp32", profile, HERE, digest, weights, False, 4096
            )
            changed = change(record)
            records += [] if changed is None else [changed]
            files[path] = record_file(target / path)
    (target / MANIFEST).write_bytes(replace(manifest, engines=tuple(records), files=files).to_bytes())
    return target


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    return FakeTensorRT(FakeGpu().install(monkeypatch), VERSION).install(monkeypatch)


@pytest.fixture
def machine(tensorrt: FakeTensorRT) -> FakeGpu:
    return tensorrt.gpu


@pytest.fixture
def bundle(demo_bundle: Path, tmp_path: Path) -> Path:
    return copy_with_engines(demo_bundle, tmp_path / "bundle")


@cache
def on_cpu(bundle: Path, **changed: Any) -> Result:
    with Pipeline.load(bundle, device="cpu") as pipeline:
        return pipeline(**(REQUEST | changed))


def assert_same_pictures(result: Result, expected: Result) -> None:
    assert np.abs(result.latents - expected.latents).max() < 1e-3
    for picture, other in zip(result.images, expected.images, strict=True):
        assert np.abs(np.asarray(picture, int) - np.asarray(other, int)).max() <= 1


# ---- engines that fit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed", [{}, {"num_images_per_prompt": 3, "scheduler": "dpmpp_2m"}, {"guidance_scale": 1.0}]
)
def test_draws_on_the_gpu_what_the_cpu_draws(
    machine: FakeGpu, bundle: Path, demo_bundle: Path, changed: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with Pipeline.load(bundle, device="cuda") as pipeline:
        assert isinstance(pipeline.components.denoiser(Guidance(7.5)), DeviceDenoiser)
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
        assert not isinstance(pipeline.components.denoiser(Guidance(7.5)), DeviceDenoiser)
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
        latents = np.full((2, 4, 16, 16), np.nan, np.float32)
        with pytest.raises(NumericalError, match="VAE decoder output of picture 1: got NaN or infinity"):
            pipeline.decode_latents(latents)
        assert np.isfinite(pipeline.decode_latents(np.zeros_like(latents))).all()


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
    assert __import__("re").search(message + ".*" + rest, record.getMessage())


def test_engines_for_several_machines_lie_side_by_side(machine: FakeGpu, demo_bundle: Path, tmp_path: Path) -> None:
    made = copy_with_engines(demo_bundle, tmp_path / "b")
    manifest = Bundle.open(made).manifest
    foreign = [replace(record, target=replace(HERE, gpu="NVIDIA L4")) for record in manifest.engines]
    (made / MANIFEST).write_bytes(replace(manifest, engines=(*foreign, *manifest.engines)).to_bytes())
    with Pipeline.load(made) as pipeline:
        assert isinstance(pipeline.components.denoiser(Guidance(7.5)), DeviceDenoiser)


def test_engines_built_from_other_graphs_or_weights(
    machine: FakeGpu, demo_bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number, change in enumerate(({"graph": "0" * 64}, {"weights": "0" * 64})):
        made = copy_with_engines(demo_bundle, tmp_path / str(number), lambda r, c=change: replace(r, **c))
        Pipeline.load(made).close()
    texts = [record.getMessage() for record in caplog.records]
    assert "was built from another unet/model_trt.onnx than the bundle has now" in texts[0]
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
    path = bundle / "engines/h200/unet-trt.plan"
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(data)
    seen: list[bytes] = []
    deserialize = Runtime.deserialize_cuda_engine

    def watched(runtime: Runtime, plan: bytes) -> Any:
        seen.append(plan)
        return deserialize(runtime, plan)

    monkeypatch.setattr(Runtime, "deserialize_cuda_engine", watched)
    with pytest.raises(BundleError, match=r"engines/h200/unet-trt\.plan .* is damaged"):
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
