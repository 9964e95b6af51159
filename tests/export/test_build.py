"""Building engines, driven by a fake TensorRT that parses like each version's parser and runs engines on the CPU."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from fake_builder import FakeBuilders
from fake_cuda import FakeGpu
from fake_tensorrt import FakeTensorRT
from sd_export.build import build
from sd_export.build_engine import Settings, build_engine
from sd_export.build_failures import explain
from sd_export.build_plan import FLOAT32, BuildRequest
from sd_export.cli import main
from sd_runtime.backends import TensorRTBackend
from sd_runtime.bundle import Bundle
from sd_runtime.errors import DependencyError, EngineError, ExportError
from sd_runtime.manifest import MANIFEST, Manifest, record_file
from sd_runtime.pipeline import Pipeline

SMALL = {"batches": (1,), "fallback": False}
FORMS = {"8.5.3": "trt-legacy", "10.13.3": "trt-basic", "11.4.0": "trt"}


@pytest.fixture
def bundle(demo_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the demo bundle, and a data directory of its own."""
    monkeypatch.setenv("SD_LEAN_HOME", str(tmp_path / "home"))
    shutil.copytree(demo_bundle, tmp_path / "demo")
    return tmp_path / "demo"


def only(bundle: Path, *components: str) -> None:
    """Leave only these components in the bundle, to build less."""
    manifest = manifest_of(bundle)
    kept = {name: manifest.components[name] for name in components}
    (bundle / MANIFEST).write_bytes(replace(manifest, components=kept).to_bytes())


def manifest_of(bundle: Path) -> Manifest:
    return Manifest.from_bytes((bundle / MANIFEST).read_bytes())


def machine(monkeypatch: pytest.MonkeyPatch, version: str = "11.4.0") -> FakeBuilders:
    gpu = FakeGpu().install(monkeypatch)
    return FakeBuilders(FakeTensorRT(gpu, version)).install(monkeypatch)


