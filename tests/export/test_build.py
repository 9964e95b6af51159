"""Building engines, driven by a fake TensorRT that parses like each version's parser and runs engines on the CPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import fake_builder
import numpy as np
import onnx
import pytest
from fake_builder import FakeBuilders
from fake_cuda import FakeGpu
from fake_tensorrt import FakeTensorRT
from sd_export.cli import main
from sd_export.graphs.names import FLOAT32
from sd_export.pack import write_synced
from sd_export.tensorrt_ import build as module
from sd_export.tensorrt_ import check as build_check
from sd_export.tensorrt_ import local
from sd_export.tensorrt_ import publish as build_publish
from sd_export.tensorrt_.build import build
from sd_export.tensorrt_.engine import Tuning, build_engine
from sd_export.tensorrt_.failures import explain
from sd_export.tensorrt_.plan import BuildOptions, plan_builds
from sd_runtime.bundle.bundle import Bundle
from sd_runtime.bundle.manifest import MANIFEST, Manifest, record_file
from sd_runtime.engines.backend import Machine
from sd_runtime.engines.onnxruntime_.cpu import OnnxRuntimeEngine
from sd_runtime.engines.tensorrt_.selection import TensorRTBackend
from sd_runtime.errors import DependencyError, EngineError, ExportError, OutOfMemoryError
from sd_runtime.pipeline import Pipeline
from sd_runtime.tensor import Array

SMALL = {"batches": (1,), "fallback": False}
FORMS = {"8.5.3": "trt-legacy", "10.13.3": "trt-basic", "11.4.0": "trt-basic"}


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
    build(BuildOptions(bundle, **SMALL), quiet=False)
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
    backend = TensorRTBackend.open(opened, Machine())
    for component, form in (("unet", "plain"), ("sampler_step", "guided")):
        assert backend.engine(component, form, pytest.fail) is not None
    said = capsys.readouterr().err
    assert f"building 6 engines with TensorRT {version} on NVIDIA H200; each takes up to 29.8 MB of GPU memory" in said
    assert "and what its layers use as scratch space" in said
    assert "differs by" in said and "ms a run" in said
    assert all(config.profile() for config in builders.configs)


def test_what_was_built_draws(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch)
    build(BuildOptions(bundle, **SMALL))
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
    build(BuildOptions(bundle, **SMALL))
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
    """And take attention apart where a graph leaves it whole, as the plain one does."""
    only(bundle, "unet")
    shutil.copy(bundle / "unet" / "model.onnx", bundle / "unet" / "model_trt-basic.onnx")
    refresh(bundle, manifest_of(bundle), "unet/model_trt-basic.onnx")
    builders = machine(monkeypatch, "11.4.0")
    build(BuildOptions(bundle, **SMALL))
    (config,), (network,) = builders.configs, builders.networks
    assert config.flags == set()  # no TF32: float32 means float32
    assert network.get_flag(sys.modules["tensorrt"].NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    assert sum(layer.attention.decomposable for layer in network.layers) == 20


def test_weights_are_exchangeable_one_by_one(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of products and convolutions: where biases are, too, an engine can lose one.  A graph without weights is
    built as ever."""
    only(bundle, "vae_decoder", "pixels")
    builders = machine(monkeypatch, "10.13.3")
    build(BuildOptions(bundle, refittable=True, **SMALL))
    assert [config.flags for config in builders.configs] == [{"REFIT_INDIVIDUAL"}, set()]
    decoder, pixels = builders.networks
    tensors = Bundle.open(bundle).tensors("vae_decoder/model.safetensors")
    assert decoder.exchangeable == {name for name, array in tensors.items() if array.ndim > 1} != set(tensors)
    assert not pixels.exchangeable
    assert all(record.refittable for record in manifest_of(bundle).engines)


