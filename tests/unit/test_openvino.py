"""OpenVINO as a backend: the bundle's own graphs against ONNX Runtime, and every way to be used wrongly."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sd_runtime import Pipeline
from sd_runtime.bundle.bundle import Bundle, GraphFiles
from sd_runtime.bundle.manifest import Graph
from sd_runtime.cli.run import main
from sd_runtime.engines.backend import Machine
from sd_runtime.engines.onnxruntime_.backend import OnnxRuntimeBackend
from sd_runtime.engines.openvino_.backend import OpenVINOBackend, open_openvino
from sd_runtime.engines.openvino_.engine import OpenVINOEngine
from sd_runtime.engines.openvino_.library import import_openvino, translate
from sd_runtime.engines.protocol import Engine
from sd_runtime.errors import BundleError, DependencyError, EngineError, OutOfMemoryError
from sd_runtime.tensor import Array, Dim, TensorSpec
from tiny_graphs import WEIGHTS, X, Y, product_graph, verified

if importlib.util.find_spec("openvino") is None:  # importorskip would import it together with its telemetry
    pytest.skip("OpenVINO is not installed", allow_module_level=True)
openvino = import_openvino()

PROMPT = "a large yellow star on a blue background"
FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}
HAS_BFLOAT16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
GRAPHS = (
    ("text_encoder", "plain"),
    ("text_encoder", "embeds"),
    ("unet", "plain"),
    ("vae_decoder", "plain"),
    ("vae_encoder", "plain"),
    ("pixels", "plain"),
)


@pytest.fixture
def bundle(demo_bundle: Path) -> Bundle:
    return Bundle.open(demo_bundle)


def no_fallback() -> Engine:
    raise AssertionError("OpenVINO takes every shape")


def make_engine(folder: Path, graph: bytes | None = None, **changed: Any) -> OpenVINOEngine:
    path = folder / "model.onnx"
    path.write_bytes(product_graph(folder) if graph is None else graph)
    files, opened = GraphFiles("unet/model.onnx", path.read_bytes(), folder), verified(path)
    arguments = {"inputs": (X,), "outputs": (Y,), "options": FLOAT32} | changed
    return OpenVINOEngine(openvino.Core(), files, opened, **arguments)


def make_feeds(graph: Graph, sizes: dict[str, int], seed: int = 0) -> dict[str, Array]:
    """Random tensors for a graph; axes that are not in `sizes` are as small as they may be."""
    random, feeds = np.random.default_rng(seed), {}
    for spec in graph.inputs:
        shape = [sizes.get(axis.symbol, axis.min) if isinstance(axis, Dim) else axis for axis in spec.shape]
        integers = spec.dtype.startswith("int")
        values = random.integers(0, 400, shape) if integers else random.standard_normal(shape)
        feeds[spec.name] = values.astype(spec.dtype)
    if "timestep" in feeds:
        feeds["timestep"] = np.array([501.0], np.float32)
    return feeds


def error_of(got: Array, expected: Array) -> float:
    got, expected = got.astype(np.float64), expected.astype(np.float64)
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def psnr(one: Array, other: Array) -> float:
    return float(-10 * np.log10(np.square(one.astype(np.float64) - other).mean() / 4))  # samples range over 2


@pytest.mark.parametrize(("component", "form"), GRAPHS)
def test_every_graph_at_several_shapes(bundle: Bundle, component: str, form: str) -> None:
    """One engine for shapes that follow each other, none of them the traced one."""
    graph = bundle.component(component).graph(form)
    ours = OpenVINOBackend(bundle).engine(component, form, no_fallback)
    theirs = OnnxRuntimeBackend(bundle, threads=1).engine(component, form, no_fallback)
    for sizes in ({"batch": 3, "latent_height": 16, "latent_width": 24}, {"batch": 1, "height": 128, "width": 64}):
        feeds = make_feeds(graph, sizes)
        expected = theirs.run(feeds)
        got = ours.run({name: ours.place(name, array) for name, array in feeds.items()})
        assert list(got) == [spec.name for spec in graph.outputs]
        for spec in graph.outputs:
            assert got[spec.name].dtype == expected[spec.name].dtype
            assert error_of(got[spec.name], expected[spec.name]) < 1e-5, spec.name


@pytest.mark.parametrize("name", ["openvino", "openvino-bf16"])
def test_the_picture_is_onnx_runtimes(bundle: Bundle, pipe: Pipeline, name: str) -> None:
    """Limits in dB: far above what a wrong operator leaves, and below what was measured (92 and 42 to 50)."""
    if name == "openvino-bf16" and not HAS_BFLOAT16:
        pytest.skip("this processor has no bfloat16")
    expected = pipe(PROMPT, seed=3, num_inference_steps=8)
    with Pipeline.load(bundle, backends=[name]) as pipeline:
        got = pipeline(PROMPT, seed=3, num_inference_steps=8)
        assert pipeline.engines.precision("unet") == ("bf16" if name == "openvino-bf16" else "fp32")
        assert pipeline.batches(got.request) == (range(1),)
    likeness = psnr(got.samples, expected.samples)
    assert likeness > 60 if name == "openvino" else 30 < likeness < 60  # bfloat16 that equals float32 is not bfloat16


def test_from_the_command_line(demo_bundle: Path, tmp_path: Path) -> None:
    arguments = ["--model", str(demo_bundle), "--steps", "2", "--quiet", "--output", str(tmp_path / "x.png")]
    assert main([PROMPT, "--backend", "openvino", *arguments]) == 0
    assert (tmp_path / "x.png").stat().st_size > 0


def test_several_threads_at_once(bundle: Bundle) -> None:
    """Each with its own inputs and shape; every result is what one thread alone gets."""
    graph = bundle.component("unet").graph()
    engine = OpenVINOBackend(bundle, threads=1).engine("unet", "plain", no_fallback)
    cases = [make_feeds(graph, {"batch": 1 + n % 2, "latent_height": 8 + 8 * (n % 3)}, seed=n) for n in range(6)]
    alone = [engine.run(case)["out_sample"] for case in cases]
    with ThreadPoolExecutor(len(cases)) as pool:
        together = [[run["out_sample"] for run in pool.map(engine.run, cases)] for _ in range(4)]
    for round_ in together:
        for one, other in zip(alone, round_, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)


def test_results_belong_to_the_caller_and_inputs_stay_his(tmp_path: Path) -> None:
    """Inputs that may not be written, or that lie in memory in another order, are taken as they are."""
    engine = make_engine(tmp_path)
    x = np.random.default_rng(0).standard_normal((2, 3), np.float32)
    x.flags.writeable = False
    first = engine.run({"x": x})["y"]
    engine.run({"x": np.zeros((2, 3), np.float32)})
    np.testing.assert_allclose(first, x @ WEIGHTS, rtol=1e-6)
    first += 1
    turned = np.asfortranarray(x)
    np.testing.assert_allclose(engine.run({"x": turned})["y"], x @ WEIGHTS, rtol=1e-6)


def test_refuses_tensors_that_the_spec_does_not_take(tmp_path: Path) -> None:
    engine = make_engine(tmp_path)
    with pytest.raises(EngineError, match=r"input 'x': got float32\(5, 3\), accepted float32\(1\.\.4, 3\)"):
        engine.run({"x": np.zeros((5, 3), np.float32)})
    with pytest.raises(EngineError, match="input 'x'"):
        engine.place("x", np.zeros((1, 3)))


def test_graph_that_is_not_the_manifests(tmp_path: Path) -> None:
    other = TensorSpec("z", "float32", (1,))
    with pytest.raises(EngineError, match="inputs differ from the manifest: got x, accepted z"):
        make_engine(tmp_path, inputs=(other,))
    with pytest.raises(EngineError, match="outputs differ from the manifest: got y, accepted z"):
        make_engine(tmp_path, outputs=(other,))


def test_what_does_not_load_or_run_is_said_in_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """With the graph's file; without the places in OpenVINO's source, and nowhere else."""
    engine = make_engine(tmp_path, inputs=(TensorSpec("x", "float32", (Dim("batch", 1, 1, 4), Dim("wide", 1, 3, 9))),))
    with pytest.raises(EngineError, match=r"^unet/model\.onnx failed while running: ") as failed:
        engine.run({"x": np.zeros((1, 5), np.float32)})
    assert ".cpp" not in str(failed.value)
    with pytest.raises(EngineError, match=r"^cannot load unet/model\.onnx: ") as failed:
        make_engine(tmp_path, product_graph(tmp_path).replace(b"MatMul", b"MatNul"))
    assert ".cpp" not in str(failed.value)
    graph = product_graph(tmp_path)
    (tmp_path / "w.bin").unlink()
    with pytest.raises(EngineError, match=r"cannot load unet/model\.onnx: .*w\.bin"):
        make_engine(tmp_path, graph)
    assert not "".join(capfd.readouterr())


@pytest.mark.parametrize("name", ["unet/model.onnx", "unet/model.safetensors"])
def test_damaged_files_are_found_before_openvino_sees_them(demo_bundle: Path, tmp_path: Path, name: str) -> None:
    for source in demo_bundle.rglob("*"):
        target = tmp_path / source.relative_to(demo_bundle)
        if source.is_dir():
            target.mkdir()
        else:
            os.link(source, target)
    damaged = bytearray((tmp_path / name).read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / name).unlink()
    (tmp_path / name).write_bytes(damaged)
    with pytest.raises(BundleError, match=rf"{name} in bundle .* is damaged"):
        OpenVINOBackend(Bundle.open(tmp_path)).engine("unet", "plain", no_fallback)


def test_threads_are_what_was_asked_for(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []

    class Watched(openvino.Core):  # type: ignore[misc, name-defined]
        def compile_model(self, *given: Any) -> Any:
            compiled.append(super().compile_model(*given))
            return compiled[-1]

    monkeypatch.setattr(openvino, "Core", Watched)
    open_openvino(bundle, Machine("cpu", threads=1)).engine("pixels", "plain", no_fallback)
    assert compiled[0].get_property("INFERENCE_NUM_THREADS") == 1
    assert compiled[0].get_property("INFERENCE_PRECISION_HINT") == openvino.Type.f32


def test_a_processor_without_bfloat16(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    class Old(openvino.Core):  # type: ignore[misc, name-defined]
        def get_property(self, device: str, name: str) -> Any:
            return ["FP32", "INT8"] if name == "OPTIMIZATION_CAPABILITIES" else "an old processor"

    monkeypatch.setattr(openvino, "Core", Old)
    expected = "this processor has no bfloat16: got an old processor; choose the backend openvino, "
    with pytest.raises(EngineError, match=expected):
        Pipeline.load(bundle, backends=["openvino-bf16"])
    with Pipeline.load(bundle, backends=["openvino"]) as pipeline:
        assert pipeline(PROMPT, seed=3, num_inference_steps=1).images


def test_a_gpu_is_not_openvinos(bundle: Bundle) -> None:
    with pytest.raises(EngineError, match="device cuda: OpenVINO runs on the CPU; choose device auto or cpu"):
        Pipeline.load(bundle, device="cuda", backends=["openvino"])


def test_not_installed_or_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(openvino, "__version__", "2026.1.0-21010-abc")
        with pytest.raises(
            DependencyError, match=r"OpenVINO is too old: got 2026\.1\.0-.*, accepted 2026\.2 or later; pip"
        ):
            import_openvino()
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(
        DependencyError, match=r'cannot be imported: got .*; pip install --upgrade "sd-lean\[openvino\]"'
    ):
        import_openvino()


@pytest.mark.parametrize("before", ["", "import openvino_telemetry"])
def test_importing_it_reports_nothing(tmp_path: Path, before: str) -> None:
    """OpenVINO's own import sends an event and leaves files in the home folder; what it offers stays whole."""
    program = f"""
{before}
import sys
had = {{name for name in sys.modules if name.startswith("openvino_telemetry")}}
from sd_runtime.engines.openvino_.library import import_openvino
openvino = import_openvino()
assert {{name for name in sys.modules if name.startswith("openvino_telemetry")}} == had
assert openvino.convert_model and openvino.Core().available_devices
import openvino_telemetry  # whoever wants it still gets it
"""
    environment = {**os.environ, "HOME": str(tmp_path), "CI": ""}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "said",
    [
        "Exception from src/inference/src/dev/plugin.cpp:54:\nstd::bad_alloc\n\n",
        "Check 'ptr' failed at src/plugins/intel_cpu/src/cpu_memory.cpp:257:\nFailed to allocate 13421 bytes of memory",
        "Converting input model\nCan not create file mapping for 5, err=Cannot allocate memory\n\n",
    ],
)
def test_fault_22_running_out_of_memory_is_recognised(said: str) -> None:
    """As version 2026.4 says it under a limit of its address space, at compiling, running and reading."""
    error = translate(RuntimeError(said), "drawing")
    assert isinstance(error, OutOfMemoryError) and ".cpp" not in str(error)


