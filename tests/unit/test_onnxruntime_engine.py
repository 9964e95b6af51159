"""The ONNX Runtime engine on small graphs made here: results, weights on disk, and every way to be used wrongly."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from sd_runtime.bundle.bundle import GraphFiles
from sd_runtime.engines.onnxruntime_ import cpu as backend
from sd_runtime.engines.onnxruntime_.cpu import OnnxRuntimeEngine
from sd_runtime.errors import EngineError, OutOfMemoryError
from sd_runtime.tensor import Dim, TensorSpec
from tiny_graphs import WEIGHTS, X, Y, product_graph, verified


def make_engine(folder: Path, **changed: Any) -> OnnxRuntimeEngine:
    graph = changed.pop("graph", None) or product_graph(folder)
    weights = verified(folder / "w.bin")
    arguments = {"inputs": (X,), "outputs": (Y,)} | changed
    return OnnxRuntimeEngine(GraphFiles("unet/model.onnx", graph, weights.folder, weights), **arguments)


@pytest.mark.parametrize("limit", [0, backend.PREPACK_LIMIT])
def test_runs_with_weights_from_the_folder(tmp_path: Path, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "PREPACK_LIMIT", limit)
    engine = make_engine(tmp_path)
    x = np.random.default_rng(0).standard_normal((2, 3), np.float32)
    np.testing.assert_allclose(engine.run({"x": engine.place("x", x)})["y"], x @ WEIGHTS, rtol=1e-6)


def test_refuses_tensors_that_the_spec_does_not_take(tmp_path: Path) -> None:
    engine = make_engine(tmp_path)
    with pytest.raises(EngineError, match=r"input 'x': got float32\(5, 3\), accepted float32\(1\.\.4, 3\)"):
        engine.run({"x": np.zeros((5, 3), np.float32)})
    with pytest.raises(EngineError, match="input 'x'"):
        engine.place("x", np.zeros((1, 3)))


def test_fault_14_graph_that_is_not_the_manifests(tmp_path: Path) -> None:
    other = TensorSpec("z", "float32", (1,))
    with pytest.raises(
        EngineError,
        match=r"^unet/model.onnx: inputs differ from the manifest: got x tensor\(float\), accepted z tensor\(float\)",
    ):
        make_engine(tmp_path, inputs=(other,))
    with pytest.raises(
        EngineError, match=r"^unet/model.onnx: outputs differ .* got y tensor\(float\), accepted z tensor\(float\)"
    ):
        make_engine(tmp_path, outputs=(other,))


def test_fault_14_corrupt_graph_and_missing_weights(tmp_path: Path) -> None:
    (tmp_path / "w.bin").touch()
    with pytest.raises(EngineError, match=r"^cannot load unet/model\.onnx: "):
        make_engine(tmp_path, graph=b"not onnx")
    graph = product_graph(tmp_path)
    (tmp_path / "w.bin").unlink()
    with pytest.raises(EngineError, match=r"^cannot load unet/model\.onnx: "):
        OnnxRuntimeEngine(GraphFiles("unet/model.onnx", graph, tmp_path), (X,), (Y,))


def test_ctrl_c_while_onnxruntime_is_imported_stays_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It catches whatever its own modules raise and raises an ImportError, as if it were not installed."""
    source = """
try:
    raise KeyboardInterrupt
except BaseException as error:
    caught = error
raise ImportError("cannot load its module") from caught
"""
    (tmp_path / "onnxruntime.py").write_text(source)
    monkeypatch.delitem(sys.modules, "onnxruntime")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        backend.import_onnxruntime()


def test_what_it_raises_is_not_logged_as_well(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = onnx.load_from_string(product_graph(tmp_path))
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "wide"
    wide = replace(X, shape=(Dim("batch", 1, 2, 4), Dim("wide", 1, 3, 9)))
    engine = make_engine(tmp_path, graph=model.SerializeToString(), inputs=(wide,))
    with pytest.raises(EngineError, match=r"^unet/model\.onnx failed while running"):
        engine.run({"x": np.zeros((1, 5), np.float32)})
    assert not "".join(capfd.readouterr())


@pytest.mark.parametrize("said", ["std::bad_alloc", "Failed to allocate memory for requested buffer of size 9"])
def test_fault_22_running_out_of_memory_is_recognised(said: str) -> None:
    assert isinstance(backend.translate(RuntimeError(said), "drawing"), OutOfMemoryError)
