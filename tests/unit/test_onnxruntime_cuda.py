"""A whole bundle by ONNX Runtime's CUDA provider, on the fake GPU: what is queued, recorded and given back."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from bundle_with_engines import REQUEST, VERSION, assert_same_pictures, copy_with_engines, on_cpu
from fake_cuda import CUDAError, FakeGpu
from fake_onnxruntime import FakeOnnxRuntime
from fake_tensorrt import FakeTensorRT
from sd_runtime.bundle.manifest import MANIFEST, Manifest, Precision
from sd_runtime.engines.onnxruntime_.cpu import OnnxRuntimeEngine
from sd_runtime.engines.onnxruntime_.cuda import OnnxRuntimeCudaEngine
from sd_runtime.engines.tensorrt_.engine import TensorRTEngine
from sd_runtime.errors import DependencyError, EngineError, OutOfMemoryError, UsageError
from sd_runtime.loop.device import DeviceDenoiser
from sd_runtime.loop.guidance import Guidance
from sd_runtime.pipeline import Pipeline

# What ONNX Runtime 1.31 says
OUT_OF_MEMORY = (
    "Error in execution: Non-zero status code returned while running MultiHeadAttention node. Name:'down_blocks.0."
    "attentions.0.transformer_blocks.0.attn1/Attention/fused' Status Message: /onnxruntime_src/onnxruntime/core/"
    "framework/bfc_arena.cc:360 void* onnxruntime::BFCArena::AllocateRawInternal(size_t, bool, onnxruntime::Stream*) "
    "Failed to allocate memory for requested buffer of size 1075314688\n"
)
BROKEN = "CUDA failure 700: an illegal memory access was encountered ; GPU=0 ; hostname=x ; file=cuda_call.cc ; line=76"
STEP = "run next_state,next_sample,next_timestep,next_index"


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> FakeOnnxRuntime:
    return FakeOnnxRuntime(FakeGpu().install(monkeypatch)).install(monkeypatch)


@pytest.mark.parametrize(
    "changed", [{}, {"num_images_per_prompt": 3, "scheduler": "dpmpp_2m"}, {"guidance_scale": 1.0}]
)
def test_draws_on_the_gpu_what_the_cpu_draws(
    runtime: FakeOnnxRuntime, demo_bundle: Path, changed: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with Pipeline.load(demo_bundle, device="cuda") as pipeline:
        assert isinstance(pipeline.loops.denoiser(Guidance(7.5)), DeviceDenoiser)
        result = pipeline(**(REQUEST | changed))
    assert result.decoded is not None and result.decoded.pixels is not None
    assert_same_pictures(result, on_cpu(demo_bundle, **changed))
    assert not caplog.records


def test_an_evaluation_is_one_graph_launch_and_one_copy(runtime: FakeOnnxRuntime, demo_bundle: Path) -> None:
    """Network and sampler step are one recording, and nothing goes up in between."""
    request = REQUEST | {"scheduler": "ddim"}
    with Pipeline.load(demo_bundle, device="cuda") as pipeline:
        for _ in range(2):  # copies go through two buffers in turn
            pipeline(**request)
        before = dict(runtime.gpu.memory.allocations)
        runtime.gpu.log.clear()
        pipeline(**request)
        log = [entry for entry in runtime.gpu.log if entry != "free"]
        assert runtime.gpu.memory.allocations == before
    evaluation = ["graph", "run out_sample", STEP, "copy"]
    start = log.index("graph")
    assert log[start : start + 6 * len(evaluation)] == evaluation * 6
    assert log[start + 6 * len(evaluation) :] == ["copy", "graph", "run sample", "run pixels", "copy", "copy"]


def test_a_graph_that_cannot_be_recorded_is_run_as_it_is(
    runtime: FakeOnnxRuntime, demo_bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As one would be that copies between GPU and host and waits for it."""

    def refused(*given: Any) -> None:
        raise CUDAError("CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED: operation not permitted when stream is capturing")

    monkeypatch.setattr("sd_runtime.engines.gpu.gpu.capture", refused)
    with Pipeline.load(demo_bundle, device="cuda") as pipeline:
        assert_same_pictures(pipeline(**REQUEST), on_cpu(demo_bundle))
    assert "the GPU is fed step by step instead, which is slower" in caplog.records[0].getMessage()


