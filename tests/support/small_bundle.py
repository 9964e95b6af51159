"""A bundle of one network, y = x @ w, small enough to make and to spoil in every test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper
from safetensors.numpy import save
from sd_runtime.bundle.bundle import Bundle
from sd_runtime.bundle.manifest import MANIFEST, Component, Defaults, Graph, Latent, Manifest, Source, record_file
from sd_runtime.engines.onnxruntime_.backend import cpu_engine
from sd_runtime.engines.onnxruntime_.cpu import OnnxRuntimeEngine
from sd_runtime.tensor import Dim, TensorSpec

WEIGHTS = np.arange(6, dtype=np.float32).reshape(3, 2)
X = TensorSpec("x", "float32", (Dim("batch", 1, 2, 4), 3))
Y = TensorSpec("y", "float32", (Dim("batch", 1, 2, 4), 2))
ONES = np.ones((1, 3), np.float32)
GRAPH, FILE = "unet/model.onnx", "unet/model.safetensors"


def external(**changed: str) -> TensorProto:
    """w, in the weights file; `changed`: what is said of where."""
    begin = len(save({"w": WEIGHTS})) - WEIGHTS.nbytes
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=WEIGHTS.shape, data_location=TensorProto.EXTERNAL)
    where = {"location": "model.safetensors", "offset": str(begin), "length": str(WEIGHTS.nbytes)} | changed
    for key, value in where.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def model(*initializers: TensorProto, nodes: list[onnx.NodeProto] | None = None) -> onnx.ModelProto:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])] if nodes is None else nodes
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, list(initializers))
    made: onnx.ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    return made


def small_bundle(
    root: Path, graph: bytes | None = None, change: Callable[[Manifest], Manifest] = lambda manifest: manifest
) -> Path:
    """Written to `root`; `graph`: the bytes of its .onnx."""
    (root / "unet").mkdir(parents=True)
    (root / FILE).write_bytes(save({"w": WEIGHTS}))
    (root / GRAPH).write_bytes(model(external()).SerializeToString() if graph is None else graph)
    write_manifest(root, change)
    return root


def write_manifest(root: Path, change: Callable[[Manifest], Manifest] = lambda manifest: manifest) -> None:
    """A manifest of the files that lie there now."""
    manifest = Manifest(
        name="small",
        source=Source("owner/model", None, {}),
        precision="fp32",
        latent=Latent(4, 8, 0.18215),
        defaults=Defaults(50, 7.5, 512, 512),
        components={"unet": Component(FILE, {"plain": Graph(GRAPH, (X,), (Y,))})},
        files={name: record_file(root / name) for name in (FILE, GRAPH)},
    )
    (root / MANIFEST).write_bytes(change(manifest).to_bytes())


def small_engine(root: Path) -> OnnxRuntimeEngine:
    return cpu_engine(Bundle.open(root), "unet", "plain")