@pytest.mark.parametrize("version", FORMS)
def test_a_bundle_gets_engines_that_the_runtime_uses(
    version: str, bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    builders = machine(monkeypatch, version)
    build(BuildRequest(bundle, **SMALL), quiet=False)
    manifest = manifest_of(bundle)
    assert {(r.component, r.form) for r in manifest.engines} == {
        ("unet", FORMS[version]),
        ("vae_decoder", FORMS[version]),
        ("text_encoder", FORMS[version]),
        ("sampler_step", "guided"),
        ("sampler_step", "plain"),
        ("pixels", "plain"),
    }
    for record in manifest.engines:
        assert record.path.startswith(f"engines/nvidia-h200-trt{version}/") and record.path in manifest.files
        assert record.target.tensorrt == version and record.activation_memory == 4096
    assert not list(bundle.rglob("*.partial"))
    opened = Bundle.open(bundle)
    opened.verify(record.path for record in manifest.engines)
    backend = TensorRTBackend.open(opened)
    assert backend.engine("unet", "plain") is not None and backend.engine("sampler_step", "guided") is not None
    said = capsys.readouterr().err
    assert f"building 6 engines with TensorRT {version} on NVIDIA H200; each takes up to 4.0 GB of GPU memory" in said
    assert "differs by" in said and "ms a run" in said
    assert all(config.profile() for config in builders.configs)


def test_what_was_built_draws(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch)
    build(BuildRequest(bundle, **SMALL))
    request = {"prompt": "a large red star", "seed": 5, "num_inference_steps": 3}
    pictures = []
    for device in ("cuda", "cpu"):
        with Pipeline.load(bundle, device=device) as pipeline:
            pictures.append(np.asarray(pipeline(**request).images[0], int))
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


def test_version_8_is_told_what_a_typed_graph_says_itself(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """float16 by flag, float32 layer by layer, external libraries off."""
    only(bundle, "unet")
    path = bundle / "unet" / "model_trt-legacy.onnx"
    model = onnx.load(path, load_external_data=False)
    marked = [node for node in model.graph.node if node.op_type in ("Sin", "ReduceMean")]
    for node in marked:
        node.name += FLOAT32
    path.write_bytes(model.SerializeToString())
    half = replace(manifest_of(bundle), precision="fp16")
    refresh(bundle, half, "unet/model_trt-legacy.onnx")
    builders = machine(monkeypatch, "8.5.3")
    build(BuildRequest(bundle, **SMALL))
    (config,), (network,) = builders.configs, builders.networks
    assert config.flags == {"FP16", "OBEY_PRECISION_CONSTRAINTS"}
    assert config.previews["DISABLE_EXTERNAL_TACTIC_SOURCES_FOR_CORE_0805"]
    assert network.get_flag(sys.modules["tensorrt"].NetworkDefinitionCreationFlag.EXPLICIT_BATCH)
    held = [layer for layer in network.layers if getattr(layer, "precision", None) == "float32"]
    assert len(held) == len(marked) and all(layer.output_types == {0: "float32"} for layer in held)


def refresh(bundle: Path, manifest: Manifest, changed: str) -> None:
    files = {**manifest.files, changed: record_file(bundle / changed)}
    (bundle / MANIFEST).write_bytes(replace(manifest, files=files).to_bytes())


def test_later_versions_take_precision_from_the_graph(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(bundle, "unet")
    builders = machine(monkeypatch, "11.4.0")
    build(BuildRequest(bundle, refittable=True, **SMALL))
    (config,), (network,) = builders.configs, builders.networks
    assert config.flags == {"REFIT"}  # no TF32: float32 means float32
    assert network.get_flag(sys.modules["tensorrt"].NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    assert sum(layer.attention.decomposable for layer in network.layers) == 20
    assert manifest_of(bundle).engines[0].refittable


def test_kernels_are_timed_once_for_a_gpu_and_version(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(bundle, "pixels", "vae_decoder")
    builders = machine(monkeypatch)
    build(BuildRequest(bundle, **SMALL))
    (cache,) = (tmp_path / "home").rglob("timing.cache")
    assert cache.parent.name == "nvidia-h200-sm9.0-11.4.0"
    assert builders.configs[0].loaded_cache == b"" and builders.configs[1].loaded_cache == b"timed;"


def test_what_is_there_is_not_built_again(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    only(bundle, "pixels", "vae_decoder")
    builders = machine(monkeypatch)
    build(BuildRequest(bundle, **SMALL))
    before = (bundle / MANIFEST).read_bytes()
    build(BuildRequest(bundle, **SMALL))
    assert (bundle / MANIFEST).read_bytes() == before and len(builders.configs) == 2
    assert "vae_decoder 128x128 batch 1 is up to date" in capsys.readouterr().err
    build(BuildRequest(bundle, sizes=((64, 64),), **SMALL))
    shapes = [r.profile["latent_sample"].opt for r in manifest_of(bundle).engines if r.component == "vae_decoder"]
    assert shapes == [(1, 4, 16, 16), (1, 4, 8, 8)]


def test_another_precision_takes_the_place_of_the_first(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(bundle, "vae_decoder")
    builders = machine(monkeypatch)
    build(BuildRequest(bundle, sizes=((64, 64), (128, 128)), **SMALL))
    builders.built_instead = bundle / "vae_decoder" / "model.onnx"  # which the CPU can run, unlike bfloat16
    build(BuildRequest(bundle, precision="bf16", sizes=((64, 64),), **SMALL))
    (record,) = manifest_of(bundle).engines
    assert (record.precision, record.form) == ("bf16", "trt-bf16")
    assert [path.name for path in bundle.rglob("*.plan")] == ["vae_decoder-64x64-batch-1.plan"]


def test_an_interrupted_build_keeps_what_was_finished(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(bundle, "pixels", "vae_decoder")
    machine(monkeypatch)
    finished = []

    def second(label: str, *arguments: object) -> bytes:
        if finished:
            raise KeyboardInterrupt
        finished.append(label)
        return real(label, *arguments)  # type: ignore[arg-type]

    import sd_export.build as module

    real = module.build_engine
    monkeypatch.setattr(module, "build_engine", second)
    with pytest.raises(KeyboardInterrupt):
        build(BuildRequest(bundle, **SMALL))
    assert [r.component for r in manifest_of(bundle).engines] == ["vae_decoder"]
    Bundle.open(bundle)


def test_ctrl_c_stops_the_builder_itself(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT asks after each step whether to go on; an exception would be lost on its way through C++."""
    only(bundle, "pixels")
    builders = machine(monkeypatch)
    from sd_export import progress

    monkeypatch.setattr(progress.Progress, "detail", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build(BuildRequest(bundle, **SMALL))
    assert builders.configs and not manifest_of(bundle).engines


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def broken(path: Path, how: str) -> Path:
    """The decoder's graph with its result spoiled."""
    model = onnx.load(path, load_external_data=False)
    (result,) = model.graph.output
    for node in model.graph.node:
        node.output[:] = [f"{name}/right" if name == result.name else name for name in node.output]
    factor = {"nan": float("nan"), "flat": 0.0, "drift": 1.3}[how]
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(factor, np.float32), "factor"))
    model.graph.node.append(onnx.helper.make_node("Mul", [f"{result.name}/right", "factor"], [result.name]))
    spoiled = path.with_name(f"{how}.onnx")
    spoiled.write_bytes(model.SerializeToString())
    return spoiled


@pytest.mark.parametrize(
    ("how", "complaint"),
    [
        ("nan", "vae_decoder 128x128 batch 1 gives NaN or infinity in 'sample'; build again; if it persists"),
        ("flat", "gives the same number everywhere in 'sample'"),
        ("drift", r"differs from its ONNX graph in 'sample': got 3\.0e-01, accepted up to 1e-03"),
    ],
)
def test_a_wrong_engine_is_refused(how: str, complaint: str, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(bundle, "vae_decoder")
    builders = machine(monkeypatch)
    builders.built_instead = broken(bundle / "vae_decoder" / "model.onnx", how)
    with pytest.raises(ExportError, match=complaint):
        build(BuildRequest(bundle, **SMALL))
    assert not manifest_of(bundle).engines and not list(bundle.rglob("*.plan"))


def test_a_slow_build_is_reported(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    only(bundle, "vae_decoder")
    builders = machine(monkeypatch)
    builders.inspector = (
        '{"Layers": [{"LayerType": "gemm", "Name": "_gemm_mha_v2_0x1", "TacticName": "_gemm_mha_v2"},'
        ' {"LayerType": "kgen", "Name": "attentions.0/Attention/softmax", "TacticName": "__myl_MaxSubExpSum"},'
        ' "names only"]}'
    )
    half = replace(manifest_of(bundle), precision="fp16")
    (bundle / MANIFEST).write_bytes(half.to_bytes())
    monkeypatch.setattr("sd_export.build_check.milliseconds", lambda *_: 10.0)
    build(BuildRequest(bundle, **SMALL))
    said = capsys.readouterr().err
    assert "10.00 ms a run" in said and "1 attentions fused" in said and "1 attentions are not fused" in said
    monkeypatch.setattr("sd_export.build_check.milliseconds", lambda *_: 14.0)
    build(BuildRequest(bundle, refittable=True, **SMALL))
    assert "14.0 ms a run, where an earlier build took 10.0 ms: build again" in capsys.readouterr().err


def test_without_onnxruntime_engines_are_checked_for_nan_only(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    only(bundle, "vae_decoder", "pixels")
    builders = machine(monkeypatch)

    def missing(*_: object, **__: object) -> None:
        raise DependencyError("no engine library is installed")

    monkeypatch.setattr("sd_export.build.OnnxRuntimeEngine", missing)
    build(BuildRequest(bundle, **SMALL))
    said = capsys.readouterr().err
    assert said.count("engines are not compared with their graphs: no engine library is installed") == 1
    assert said.count("not compared") == 3
    builders.built_instead = broken(bundle / "vae_decoder" / "model.onnx", "nan")
    with pytest.raises(ExportError, match="NaN"):
        build(BuildRequest(bundle, refittable=True, **SMALL))


def test_a_build_failure_names_layer_and_setting(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(bundle, "vae_decoder")
    builders = machine(monkeypatch)
    builders.failure = [
        "[optimizer.cpp::computeCosts::3728] Error Code 10: Internal Error (Could not find any implementation for node "
        "{ForeignNode[decoder.mid_block.attentions.0/Transpose...decoder.mid_block.attentions.0/Add]}.)"
    ]
    with pytest.raises(ExportError) as caught:
        build(BuildRequest(bundle, **SMALL))
    said = str(caught.value)
    assert "building vae_decoder 128x128 batch 1: TensorRT has no kernel for a layer, at the layers from " in said
    assert "decoder.mid_block.attentions.0/Transpose to decoder.mid_block.attentions.0/Add" in said
    assert "--precision" in said and "\n" not in said


def test_without_a_gpu_one_line_says_so(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, "8.5.3").library.starts = False
    with pytest.raises(EngineError, match=r"^TensorRT does not start: CUDA initialization failure"):
        build(BuildRequest(bundle, **SMALL))
    settings = Settings("fp32", False, 1 << 30, bundle / "timing.cache")
    with pytest.raises(ExportError, match="the GPU's driver is missing, or too old for this TensorRT"):
        build_engine("unet", bundle / "unet" / "model_trt-legacy.onnx", {}, settings, print)


def test_a_graph_that_the_parser_does_not_take(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(bundle, "vae_decoder")
    shutil.copy(bundle / "vae_decoder" / "model.onnx", bundle / "vae_decoder" / "model_trt-legacy.onnx")
    refresh(bundle, manifest_of(bundle), "vae_decoder/model_trt-legacy.onnx")
    machine(monkeypatch, "8.6.1")
    with pytest.raises(ExportError, match="does not know an operator of the graph"):
        build(BuildRequest(bundle, **SMALL))


@pytest.mark.parametrize(
    ("message", "cause", "remedy"),
    [
        (
            "CUDA initialization failure with error: 35. Please check CUDA",
            "driver is missing, or too old",
            "update",
        ),
        ("CUDA initialization failure with error: 100", "no usable GPU", "nvidia-smi"),
        (
            "Error Code 1: Internal Error (Unsupported SM: 0x1200)",
            "does not know the GPU",
            "install a tensorrt as new as the GPU",
        ),
        (
            "Requested amount of GPU memory (12884901888 bytes) could not be allocated. There may not be enough",
            "memory ran out while building",
            "--no-fallback",
        ),
        (
            "Could not find any implementation for node /conv_in/Conv due to insufficient workspace. See verbose log",
            "scratch space is too small, at /conv_in/Conv",
            "close what else uses the GPU",
        ),
        (
            "In node 12 with name: mid_block.attentions.0/Attention and operator: Attention "
            '(checkFallbackPluginImporter): UNSUPPORTED_NODE: Assertion failed: creator && "Plugin not found"',
            "does not know an operator of the graph, at mid_block.attentions.0/Attention",
            "export the bundle again",
        ),
        (
            "[network.cpp] Error Code 4: (kOPT dimensions in profile 0 are [2,4,8] ...)",
            "range of shapes",
            "--size",
        ),
        (
            "[optimizer.cpp::computeCosts::2011] Error Code 10: Internal Error (Could not find any implementation for "
            "node ArgMax_260.)",
            "no kernel for a layer, at ArgMax_260 (",
            "--workspace",
        ),
        (
            "Skipping tactic 0 due to insuficient memory on requested size of 1170309120 detected for tactic 0.",
            "scratch space is too small (",
            "--workspace",
        ),
        ("something never seen before", "something never seen before", ""),
    ],
)
def test_what_tensorrt_says_is_translated(message: str, cause: str, remedy: str) -> None:
    error = explain("unet dynamic", [message])
    assert cause in str(error) and remedy in str(error) and str(error).startswith("building unet dynamic")


def test_the_command_line(bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    only(bundle, "vae_decoder", "pixels")
    machine(monkeypatch)
    sizes = ["--size", "64x128", "--size", "128x64"]
    assert main(["build", str(bundle), *sizes, "--batch", "1,2", "--no-fallback", "--quiet"]) == 0
    assert capsys.readouterr().out == f"{bundle}\n"
    engines = manifest_of(bundle).engines
    assert [record.component for record in engines] == ["vae_decoder", "vae_decoder", "pixels"]
    shapes = [record.profile["latent_sample"].opt for record in engines[:2]]
    assert shapes == [(1, 4, 16, 8), (1, 4, 8, 16)]  # whatever the batch: pictures are decoded one by one
    assert main(["build", str(bundle), "--size", "big"]) == 2
    assert capsys.readouterr().err == "sd-export build: size: got big, accepted WIDTHxHEIGHT, such as 512x768\n"
    assert main(["build", str(bundle), "--workspace", "0"]) == 2
    assert main(["build", "nowhere"]) == 1


@pytest.mark.parametrize("arguments", [["build", "somewhere"], ["--model", "demo", "--tensorrt"]])
def test_without_tensorrt_one_line_says_what_to_install(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At once: not after an export of minutes."""
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert main(arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith('pip install "sd-lean[tensorrt]"')


def test_building_needs_neither_torch_nor_onnx() -> None:
    """The machine that draws has only the runtime, TensorRT and polygraphy."""
    code = "import sd_export.build, sd_export.build_cli, sys; print({'torch', 'onnx', 'onnx_ir'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
