"""Graphs small enough to read, with the tensors of the real components, and what they compute in numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
from onnx import TensorProto, helper
from sd_runtime.bundle.manifest import Graph, record_file
from sd_runtime.bundle.verified_file import VerifiedFile
from sd_runtime.errors import BundleError
from sd_runtime.tensor import Dim, TensorSpec

CHANNELS, TOKENS, WIDTH = 4, 7, 8
ROWS, HEIGHT, WIDTH_CELLS = Dim("batch", 1, 2, 8), Dim("latent_height", 4, 8, 16), Dim("latent_width", 4, 8, 16)
SAMPLE = (ROWS, CHANNELS, HEIGHT, WIDTH_CELLS)
TIMESTEPS = Dim("timesteps", 1, 2, 8)

# Depends on every input, differs between rows through the text, and has a weight.
UNET = """
<ir_version: 8, opset_import: ["": 17]>
unet (float[R, 4, h, w] sample, float[N] timestep, float[R, T, 8] encoder_hidden_states)
    => (float[R, 4, h, w] out_sample)
<float slope = {0.7}, float pace = {0.002}, int64[4] spread = {-1, 1, 1, 1}>
{
    means = ReduceMean<axes = [1, 2]>(encoder_hidden_states)
    text = Reshape(means, spread)
    hurry = Mul(timestep, pace)
    hurried = Reshape(hurry, spread)
    steep = Mul(sample, slope)
    shifted = Add(steep, hurried)
    turned = Add(shifted, text)
    out_sample = Sin(turned)
}
"""


def unet_graph() -> onnx.ModelProto:
    return parsed(UNET)


def unet_signature(path: str = "unet/model.onnx") -> Graph:
    text = TensorSpec("encoder_hidden_states", "float32", (ROWS, Dim("sequence_length", 1, TOKENS, 77), WIDTH))
    inputs = (TensorSpec("sample", "float32", SAMPLE), TensorSpec("timestep", "float32", (TIMESTEPS,)), text)
    return Graph(path, inputs, (TensorSpec("out_sample", "float32", SAMPLE),))


def parsed(text: str) -> onnx.ModelProto:
    model = onnx.parser.parse_model(text)
    onnx.checker.check_model(model, full_check=True)
    return model


X = TensorSpec("x", "float32", (Dim("batch", 1, 2, 4), 3))
Y = TensorSpec("y", "float32", (Dim("batch", 1, 2, 4), 2))
WEIGHTS = np.arange(6, dtype=np.float32).reshape(3, 2)


def verified(path: Path) -> VerifiedFile:
    """A file as it is now."""
    return VerifiedFile(path, record_file(path), lambda got, accepted: BundleError(path.name, got=got))


def product_graph(folder: Path) -> bytes:
    """y = x @ w, with w in a file beside the graph: inputs (X,), outputs (Y,)."""
    (folder / "w.bin").write_bytes(b"\0" * 64 + WEIGHTS.tobytes())
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=WEIGHTS.shape)
    weight.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "w.bin"), ("offset", "64"), ("length", str(WEIGHTS.nbytes))):
        weight.external_data.add(key=key, value=value)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2])],
        [weight],
    )
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    return model.SerializeToString()
