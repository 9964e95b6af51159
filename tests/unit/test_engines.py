"""Which of a component's graphs is loaded for which device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sd_runtime.bundle.bundle import Bundle, GraphFiles
from sd_runtime.engines.engines import Engines
from sd_runtime.engines.onnxruntime_.cpu import OnnxRuntimeEngine
from sd_runtime.errors import BundleError, EngineError


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The graphs that were read, in order."""
    names: list[str] = []
    read = Bundle.read

    def watched(bundle: Bundle, name: str, *limit: int) -> bytes:
        names.append(name)
        return read(bundle, name, *limit)

    monkeypatch.setattr(Bundle, "read", watched)
    return names


def test_the_graph_written_for_the_device_is_preferred(demo_bundle: Path, loaded: list[str]) -> None:
    components = Engines.open(Bundle.open(demo_bundle), "cpu")
    components.preload(["unet"])
    components.engine("text_encoder", "embeds")
    components.engine("pixels")
    assert components.engine("unet") is components.engine("unet")
    components.close()
    assert loaded == ["unet/model_cpu.onnx", "text_encoder/model_embeds.onnx", "pixels/model.onnx"]
    with pytest.raises(EngineError, match="the pipeline was closed"):
        components.engine("unet")


def test_a_graph_that_the_library_does_not_take_is_replaced_aloud(
    demo_bundle: Path, loaded: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def picky(files: GraphFiles, *given: Any, **more: Any) -> OnnxRuntimeEngine:
        if loaded[-1] == "unet/model_cpu.onnx":
            raise EngineError("cannot load the graph: com.microsoft.MultiHeadAttention is not registered")
        return OnnxRuntimeEngine(files, *given, **more)

    monkeypatch.setattr("sd_runtime.engines.onnxruntime_.backend.OnnxRuntimeEngine", picky)
    components = Engines.open(Bundle.open(demo_bundle), "cpu")
    components.engine("unet")
    assert loaded == ["unet/model_cpu.onnx", "unet/model.onnx"]
    assert caplog.records[0].getMessage().endswith("the plain graph of unet is used instead, which is slower")


def test_what_a_bundle_does_not_have(demo_bundle: Path) -> None:
    components = Engines.open(Bundle.open(demo_bundle), "cpu")
    with pytest.raises(BundleError, match="has no safety_checker"):
        components.engine("safety_checker")
    with pytest.raises(BundleError, match="graph form: got fast, accepted plain"):
        components.engine("unet", "fast")