@pytest.mark.parametrize("version", ["8.5.3", "10.1.0"])
def test_a_version_that_exchanges_all_weights_or_none_is_refused(
    version: str, bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    builders = machine(monkeypatch, version)
    assert main(["build", str(bundle), "--refittable"]) == 2
    assert capsys.readouterr().err == (
        f"sd-export build: refittable: got TensorRT {version}, whose refittable engines are slower and can lose "
        "biases, accepted 10.2 or newer; leave it out, or install a newer one\n"
    )
    assert not builders.configs and not manifest_of(bundle).engines


def test_weights_that_the_parser_calls_otherwise_are_no_silent_loss(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(bundle, "vae_decoder")
    machine(monkeypatch)
    monkeypatch.setattr(fake_builder.Network, "mark_weights_refittable", lambda *_: False)
    with pytest.raises(ExportError, match=r"finds none of the weights that are to be exchangeable; leave out"):
        build(BuildOptions(bundle, refittable=True, **SMALL))
    assert not manifest_of(bundle).engines


NO_KERNEL = "Could not find any implementation for node mid_block.attentions.0/Softmax."


def without_kernels(builders: FakeBuilders, monkeypatch: pytest.MonkeyPatch, *forms: str) -> list[str]:
    """The builder has no kernels for these forms of graphs; gives the graphs that are built, as they are asked for."""
    asked: list[str] = []
    build_one = fake_builder.Builder.build_serialized_network

    def choose(builder: Any, network: Any, config: Any) -> Any:
        asked.append(network.path.name)
        builders.failure = [NO_KERNEL] * (network.path.stem.partition("_")[2] in forms)
        return build_one(builder, network, config)

    monkeypatch.setattr(fake_builder.Builder, "build_serialized_network", choose)
    return asked


def test_without_a_kernel_for_one_form_the_other_is_built(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is said, it draws, and the next build leaves it as it is."""
    only(bundle, "vae_decoder", "pixels")
    builders = machine(monkeypatch)
    asked = without_kernels(builders, monkeypatch, "trt-basic")
    build(BuildOptions(bundle, sizes=((64, 64), (128, 128)), **SMALL), quiet=False)
    said = capsys.readouterr().err
    assert "has no kernel for a layer, at mid_block.attentions.0/Softmax" in said
    assert said.count("; its graph trt-legacy is built instead") == 2 and "left out" not in said
    decoders = [record for record in manifest_of(bundle).engines if record.component == "vae_decoder"]
    assert [(record.form, record.checked) for record in decoders] == [("trt-legacy", "compared")] * 2
    assert len(asked) == 5
    build(BuildOptions(bundle, sizes=((64, 64), (128, 128)), **SMALL))
    assert len(asked) == 5 and capsys.readouterr().err.count("is up to date") == 3


def test_engines_of_two_forms_serve_one_network(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One size needed the other form: neither takes the other's place, and the runtime uses both."""
    only(bundle, "unet")
    builders = machine(monkeypatch)
    build(BuildOptions(bundle, sizes=((128, 128),), **SMALL))
    without_kernels(builders, monkeypatch, "trt-basic")
    build(BuildOptions(bundle, sizes=((64, 64),), **SMALL))
    assert [record.form for record in manifest_of(bundle).engines] == ["trt-basic", "trt-legacy"]
    backend = TensorRTBackend.open(Bundle.open(bundle), Machine())
    assert [record.form for record in backend.records("unet", "plain")] == ["trt-basic", "trt-legacy"]
    engine = backend.engine("unet", "plain", pytest.fail)
    assert engine is not None
    for cells in (16, 8):
        feeds = {spec.name: np.zeros(feed_shape(spec.name, cells), np.float32) for spec in engine.inputs}
        assert engine.run(feeds)["out_sample"].shape == (2, 4, cells, cells)


def feed_shape(name: str, cells: int) -> tuple[int, ...]:
    return {"sample": (2, 4, cells, cells), "timestep": (2,), "encoder_hidden_states": (2, 77, 64)}[name]


def test_without_a_kernel_for_either_form_the_last_reason_is_given(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(bundle, "vae_decoder")
    asked = without_kernels(machine(monkeypatch), monkeypatch, "trt-basic", "trt-legacy")
    with pytest.raises(ExportError, match="has no kernel for a layer"):
        build(BuildOptions(bundle, **SMALL))
    assert asked == ["model_trt-basic.onnx", "model_trt-legacy.onnx"]


def test_a_version_with_one_form_has_no_other(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(bundle, "vae_decoder")
    asked = without_kernels(machine(monkeypatch, "8.5.3"), monkeypatch, "trt-legacy")
    with pytest.raises(ExportError, match="has no kernel for a layer"):
        build(BuildOptions(bundle, **SMALL))
    assert asked == ["model_trt-legacy.onnx"]


def test_kernels_are_timed_once_for_a_gpu_and_version(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(bundle, "pixels", "vae_decoder")
    builders = machine(monkeypatch)
    build(BuildOptions(bundle, **SMALL))
    (cache,) = (tmp_path / "home").rglob("timing.cache")
    assert cache.parent.name == "nvidia-h200-sm9.0-11.4.0"
    assert builders.configs[0].loaded_cache == b"" and builders.configs[1].loaded_cache == b"timed;"


def test_what_is_there_is_not_built_again(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    only(bundle, "pixels", "vae_decoder")
    builders = machine(monkeypatch)
    build(BuildOptions(bundle, **SMALL))
    before = (bundle / MANIFEST).read_bytes()
    build(BuildOptions(bundle, **SMALL))
    assert (bundle / MANIFEST).read_bytes() == before and len(builders.configs) == 2
    assert "vae_decoder 128x128 batch 1 is up to date" in capsys.readouterr().err
    build(BuildOptions(bundle, sizes=((64, 64),), **SMALL))
    shapes = [r.profile["latent_sample"].opt for r in manifest_of(bundle).engines if r.component == "vae_decoder"]
    assert shapes == [(1, 4, 16, 16), (1, 4, 8, 8)]


def test_another_precision_takes_the_place_of_the_first(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(bundle, "vae_decoder")
    builders = machine(monkeypatch)
    build(BuildOptions(bundle, sizes=((64, 64), (128, 128)), **SMALL))
    builders.built_instead = bundle / "vae_decoder" / "model.onnx"  # which the CPU can run, unlike bfloat16
    build(BuildOptions(bundle, precision="bf16", sizes=((64, 64),), **SMALL))
    (record,) = manifest_of(bundle).engines
    assert (record.precision, record.form) == ("bf16", "trt-bf16")
    assert [path.name.split(".")[0] for path in bundle.rglob("*.plan")] == ["vae_decoder-64x64-batch-1"]


def test_an_interrupted_build_keeps_what_was_finished(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(bundle, "pixels", "vae_decoder")
    machine(monkeypatch)
    finished = []

    def second(label: str, *arguments: object) -> bytes:
        if finished:
            raise KeyboardInterrupt
        finished.append(label)
        return real(label, *arguments)  # type: ignore[arg-type]

    real = local.build_engine
    monkeypatch.setattr(local, "build_engine", second)
    with pytest.raises(KeyboardInterrupt):
        build(BuildOptions(bundle, **SMALL))
    assert [r.component for r in manifest_of(bundle).engines] == ["vae_decoder"]
    Bundle.open(bundle)


@pytest.mark.parametrize("killed_at", ["manifest.json", "unlink"])
def test_fault_15_killed_while_an_engine_is_replaced(
    killed_at: str, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every moment all that the manifest names is there, as it was hashed; what is left over goes next time."""
    only(bundle, "vae_decoder")
    builders = machine(monkeypatch)
    build(BuildOptions(bundle, **SMALL))
    (before,) = manifest_of(bundle).engines
    builders.built_instead = broken(bundle / "vae_decoder" / "model.onnx", "other")
    with monkeypatch.context() as dying:
        if killed_at == "unlink":
            dying.setattr(build_publish, "remove_unnamed", interrupt)
            dying.setattr(module, "remove_unnamed", lambda *_: None)
        else:
            write = build_publish.write_synced
            kill = lambda path, data: interrupt() if path.name == killed_at else write(path, data)  # noqa: E731
            dying.setattr(build_publish, "write_synced", kill)
        with pytest.raises(KeyboardInterrupt):
            build(BuildOptions(bundle, **SMALL), force=True)
    opened = Bundle.open(bundle)
    (record,) = opened.manifest.engines
    opened.verify([record.path])
    assert len(list(bundle.rglob("*.plan"))) == 2 and (record == before) == (killed_at == "manifest.json")
    build(BuildOptions(bundle, **SMALL))
    assert [path.relative_to(bundle).as_posix() for path in bundle.rglob("*.plan")] == [record.path]


def test_what_is_published_is_on_the_disk_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []

    def fsync(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)

    monkeypatch.setattr(os, "fsync", fsync)
    write_synced(tmp_path / "engines" / "gpu" / "unet.plan", b"engine")
    assert synced == [".unet.plan.partial", "gpu", "engines", tmp_path.name]


def test_ctrl_c_stops_the_builder_itself(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT asks after each step whether to go on; an exception in any call from C++ would end the process."""
    only(bundle, "pixels")
    builders = machine(monkeypatch)
    from sd_export import progress

    monkeypatch.setattr(progress.Progress, "detail", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build(BuildOptions(bundle, **SMALL))
    assert builders.configs and not manifest_of(bundle).engines


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


SPOILT = {"nan": float("nan"), "flat": 0.0, "red": 0.0, "drift": 1.3, "other": 1.0}  # factors of the result
SPOILT_IF = {  # … where a measure of the input is beyond a limit; noise of deviation 1 does not reach 6
    "hot": ("ReduceMax", "Greater", 6.0, float("nan")),
    "large": ("Size", "Greater", 4.0 * 16 * 16, float("nan")),
    "small": ("Size", "Less", 4.0 * 16 * 16, 1.3),
}
RED = np.reshape([0.9, -0.8, -0.8], (1, 3, 1, 1))


def broken(path: Path, how: str) -> Path:
    """The decoder's graph with its result spoiled: result · factor + colour."""
    model = onnx.load(path, load_external_data=False)
    (source,), (result,) = model.graph.input, model.graph.output
    for node in model.graph.node:
        node.output[:] = [f"{name}/right" if name == result.name else name for name in node.output]
    measure, beyond, limit, wrong = SPOILT_IF.get(how, ("Size", "Greater", 0.0, SPOILT.get(how)))
    numbers = {"limit": limit, "wrong": wrong, "one": 1.0, "colour": RED if how == "red" else 0.0}
    for name, value in numbers.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(value, np.float32), name))
    model.graph.node.extend(
        [
            onnx.helper.make_node(measure, [source.name], ["measure"], **({"keepdims": 0} if how == "hot" else {})),
            onnx.helper.make_node("Cast", ["measure"], ["measured"], to=onnx.TensorProto.FLOAT),
            onnx.helper.make_node(beyond, ["measured", "limit"], ["spoilt"]),
            onnx.helper.make_node("Where", ["spoilt", "wrong", "one"], ["factor"]),
            onnx.helper.make_node("Mul", [f"{result.name}/right", "factor"], ["scaled"]),
            onnx.helper.make_node("Add", ["scaled", "colour"], [result.name]),
        ]
    )
    spoiled = path.with_name(f"{how}.onnx")
    spoiled.write_bytes(model.SerializeToString())
    return spoiled


@pytest.mark.parametrize(
    ("how", "complaint"),
    [
        ("nan", "vae_decoder 128x128 batch 1 gives NaN or infinity in 'sample'; build again; if it persists"),
        ("flat", "gives the same number everywhere in 'sample'"),
        ("red", "gives the same number everywhere in 'sample'"),
        ("hot", "gives NaN or infinity in 'sample'"),
        ("drift", r"differs from its ONNX graph in 'sample': got 3\.0e-01, accepted up to 1e-03"),
    ],
)
def test_a_wrong_engine_is_refused(how: str, complaint: str, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(bundle, "vae_decoder")
    builders = machine(monkeypatch)
    builders.built_instead = broken(bundle / "vae_decoder" / "model.onnx", how)
    with pytest.raises(ExportError, match=complaint):
        build(BuildOptions(bundle, **SMALL))
    assert not manifest_of(bundle).engines and not list(bundle.rglob("*.plan"))


@pytest.mark.parametrize(
    ("how", "complaint"),
    [
        ("large", "vae_decoder dynamic gives NaN or infinity in 'sample' at its largest shapes"),
        ("small", r"differs from its ONNX graph in 'sample' at its smallest shapes: got 3\.0e-01"),
    ],
)
def test_a_dynamic_engine_is_tried_at_the_ends_of_its_range(
    how: str,
    complaint: str,
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A wrong one is left out, aloud; the exact one is enough for the command to succeed."""
    only(bundle, "vae_decoder")
    monkeypatch.setattr("sd_export.tensorrt_.plan.FALLBACK_PIXELS", (64, 192))
    builders = machine(monkeypatch)
    builders.built_instead = broken(bundle / "vae_decoder" / "model.onnx", how)
    build(BuildOptions(bundle))
    assert re.search(f"vae_decoder dynamic is left out: .*{complaint}", capsys.readouterr().err)
    assert [record.path.split("/")[-1].split(".")[0] for record in manifest_of(bundle).engines] == [
        "vae_decoder-128x128-batch-1"
    ]


def test_what_is_too_large_for_the_gpu_is_told(bundle: Path) -> None:
    (planned,) = (
        planned
        for planned in plan_builds(manifest_of(bundle), BuildOptions(bundle), "11.4.0")
        if planned.label == "unet dynamic"
    )

    def engine(inputs: dict[str, Array]) -> dict[str, Array]:
        if inputs["sample"].shape == planned.profile["sample"].max:
            raise OutOfMemoryError("out of memory")
        return {"out_sample": inputs["sample"]}

    found = build_check.check(planned, engine, engine, 1.0, cheap=False)
    assert found.error == 0 and found.remarks == (
        "not tried at its largest shapes: the GPU's memory is too small for them",
    )


class Watched(OnnxRuntimeEngine):
    """A reference, and those that are open."""

    opened: ClassVar[list[dict[str, object]]] = []
    shapes: ClassVar[list[tuple[int, ...]]] = []
    alive = 0

    def __init__(self, *arguments: Any, **options: Any) -> None:
        assert Watched.alive == 0, "two references at once"
        super().__init__(*arguments, **options)
        Watched.alive += 1
        Watched.opened.append({"weights": arguments[0].weights.path, **options})

    def run(self, feeds: Any) -> dict[str, Array]:
        Watched.shapes.append(next(iter(feeds.values())).shape)
        return super().run(feeds)

    def close(self) -> None:
        super().close()
        Watched.alive -= 1


def test_references_are_opened_as_the_runtime_does_and_one_at_a_time(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the weights' file, gigabytes are copied; a whole batch's attentions fill as many; so do large shapes."""
    only(bundle, "unet", "vae_decoder")
    (bundle / MANIFEST).write_bytes(replace(manifest_of(bundle), precision="fp16").to_bytes())
    monkeypatch.setattr("sd_export.tensorrt_.plan.FALLBACK_PIXELS", (64, 192))
    machine(monkeypatch)
    monkeypatch.setattr("sd_runtime.engines.onnxruntime_.backend.OnnxRuntimeEngine", Watched)
    Watched.opened.clear()
    Watched.shapes.clear()
    build(BuildOptions(bundle))
    paths = [bundle / name / "model.safetensors" for name in ("unet", "vae_decoder")]
    assert (
        Watched.opened == [{"weights": path, "float16": True, "threads": None} for path in paths * 2]
        and not Watched.alive
    )
    row, small = (1, 4, 16, 16), (1, 4, 8, 8)
    assert Watched.shapes == [row] * 4 + [row, row, small] + [row, row, small, small]


def sluggish(monkeypatch: pytest.MonkeyPatch, *times: float) -> None:
    """How long the next engines take, in milliseconds."""
    left = list(times)
    monkeypatch.setattr("sd_export.tensorrt_.check.milliseconds", lambda *_: left.pop(0))


def half_unet(bundle: Path) -> None:
    only(bundle, "unet")
    (bundle / MANIFEST).write_bytes(replace(manifest_of(bundle), precision="fp16").to_bytes())


INSPECTED = (
    '{"Layers": [{"LayerType": "gemm", "Name": "_gemm_mha_v2_0x1", "TacticName": "_gemm_mha_v2"},'
    ' {"LayerType": "kgen", "Name": "attentions.0/Attention/softmax", "TacticName": "__myl_MaxSubExpSum"},'
    ' "names only"]}'
)


def test_a_slow_build_is_reported(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    half_unet(bundle)
    builders = machine(monkeypatch)
    builders.inspector = INSPECTED
    sluggish(monkeypatch, 10.0, 14.0, 14.0, 14.0)
    build(BuildOptions(bundle, **SMALL))
    said = capsys.readouterr().err
    assert "10.00 ms a run" in said and "1 attentions fused" in said and "1 attentions are not fused" in said
    build(BuildOptions(bundle, **SMALL), force=True)
    assert "14.0 ms a run, where an earlier build took 10.0 ms: build it anew with --force" in capsys.readouterr().err
    build(BuildOptions(bundle, refittable=True, **SMALL))
    assert "earlier build" not in capsys.readouterr().err  # as expected of a refittable one
    manifest = manifest_of(bundle)
    weights = bundle / "unet" / "model.safetensors"
    weights.write_bytes(weights.read_bytes() + b"\0")
    refresh(bundle, manifest, "unet/model.safetensors")
    monkeypatch.setattr(build_check, "check", lambda *_, **__: build_check.Findings(None, ()))
    build(BuildOptions(bundle, **SMALL))
    assert "earlier build" not in capsys.readouterr().err  # other weights


@pytest.mark.parametrize("version", FORMS)
@pytest.mark.parametrize("inspector", ['{"Layers": []}', '{"Layers": null}', '{"Layers": ["a\\_b"', "[]"])
def test_attention_that_is_nowhere_to_be_seen_is_reported(
    version: str, inspector: str, bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The graph knows how many to expect; what the inspector says must not cost a build."""
    half_unet(bundle)
    builders = machine(monkeypatch, version)
    builders.inspector = inspector
    monkeypatch.setattr(build_check, "check", lambda *_, **__: build_check.Findings(None, ()))
    sluggish(monkeypatch, 10.0)
    build(BuildOptions(bundle, **SMALL))
    assert "the engine's layers show no fused attentions, where the graph has 20:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("times", "said"),
    [
        ((10.0, 20.0, 18.0), None),
        (
            (10.0, 45.0, 12.0),
            "unet 128x128 batch 2 takes 45.0 ms a run, and unet 128x128 batch 1 10.0 ms for 0.5 times the work: build",
        ),
        ((30.0, 20.0, 18.0), "unet 128x128 batch 1 takes 30.0 ms a run, and unet dynamic 18.0 ms for 1 times the work"),
        ((10.0, 20.0, 25.0), "unet dynamic takes 25.0 ms a run, and unet 128x128 batch 1 10.0 ms for 1 times the work"),
        ((0.3, 0.9, 0.2), None),
    ],
)
def test_engines_of_one_build_are_compared_with_one_another(
    times: tuple[float, ...],
    said: str | None,
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A first build has no history."""
    only(bundle, "unet")
    machine(monkeypatch)
    sluggish(monkeypatch, *times)
    monkeypatch.setattr(build_check, "check", lambda *_, **__: build_check.Findings(None, ()))
    build(BuildOptions(bundle, batches=(1, 2)))
    printed = capsys.readouterr().err
    assert (said or "") in printed and ("the work" in printed) == (said is not None)


def test_without_onnxruntime_black_pictures_are_still_found(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    only(bundle, "vae_decoder", "pixels")
    builders = machine(monkeypatch)

    def missing(*_: object, **__: object) -> None:
        raise DependencyError("no engine library is installed")

    monkeypatch.setattr("sd_runtime.engines.onnxruntime_.backend.OnnxRuntimeEngine", missing)
    build(BuildOptions(bundle, **SMALL))
    said = capsys.readouterr().err
    assert said.count("engines are not compared with their graphs: no engine library is installed") == 1
    assert said.count("not compared") == 3
    (bundle / MANIFEST).write_bytes(replace(manifest_of(bundle), engines=()).to_bytes())
    only(bundle, "vae_decoder")
    for how, complaint in (
        ("nan", "NaN"),
        ("flat", "the same number everywhere"),
        ("red", "the same number everywhere"),
    ):
        builders.built_instead = broken(bundle / "vae_decoder" / "model.onnx", how)
        with pytest.raises(ExportError, match=complaint):
            build(BuildOptions(bundle, refittable=True, **SMALL))


def test_a_build_failure_names_layer_and_setting(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(bundle, "vae_decoder")
    builders = machine(monkeypatch)
    builders.failure = [
        "[optimizer.cpp::computeCosts::3728] Error Code 10: Internal Error (Could not find any implementation for node "
        "{ForeignNode[decoder.mid_block.attentions.0/Transpose...decoder.mid_block.attentions.0/Add]}.)"
    ]
    with pytest.raises(ExportError) as caught:
        build(BuildOptions(bundle, **SMALL))
    said = str(caught.value)
    assert "building vae_decoder 128x128 batch 1: TensorRT has no kernel for a layer, at the layers from " in said
    assert "decoder.mid_block.attentions.0/Transpose to decoder.mid_block.attentions.0/Add" in said
    assert "--precision" in said and "\n" not in said


def test_without_a_gpu_one_line_says_so(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, "8.5.3").library.starts = False
    with pytest.raises(EngineError, match=r"^TensorRT does not start: CUDA initialization failure"):
        build(BuildOptions(bundle, **SMALL))
    settings = Tuning("fp32", (), 1 << 30, bundle / "timing.cache")
    with pytest.raises(ExportError, match="the GPU's driver is missing, or too old for this TensorRT"):
        build_engine("unet", bundle / "unet" / "model_trt-legacy.onnx", {}, settings, print)


def test_a_graph_that_the_parser_does_not_take(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(bundle, "vae_decoder")
    shutil.copy(bundle / "vae_decoder" / "model.onnx", bundle / "vae_decoder" / "model_trt-legacy.onnx")
    refresh(bundle, manifest_of(bundle), "vae_decoder/model_trt-legacy.onnx")
    machine(monkeypatch, "8.6.1")
    with pytest.raises(ExportError, match="does not know an operator of the graph"):
        build(BuildOptions(bundle, **SMALL))


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
            "give more with --workspace",
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
            "Error Code 10: Internal Error (Could not find any implementation for node {ForeignNode[/down_blocks.0/"
            "attentions.0/Constant + (Unnamed Layer* 12) [Shuffle].../Reshape_5]} due to insufficient workspace. See",
            "scratch space is too small, at the layers from /down_blocks.0/attentions.0/Constant + "
            "(Unnamed Layer* 12) [Shuffle] to /Reshape_5 (",
            "--workspace",
        ),
        (
            "Error Code 10: Internal Error (Could not find any implementation for node /conv1/Conv + PWN(/a.b/Sigmoid, "
            "/Mul).)",
            "no kernel for a layer, at /conv1/Conv + PWN(/a.b/Sigmoid, /Mul) (",
            "--precision",
        ),
        (
            "10: Could not find any implementation for node (Unnamed Layer* 7) [Shuffle] + /down.0/MatMul.\n",
            "no kernel for a layer, at (Unnamed Layer* 7) [Shuffle] + /down.0/MatMul (",
            "--precision",
        ),
        (
            "Skipping tactic 0 due to insuficient memory on requested size of 1170309120 detected for tactic 0.",
            "scratch space is too small (",
            "--workspace",
        ),
        (
            "Myelin ([pass.cpp:337: check_turing_op_compatibility] Cannot compile operation 'x' for Turing "
            "(SM75): FP32 GEMM is not supported. In compileGraph at x.cpp:2012)",
            "no such layer for Turing",
            "ONNX Runtime stands in",
        ),
        (
            "IBuilder::buildSerializedNetwork: Error Code 1: Myelin ([tactic.cpp:1676: enumerate_tactics] Tactic "
            "Selection: no tactics to implement the operation within workspace limit. Consider increase the allowed "
            "workspace size if applicable.; [tactic.cpp:264: run] Error during tactic selection. In compileGraph at "
            "/_src/optimizer/myelin/codeGenerator.cpp:2012)",
            "scratch space is too small (Tactic Selection: no tactics to implement the operation within workspace",
            "give more with --workspace",
        ),
        (
            "IBuilder::buildSerializedNetwork: Error Code 1: Myelin ([myelin_graph.h:1295: attachExceptionMsgToGraph] "
            "MyelinCheckException: decompose_composite_ops.cpp:59: CHECK(composite_op->is_decomposable()) failed. "
            "Attention operation was not supported by a dedicated kernel.",
            "no fused kernel for an attention that it may not take apart (CHECK(composite_op->is_decomposable()",
            "export the bundle again",
        ),
        (
            "Error Code 1: Myelin ([pass.cpp:1500: run_passes] Cannot compile for target(s) sm75, because the model "
            "contains HW-specific datatypes: b16. In compileGraph at /_src/optimizer/myelin/codeGenerator.cpp:2012)",
            "lack a type of numbers that the graph has (Cannot compile for target(s) sm75, because the model contains "
            "HW-specific datatypes: b16)",
            "leave out --turing",
        ),
        (
            "Error Code 1: Myelin ([myelin_graph.h:1295: attachExceptionMsgToGraph] MyelinCheckException: "
            "graph_jit.cpp:278: CHECK(status == CUDA_SUCCESS) failed.  In compileGraph at /_src/x.cpp:2012)",
            "needs a GPU to build such an engine (CHECK(status == CUDA_SUCCESS) failed)",
            "on a machine with an NVIDIA GPU",
        ),
        ("something never seen before", "something never seen before", ""),
    ],
)
def test_what_tensorrt_says_is_translated(message: str, cause: str, remedy: str) -> None:
    error = explain("unet dynamic", [message])
    assert cause in str(error) and remedy in str(error) and str(error).startswith("building unet dynamic")


def test_the_first_of_several_causes_comes_first() -> None:
    """What follows from it is not what anyone can mend."""
    messages = ["[a.cpp::f::1] Error Code 4: Internal Error (the cause)", *(f"it follows {n}" for n in range(3))]
    said = str(explain("unet dynamic", messages))
    assert said == "building unet dynamic failed: the cause | it follows 0 | it follows 1"


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


def test_engines_are_chosen_while_exporting(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine(monkeypatch)
    built: list[BuildOptions] = []
    monkeypatch.setattr("sd_export.exporter.export", lambda *_, **__: bundle)
    monkeypatch.setattr(module, "build", lambda options, **_: built.append(options))
    engines = ["--size", "64x128", "--batch", "1,2", "--no-fallback", "--engine-precision", "bf16"]
    assert main(["--model", "demo", "--tensorrt", *engines]) == 0
    assert built == [BuildOptions(bundle, ((64, 128),), (1, 2), "bf16", fallback=False)]
    assert main(["--model", "demo", "--tensorrt"]) == 0
    assert built[1:] == [BuildOptions(bundle)]
    capsys.readouterr()
    for wrong, complaint in (
        (engines, "flags for engines: accepted only together with --tensorrt"),
        (["--tensorrt", "--size", "big"], "size: got big"),
        (["--tensorrt", "--precision", "fp16", *engines], "bf16: got with --precision fp16, accepted a fp32 bundle"),
    ):
        assert main(["--model", "demo", *wrong]) == 2
        assert complaint in capsys.readouterr().err
    assert len(built) == 2


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
    modules = "sd_export.tensorrt_.build, sd_export.tensorrt_.cli"
    code = f"import {modules}, sys; print({{'torch', 'onnx', 'onnx_ir'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
