"""A float32 graph → the same in float16 or bfloat16, typed throughout, for runtimes that take precision from the graph.

These stay float32: the graph's inputs and outputs (cast at the edge); Resize's scales; and, each up to the next matrix
product, the values that follow from the timestep (its sinusoids turn through thousands of radians), from floats that
are made from integers, and from the network's own casts to float32.  The statistics of normalisations stay float32
through the operators' own stash_type.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir
from sd_runtime.errors import ExportError

FLOAT, FLOAT16, BFLOAT16 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16
LARGEST = float(np.finfo(np.float16).max)  # 65504
MASKED = -1e30  # attention masks hold about -FLT_MAX; they are clamped, not refused

_PRODUCTS = frozenset({"Gemm", "MatMul", "Conv"})
_SHAPE_ONLY = frozenset({"Shape", "Size"})


def to_float16(model: ir.Model, keep: Collection[str] = ()) -> None:
    """Convert `model` in place, but for the values named in `keep` and what follows from them up to the next product.

    ExportError, when the weights are read, if one of them exceeds float16's range."""
    _convert(model.graph, FLOAT16, keep, cast_weights=False)


def to_bfloat16(model: ir.Model) -> None:
    """Convert `model` in place.  The weights stay float32 where they lie, and are cast in the graph: few runtimes read
    bfloat16 files, and an engine builder folds the casts.  Resize stays float32: TensorRT has it in no bfloat16, says
    NVIDIA's own demo (github.com/NVIDIA/TensorRT, demo/Diffusion/demo_diffusion/model/base_model.py, optimize)."""
    resized = [str(value.name) for node in model.graph if node.op_type == "Resize" for value in node.outputs]
    _convert(model.graph, BFLOAT16, resized, cast_weights=True)


def _convert(graph: ir.Graph, narrow: ir.DataType, keep: Collection[str], *, cast_weights: bool) -> None:
    """Type the graph in `narrow`.  Weights are stored in that type, too.  With `cast_weights`, or where a float32 value
    needs the same weight, they stay float32 and are cast in the graph."""
    wide = _float32_values(graph, keep)
    casts = _Casts(graph)
    narrow_uses: dict[ir.Value, list[tuple[ir.Node, int]]] = {}
    wide_weights: set[ir.Value] = set()
    for node in list(graph):
        keeps = any(value in wide for value in node.outputs)
        for position, value in enumerate(node.inputs):
            if value is None or value.dtype not in (FLOAT, narrow) or node.op_type in _SHAPE_ONLY:
                continue
            stays = keeps or (node.op_type == "Resize" and position > 0)
            if value.is_initializer() and stays:
                wide_weights.add(value)
            elif value.is_initializer():
                narrow_uses.setdefault(value, []).append((node, position))
            elif value.dtype != (FLOAT if stays else narrow):
                node.replace_input_with(position, casts.of(value, FLOAT if stays else narrow))
        for value in node.outputs:
            if value.dtype == FLOAT and value not in wide:
                value.dtype = narrow
    for value, uses in narrow_uses.items():
        if cast_weights or value in wide_weights:
            for node, position in uses:
                node.replace_input_with(position, casts.of(value, narrow))
        else:
            _narrow(value)
    for position, value in enumerate(graph.outputs):
        if value.dtype == narrow:
            graph.outputs[position] = casts.at_output(value)


def _float32_values(graph: ir.Graph, keep: Collection[str]) -> set[ir.Value]:
    """The values computed in float32: those named in `keep`, and those that derive, without a product between, from
    one of them, from the timestep, from a cast to float32 that the network itself makes, or from no float at all."""
    wide = {value for value in graph.inputs if value.name == "timestep"}
    for node in graph:
        floats = [value for value in node.inputs if value is not None and value.dtype == FLOAT]
        follows = node.op_type not in _PRODUCTS and any(value in wide for value in floats)
        kept = any(value.name in keep for value in node.outputs)
        if kept or follows or not floats or node.op_type == "Cast":
            wide.update(value for value in node.outputs if value.dtype == FLOAT)
    return wide


class _Casts:
    """The casts put into a graph, at most one for a value and type."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._made: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def of(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """`value` cast to `dtype`, right after it is made."""
        if (value, dtype) not in self._made:
            node = cast(value, dtype)
            producer = value.producer()
            if producer is None:
                self._graph.insert_before(self._graph[0], node)
            else:
                self._graph.insert_after(producer, node)
            self._made[value, dtype] = node.outputs[0]
        return self._made[value, dtype]

    def at_output(self, value: ir.Value) -> ir.Value:
        """The float32 value that takes the name of the graph's output `value`."""
        assert value.dtype is not None
        name = value.name
        value.name = f"{name}/{value.dtype.name.lower()}"
        node = cast(value, FLOAT, f"{name}/to_float")
        node.outputs[0].name = name
        self._graph.append(node)
        return node.outputs[0]


def cast(value: ir.Value, dtype: ir.DataType, name: str | None = None) -> ir.Node:
    """A node that casts `value` to `dtype`; not yet in a graph."""
    name = name or f"{value.name}/to_{dtype.name.lower()}"
    node = ir.node("Cast", [value], {"to": dtype.value}, name=name)
    output = node.outputs[0]
    output.name, output.type, output.shape = name, ir.TensorType(dtype), value.shape
    return node


def _narrow(value: ir.Value) -> None:
    """Make an initializer float16; its numbers are converted when they are read."""
    tensor, shape = value.const_value, value.shape
    assert tensor is not None and tensor.dtype == FLOAT and shape is not None

    def convert() -> ir.TensorProtocol:
        numbers = tensor.numpy()
        size = np.max(np.abs(numbers), where=(numbers > MASKED) | np.isnan(numbers), initial=0)  # NaN if one number is
        if not size <= LARGEST:
            raise ExportError(
                f"weight {value.name} exceeds float16",
                got=float(size),
                accepted=f"up to {LARGEST:g}",
                remedy="export it in float32: --precision fp32",
            )
        return ir.Tensor(np.clip(numbers, -LARGEST, LARGEST).astype(np.float16), name=value.name)

    value.const_value = ir.LazyTensor(convert, FLOAT16, shape, name=value.name)
    value.dtype = FLOAT16
