"""The OpenVINO backend, with the real library: the same pictures, several threads, and what it says where it fails."""

from __future__ import annotations

import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sd_runtime import Pipeline
from sd_runtime.bundle.bundle import Bundle
from sd_runtime.cli.run import main
from sd_runtime.engines.backend import Machine
from sd_runtime.engines.openvino_ import backend, library
from sd_runtime.engines.openvino_.backend import open_openvino
from sd_runtime.engines.openvino_.engine import OpenVINOEngine
from sd_runtime.errors import BundleError, DependencyError, EngineError
from sd_runtime.result import Result
from sd_runtime.tensor import Array

openvino = pytest.importorskip("openvino")

PROMPT = "a large yellow star on a blue background"
SETTINGS: dict[str, Any] = {"seed": 3, "num_inference_steps": 8, "scheduler": "dpmpp_2m"}
BFLOAT16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@pytest.fixture(scope="module")
def ours(demo_bundle: Path) -> Any:
    with Pipeline.load(demo_bundle, backends=["openvino"], threads=1) as pipeline:
        yield pipeline


def psnr(ours: Array, theirs: Array) -> float:
    return float(-10 * np.log10(np.mean((ours.astype(np.float64) - theirs) ** 2)))


def test_the_picture_is_onnx_runtimes(ours: Pipeline, pipe: Pipeline) -> None:
    for changed in ({}, {"width": 136, "height": 72}, {"guidance_scale": 1.0}, {"prompt": "a star, " * 40}):
        arguments = {"prompt": PROMPT} | SETTINGS | changed
        assert psnr(ours(**arguments).arrays, pipe(**arguments).arrays) >= 60
    assert isinstance(ours.engines.engine("unet"), OpenVINOEngine)
    assert ours.engines.precision("unet") == "fp32"


def test_a_picture_is_changed_as_onnx_runtime_changes_it(ours: Pipeline, pipe: Pipeline) -> None:
    start = np.full((128, 128, 3), 0.5, np.float32)
    arguments = {"prompt": PROMPT, "image": start, "strength": 0.7} | SETTINGS
    assert psnr(ours(**arguments).arrays, pipe(**arguments).arrays) >= 60


@pytest.mark.skipif(not BFLOAT16, reason="this processor has no bfloat16")
def test_bfloat16_draws_nearly_the_same(demo_bundle: Path, pipe: Pipeline) -> None:
    with Pipeline.load(demo_bundle, backends=["openvino-bf16"], threads=1) as pipeline:
        assert pipeline.engines.precision("unet") == "bf16"
        drawn = pipeline(PROMPT, **SETTINGS)
    expected = pipe(PROMPT, **SETTINGS)
    assert 25 <= psnr(drawn.arrays, expected.arrays) < 100  # near, and not float32


def test_two_threads_get_the_serial_pictures(ours: Pipeline) -> None:
    def draw(seed: int) -> Result:
        return ours(PROMPT, **SETTINGS | {"seed": seed})

    serial = [draw(seed) for seed in (1, 2)]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(draw, (1, 2)))
    for one, other in zip(serial, together, strict=True):
        assert np.array_equal(one.latents, other.latents)


def test_the_command_line_takes_it_by_name(demo_bundle: Path, tmp_path: Path) -> None:
    picture = tmp_path / "star.png"
    arguments = [PROMPT, "--model", str(demo_bundle), "--backend", "openvino", "--steps", "2", "--quiet"]
    assert main([*arguments, "--output", str(picture)]) == 0
    assert picture.exists()


def test_feeds_and_outputs_follow_the_contract(ours: Pipeline) -> None:
    engine = ours.engines.engine("vae_decoder")
    feeds = {"latent_sample": np.zeros((1, 4, 8, 9), np.float32)}
    first = engine.run(feeds)["sample"]
    kept = first.copy()
    engine.run({"latent_sample": np.ones((1, 4, 8, 9), np.float32)})
    assert np.array_equal(first, kept)  # the caller's own
    with pytest.raises(EngineError, match=r"input 'latent_sample': got float64"):
        engine.run({"latent_sample": np.zeros((1, 4, 8, 9))})


def test_what_is_missing_is_said_with_its_remedy(demo_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(
        DependencyError, match=r'OpenVINO cannot be imported: .*pip install --upgrade "sd-lean\[openvino'
    ):
        Pipeline.load(demo_bundle, backends=["openvino"])


def test_an_old_library_is_refused(demo_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino, "__version__", "2025.4.1-1234")
    with pytest.raises(DependencyError, match=r"OpenVINO is too old: got 2025\.4\.1-1234, accepted 2026\.2 or later"):
        library.import_openvino()


def test_a_processor_without_bfloat16_is_refused(demo_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Old:
        def get_property(self, device: str, name: str) -> Any:
            return ["FP32"] if name == "OPTIMIZATION_CAPABILITIES" else "Some processor"

    monkeypatch.setattr(backend, "import_openvino", lambda: type("Library", (), {"Core": Old}))
    with pytest.raises(
        EngineError, match="this processor has no bfloat16: got Some processor; choose the backend openvino"
    ):
        open_openvino(Bundle.open(demo_bundle), Machine("cpu"), bfloat16=True)


def test_a_gpu_is_not_had_this_way(demo_bundle: Path) -> None:
    with pytest.raises(EngineError, match="device cuda: OpenVINO runs on the CPU; choose"):
        Pipeline.load(demo_bundle, device="cuda", backends=["openvino"])


def test_a_damaged_bundle_is_refused_before_the_library_sees_it(demo_bundle: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(demo_bundle, tmp_path / "bundle"))
    graph = broken / "unet/model.onnx"
    content = bytearray(graph.read_bytes())
    content[100] ^= 1
    graph.write_bytes(bytes(content))
    with pytest.raises(BundleError, match=r"unet/model\.onnx in bundle .* is damaged"):
        Pipeline.load(broken, backends=["openvino"])


def test_fault_42_weights_changed_while_they_are_in_use(demo_bundle: Path, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(demo_bundle, tmp_path / "bundle"))
    with Pipeline.load(changed, backends=["openvino"], threads=1) as pipeline:
        pipeline(PROMPT, **SETTINGS)
        weights = changed / "unet/model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        with weights.open("r+b") as file:
            file.write(content)
        with pytest.raises(BundleError, match=r"unet/model\.safetensors in bundle .* is damaged: got SHA-256"):
            pipeline(PROMPT, **SETTINGS)


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
    generation = pipeline.start(pipeline(PROMPT, **SETTINGS).request)
    next(generation)
    pipeline.close()
    with pytest.raises(EngineError, match="the pipeline was closed"):
        next(generation)