@pytest.mark.parametrize(("precision", "networks"), [("fp32", "0"), ("fp16", "1")])
def test_tensor_cores_are_for_float16_networks(
    runtime: FakeOnnxRuntime, demo_bundle: Path, tmp_path: Path, precision: Precision, networks: str
) -> None:
    """Without use_tf32 even float16 convolutions are refused them; the sampler step stays float32 in any case."""
    bundle = tmp_path / precision
    shutil.copytree(demo_bundle, bundle)
    manifest = Manifest.from_bytes((bundle / MANIFEST).read_bytes())
    (bundle / MANIFEST).write_bytes(replace(manifest, precision=precision).to_bytes())
    with Pipeline.load(bundle, device="cuda") as pipeline:
        pipeline(**REQUEST | {"num_inference_steps": 1})
    expected = dict.fromkeys(("last_hidden_state", "out_sample", "sample"), networks)
    assert runtime.tf32 == expected | {"next_state": "0", "pixels": "0"}


def test_guidance_rescale_runs_on_the_host_over_the_same_sessions(runtime: FakeOnnxRuntime, demo_bundle: Path) -> None:
    """The embeddings are copied to the GPU once, not in every step."""
    changed = {"guidance_rescale": 0.7}
    with Pipeline.load(demo_bundle, device="cuda") as pipeline:
        assert_same_pictures(pipeline(**REQUEST, **changed), on_cpu(demo_bundle, **changed))
    assert runtime.gpu.log.count("run out_sample") == 6
    assert "graph" not in runtime.gpu.log[: runtime.gpu.log.index("run sample")]


def test_image_to_image(runtime: FakeOnnxRuntime, demo_bundle: Path) -> None:
    picture = on_cpu(demo_bundle).images[0]
    changed = {"image": picture, "strength": 0.5, "seed": 8}
    with Pipeline.load(demo_bundle, device="cuda") as pipeline:
        result = pipeline(**(REQUEST | changed))
    with Pipeline.load(demo_bundle, device="cpu") as pipeline:
        assert_same_pictures(result, pipeline(**(REQUEST | changed)))


def test_closing_the_pipeline_frees_the_gpu(runtime: FakeOnnxRuntime, demo_bundle: Path) -> None:
    with Pipeline.load(demo_bundle, device="cuda") as pipeline:
        pipeline(**REQUEST)
        assert runtime.sessions >= 5
    assert runtime.sessions == 0
    assert runtime.gpu.memory.live == 0


def test_fault_52_closed_while_it_draws(runtime: FakeOnnxRuntime, demo_bundle: Path) -> None:
    """Nothing more begins on the GPU, and what a request under way still has goes when it ends."""
    for rescale in (0.0, 0.7):  # the device leads the loop, then the host
        pipeline = Pipeline.load(demo_bundle, device="cuda")
        generation = pipeline.start(pipeline(**REQUEST, guidance_rescale=rescale).request)
        next(generation)
        pipeline.close()
        with pytest.raises(EngineError, match=r"the (GPU|pipeline) was closed"):
            list(generation)
        with pytest.raises(EngineError, match="the pipeline was closed"):
            generation.result()
        del generation, pipeline
        assert runtime.gpu.memory.live == 0


def test_fault_22_out_of_memory(runtime: FakeOnnxRuntime, demo_bundle: Path) -> None:
    def full(what: str) -> None:
        if what == "run out_sample":
            raise RuntimeError(OUT_OF_MEMORY)

    with Pipeline.load(demo_bundle, device="cuda") as pipeline:
        runtime.gpu.fail = full
        with pytest.raises(
            OutOfMemoryError,
            match=r"GPU memory ran out \(Failed to allocate memory for requested buffer",
        ):
            pipeline(**REQUEST)
        runtime.gpu.fail = lambda what: None
        assert_same_pictures(pipeline(**REQUEST), on_cpu(demo_bundle))


