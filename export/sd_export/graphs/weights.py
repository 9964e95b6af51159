"""A graph's weights in one .safetensors, which the .onnx references by offset (ONNX external data).

The file is an ordinary safetensors: header, then the tensors without gaps.  The header is padded so that they start on
a page, and tensors whose size is a multiple of 64 bytes come first, so that nearly all lie aligned for memory mapping;
within that they follow the order in which the graph reads them.  Shapes, scales and other small constants stay in the
.onnx, where shape inference sees them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

PAGE, LINE = 4096, 64  # bytes
SMALL = 128  # bytes; constants below stay in the .onnx
DTYPES = {ir.DataType.FLOAT: "F32", ir.DataType.FLOAT16: "F16"}


@dataclass(frozen=True)
class _Tensor:
    """A weight that goes into the file."""

    value: ir.Value
    content: ir.TensorProtocol
    name: str
    shape: tuple[int, ...]


def save(model: ir.Model, graph_path: Path, weights_path: Path) -> None:
    """Write `model`'s large float tensors to `weights_path` and its graph to `graph_path`, in the same folder.

    The model's tensors are replaced one by one by references into the file, which frees them."""
    tensors = _large(model.graph)
    header = _header(tensors)
    with weights_path.open("xb") as file:
        file.write(header)
        for tensor in tensors:
            offset = file.tell()
            file.write(np.ascontiguousarray(tensor.content.numpy()).data)
            tensor.value.const_value = ir.ExternalTensor(
                weights_path.name,
                offset,
                tensor.content.nbytes,
                tensor.content.dtype,
                shape=ir.Shape(tensor.shape),
                name=tensor.name,
            )
    save_graph(model, graph_path)


def save_graph(model: ir.Model, path: Path) -> None:
    """Write the .onnx of a graph whose weights already lie outside."""
    with path.open("xb") as file:
        file.write(ir.to_proto(model).SerializeToString(deterministic=True))


def _large(graph: ir.Graph) -> list[_Tensor]:
    """The initializers that go into the weights file, in file order."""
    order: dict[ir.Value, _Tensor] = {}
    for node in graph:
        for value in node.inputs:
            if value is None or value in order or not value.is_initializer():
                continue
            content, name, shape = value.const_value, value.name, value.shape
            assert content is not None and name is not None and shape is not None
            if content.dtype in DTYPES and content.nbytes >= SMALL:
                order[value] = _Tensor(value, content, name, shape.numpy())
    return sorted(order.values(), key=lambda tensor: tensor.content.nbytes % LINE != 0)


def _header(tensors: list[_Tensor]) -> bytes:
    """The safetensors header with its length in front, padded to a page."""
    entries, begin = {}, 0
    for tensor in tensors:
        end = begin + tensor.content.nbytes
        dtype = DTYPES[tensor.content.dtype]
        entries[tensor.name] = {"dtype": dtype, "shape": tensor.shape, "data_offsets": (begin, end)}
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    size = -(-(8 + len(text)) // PAGE) * PAGE
    return (size - 8).to_bytes(8, "little") + text.ljust(size - 8)