def test_fault_42_weights_changed_while_they_are_in_use(demo_bundle: Path, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(demo_bundle, tmp_path / "bundle"))
    with Pipeline.load(changed, backends=["openvino"], threads=1) as pipeline:
        pipeline(PROMPT, seed=3, num_inference_steps=3)
        weights = changed / "unet/model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        with weights.open("r+b") as file:
            file.write(content)
        with pytest.raises(BundleError, match=r"unet/model\.safetensors in bundle .* is damaged: got SHA-256"):
            pipeline(PROMPT, seed=3, num_inference_steps=3)


@pytest.mark.parametrize("name", ["unet/model.onnx", "unet/model.safetensors"])
def test_fault_42_files_replaced_while_they_are_loaded(
    demo_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    replaced = Path(shutil.copytree(demo_bundle, tmp_path / "bundle"))
    bundle, init = Bundle.open(replaced), OpenVINOEngine.__init__

    def late(engine: OpenVINOEngine, *given: Any) -> None:
        (tmp_path / "other").write_bytes((replaced / name).read_bytes())
        (tmp_path / "other").replace(replaced / name)
        init(engine, *given)

    monkeypatch.setattr(OpenVINOEngine, "__init__", late)
    with pytest.raises(BundleError, match=rf"{name} in bundle .* is damaged: got another file by that name"):
        open_openvino(bundle, Machine("cpu")).engine("unet", "plain", lambda: pytest.fail("not needed"))


def test_fault_52_closed_while_it_draws(demo_bundle: Path) -> None:
    pipeline = Pipeline.load(demo_bundle, backends=["openvino"], threads=1)
    generation = pipeline.start(pipeline(PROMPT, seed=3, num_inference_steps=3).request)
    next(generation)
    pipeline.close()
    with pytest.raises(EngineError, match="the pipeline was closed"):
        next(generation)