def test_fault_25_after_an_error_that_stays_nothing_is_tried(runtime: FakeOnnxRuntime, demo_bundle: Path) -> None:
    def broken(what: str) -> None:
        if what == "run out_sample":
            raise RuntimeError(BROKEN)

    with Pipeline.load(demo_bundle, device="cuda") as pipeline:
        runtime.gpu.fail = broken
        with pytest.raises(EngineError, match="an illegal memory access was encountered"):
            pipeline(**REQUEST)
        runtime.gpu.fail = lambda what: None
        with pytest.raises(EngineError, match=r"the GPU is unusable since: .*; restart the process"):
            pipeline(**REQUEST)


def test_engines_of_both_libraries_share_the_loop(
    runtime: FakeOnnxRuntime, demo_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT has an engine for the UNet only; one recording holds it and ONNX Runtime's sampler step."""
    FakeTensorRT(runtime.gpu, VERSION).install(monkeypatch)
    bundle = copy_with_engines(demo_bundle, tmp_path / "bundle", lambda r: r if r.component == "unet" else None)
    with Pipeline.load(bundle) as pipeline:
        result = pipeline(**REQUEST)
        kinds = [type(pipeline.engines.engine(name)) for name in ("unet", "vae_decoder", "pixels")]
    assert kinds == [TensorRTEngine, OnnxRuntimeCudaEngine, OnnxRuntimeCudaEngine]
    place = runtime.gpu.log.index("graph")
    assert runtime.gpu.log[place : place + 3] == ["graph", "enqueue out_sample", STEP]
    assert_same_pictures(result, on_cpu(demo_bundle))


# ---- machines that lack something ------------------------------------------------------------------------------------


def test_no_gpu(
    runtime: FakeOnnxRuntime, demo_bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A build for GPUs on a machine without one."""

    def no_driver(*given: object) -> None:
        raise RuntimeError("CUDA_ERROR_NO_DEVICE: no CUDA-capable device is detected")

    monkeypatch.setattr("cuda.core.Device", no_driver)
    with Pipeline.load(demo_bundle) as pipeline:
        assert isinstance(pipeline.engines.engine("unet"), OnnxRuntimeEngine) and pipeline.engines.on_cpu
    assert caplog.records[0].getMessage().startswith("no usable NVIDIA GPU: CUDA_ERROR_NO_DEVICE")
    assert caplog.records[0].getMessage().endswith("the CPU is used instead")
    with pytest.raises(EngineError, match="no usable NVIDIA GPU"):
        Pipeline.load(demo_bundle, device="cuda")


def test_no_cuda_provider(demo_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with Pipeline.load(demo_bundle) as pipeline:
        assert pipeline.engines.on_cpu
    with pytest.raises(DependencyError, match=r"no CUDA provider.*sd-lean\[gpu\]"):
        Pipeline.load(demo_bundle, device="cuda")


def test_cuda_libraries_that_do_not_load(
    runtime: FakeOnnxRuntime, demo_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No other graph is tried, and the CPU is not taken in silence."""
    runtime.loads = False
    with pytest.raises(DependencyError, match=r"cannot use CUDA and cuDNN here .*sd-lean\[gpu\]"):
        Pipeline.load(demo_bundle)
    assert runtime.gpu.memory.live == 0 and not caplog.records


def test_no_cudnn(runtime: FakeOnnxRuntime, demo_bundle: Path) -> None:
    runtime.no_cudnn = True
    with pytest.raises(
        DependencyError, match=r"here \(.*cuDNN is unavailable or disabled .* libcudnn\.so: cannot open"
    ):
        Pipeline.load(demo_bundle, device="cuda")


def test_unknown_device(demo_bundle: Path) -> None:
    with pytest.raises(UsageError, match="device: got tpu, accepted auto, cpu, cuda"):
        Pipeline.load(demo_bundle, device="tpu")


def test_inputs_are_checked_before_the_gpu_sees_them(runtime: FakeOnnxRuntime, demo_bundle: Path) -> None:
    with Pipeline.load(demo_bundle, device="cuda") as pipeline:
        engine = pipeline.engines.engine("unet")
        with pytest.raises(EngineError, match="input 'sample'"):
            engine.place("sample", np.zeros((2, 4, 16, 16)))
        with pytest.raises(
            EngineError, match="engine inputs: got sample, accepted sample, timestep, encoder_hidden_states"
        ):
            engine.run({"sample": np.zeros((2, 4, 16, 16), np.float32)})
