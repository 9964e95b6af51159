"""A bundle with engines of TensorRT for RTX, on fakes: one backend beside TensorRT's, over the same code."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bundle_with_engines import REQUEST, assert_same_pictures, copy_with_engines, on_cpu
from fake_cuda import FakeGpu
from fake_onnxruntime import FakeOnnxRuntime
from fake_tensorrt import FakeTensorRT
from sd_runtime.bundle.bundle import Bundle
from sd_runtime.bundle.manifest import MANIFEST, EngineRecord, Manifest, Target
from sd_runtime.engines.tensorrt_ import trial
from sd_runtime.engines.tensorrt_.rebuild import rebuild
from sd_runtime.pipeline import Pipeline
from sd_runtime.result import Result

VERSION = "10.16.0"  # what the fake's engines carry; any does
SERVED = ("8.0", "8.6", "8.9", "12.0", "12.1")
HERE = Target("", "8.0", VERSION, "", "", "tensorrt_rtx", (*SERVED, "9.0"))  # the fake GPU's capability is 9.0


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeTensorRT:
    monkeypatch.setenv("SD_LEAN_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    gpu = FakeGpu().install(monkeypatch)
    FakeOnnxRuntime(gpu).install(monkeypatch)
    return FakeTensorRT(gpu, VERSION, "tensorrt_rtx").install(monkeypatch)


Made = Callable[..., Path]


@pytest.fixture
def made(demo_bundle: Path, tmp_path: Path) -> Made:
    def copy(target: Target = HERE, precision: Any = "fp32") -> Path:
        change: Callable[[EngineRecord], EngineRecord] = lambda record: replace(  # noqa: E731
            record, target=target, precision=precision, checked="structure"
        )
        return copy_with_engines(demo_bundle, tmp_path / "bundle", change)

    return copy


def draw(bundle: Path, **options: Any) -> tuple[Result, str]:
    with Pipeline.load(bundle, device="cuda", **options) as pipeline:
        return pipeline(**REQUEST), pipeline.engines.backends[0].name


def test_it_draws_the_same_pictures(
    machine: FakeTensorRT, made: Made, demo_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The fake is strict: memory, specialisation, its own graphs, the header and the question before a capture."""
    result, backend = draw(made())
    assert backend == "tensorrt_rtx" and not caplog.records
    assert_same_pictures(result, on_cpu(demo_bundle))
    assert machine.asked_validity and not machine.contexts


def test_every_engine_is_compared_once_on_a_gpu(machine: FakeTensorRT, made: Made, tmp_path: Path) -> None:
    """And kernels that were compiled once are there the next time."""
    bundle = made()
    manifest = (bundle / MANIFEST).read_bytes()
    draw(bundle)
    first = len(machine.engines)
    folder = tmp_path / "home" / "cache" / "tensorrt_rtx"
    compared = json.loads((folder / "compared.json").read_text())
    records = Manifest.from_bytes(manifest).engines
    assert 4 <= len(compared) <= len(records) and all("NVIDIA H200" in key for key in compared)
    assert all(error < 1e-3 for error in compared.values())
    assert not machine.compiled
    draw(bundle)
    assert machine.compiled == [b"kernels"]
    assert len(machine.engines) - first == first // 2  # no trials
    assert (bundle / MANIFEST).read_bytes() == manifest


def test_an_engine_that_drifts_is_refused_aloud(
    machine: FakeTensorRT,
    made: Made,
    demo_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Now and the next time; what else there is draws."""
    bundle = made()
    monkeypatch.setattr(trial, "difference", lambda *_: 0.5)
    for _ in range(2):
        caplog.clear()
        result, _ = draw(bundle)
        assert_same_pictures(result, on_cpu(demo_bundle))
        said = [
            record.getMessage() for record in caplog.records if "differs from its plain graph" in record.getMessage()
        ]
        assert any(
            "engines/h200/unet-trt-basic.plan differs from its plain graph by 5.0e-01 on NVIDIA H200" in text
            and f"sd-export build {bundle} --for rtx" in text
            for text in said
        )


def test_difference_knows_nan() -> None:
    import numpy as np

    one = {"x": np.array([3.0, 4.0], np.float32)}
    assert trial.difference(one, one) == 0
    assert trial.difference({"x": np.array([3.0, 4.5], np.float32)}, one) == pytest.approx(0.1)
    assert trial.difference({"x": np.array([3.0, np.nan], np.float32)}, one) == float("inf")


def test_without_onnxruntime_an_engine_is_used_as_it_is(
    machine: FakeTensorRT, made: Made, demo_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said once for all of them, and not where they were compared before."""
    bundle = made()
    result, _ = draw(bundle, backends=["tensorrt_rtx"])
    assert_same_pictures(result, on_cpu(demo_bundle))
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("engines of TensorRT for RTX are used without having been compared with their graphs")
    draw(bundle)
    caplog.clear()
    draw(bundle, backends=["tensorrt_rtx"])
    assert not caplog.records


def test_a_gpu_that_it_does_not_serve_gets_onnxruntime_aloud(
    machine: FakeTensorRT, made: Made, demo_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An H100, or an H200."""
    bundle = made(replace(HERE, serves=SERVED))
    result, backend = draw(bundle)
    assert backend == "onnxruntime"
    assert_same_pictures(result, on_cpu(demo_bundle))
    (said,) = [record.getMessage() for record in caplog.records]
    assert "was built for compute capability 8.0, 8.6, 8.9, 12.0, 12.1 by TensorRT for RTX" in said
    assert "compute capability 9.0" in said and said.endswith(
        f"to build engines on this machine: sd-export build {bundle}"
    )
    assert "; ONNX Runtime is used instead; " in said and "\n" not in said


def test_without_the_library_one_line_names_it(
    machine: FakeTensorRT, made: Made, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    _, backend = draw(made())
    assert backend == "onnxruntime"
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("TensorRT for RTX does not load") and 'pip install "sd-lean[tensorrt-rtx]"' in said


def test_the_header_is_asked_before_an_engine_is_loaded(
    machine: FakeTensorRT, made: Made, demo_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Engines of another version of the library: each is refused by itself."""
    bundle = made()
    machine.version = "1.8.0"
    sys.modules["tensorrt_rtx"].__version__ = "1.8.0"  # type: ignore[attr-defined]
    result, _ = draw(bundle)
    assert_same_pictures(result, on_cpu(demo_bundle))
    assert not machine.engines
    assert any("TensorRT for RTX 1.8.0 finds the engine" in record.getMessage() for record in caplog.records)


def test_the_command_that_builds_it_again(made: Made) -> None:
    bundle = made(replace(HERE, serves=("7.5",)))
    assert rebuild(Bundle.open(bundle), "tensorrt_rtx") == f"sd-export build {bundle} --for rtx --turing --fallback"
    assert rebuild(Bundle.open(bundle)) == f"sd-export build {bundle}"
