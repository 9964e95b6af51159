"""A module and its signature → an ONNX graph with readable, stable names and no trace of the machine that made it.

The weights are still torch's memory: nothing is copied before `weights.save` writes them.
"""

from __future__ import annotations

import ast
import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeGuard

import onnx_ir as ir
import torch
from sd_runtime.errors import ExportError, one_line
from sd_runtime.tensor import Dim, TensorSpec
from torch import nn

from ..signature import SPREAD, Signature, trace_shape

OPSET = 23  # the first with Attention; GroupNormalization and Gelu are whole operators too

# torch.export spells a module reached through diffusers' attribute fallback as unet.__dict__['_modules']['conv_in'].
_MODULES = re.compile(r"\.__dict__\['_modules'\]\['([^']+)'\]")
_SCOPES = "pkg.torch.onnx.name_scopes"


def trace(module: nn.Module, signature: Signature, *, root: str = "", pixels: int = 8) -> ir.Model:
    """Export `module` (float32, evaluation mode) as an ONNX graph that follows `signature`.

    `root` is the attribute whose name is left out of the weights' keys; `pixels` the side of a latent cell.
    ExportError if torch cannot trace it or the graph does not have the declared tensors and dynamic axes."""
    examples = tuple(_example(spec, pixels) for spec in signature.inputs)
    symbols = tuple(_dynamic_axes(spec) for spec in signature.inputs)
    try:
        with _quiet():
            # Captured here and not by torch.onnx.export, whose first attempt fails on the UNet after half of the time.
            varying = tuple(dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for axes in symbols)
            captured = torch.export.export(module, examples, dynamic_shapes=varying, strict=False)
            program = torch.onnx.export(
                captured,
                dynamo=True,
                opset_version=OPSET,
                input_names=[spec.name for spec in signature.inputs],
                output_names=[spec.name for spec in signature.outputs],
                dynamic_shapes=symbols,
                verbose=False,
            )
    except Exception as error:  # torch raises many kinds
        what = f"torch cannot trace {type(module).__name__} ({type(error).__name__}: {one_line(str(error))})"
        raise ExportError(what, remedy="SD_DEBUG=1 shows torch's report") from error
    assert program is not None
    model = program.model
    _fix_edge(model.graph, signature)
    _rename(model.graph, module, root)
    _strip(model)
    return model


def _example(spec: TensorSpec, pixels: int) -> torch.Tensor:
    return torch.zeros(trace_shape(spec, pixels), dtype=getattr(torch, spec.dtype))


def _dynamic_axes(spec: TensorSpec) -> dict[int, str]:
    return {axis: size.symbol for axis, size in enumerate(spec.shape) if _varies(size)}


def _varies(axis: int | Dim) -> TypeGuard[Dim]:
    """Whether an axis varies in the trace, too: torch would bind one that is spread over the batch to the batch."""
    return isinstance(axis, Dim) and axis.symbol not in SPREAD


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on optional packages and on torch's own deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _fix_edge(graph: ir.Graph, signature: Signature) -> None:
    """Check the graph's inputs and outputs against the signature, axis by axis, and write its symbols into them.

    An axis that should vary but was frozen by the trace is found here, not by the first user of another size."""
    for values, specs in ((graph.inputs, signature.inputs), (graph.outputs, signature.outputs)):
        assert len(values) == len(specs)
        for value, spec in zip(values, specs, strict=True):
            traced = tuple(value.shape or ())
            fits = len(traced) == len(spec.shape) and all(
                isinstance(got, ir.SymbolicDim) if _varies(axis) else got == (1 if isinstance(axis, Dim) else axis)
                for got, axis in zip(traced, spec.shape, strict=True)
            )
            if value.name != spec.name or not fits or value.dtype != ir.DataType[DTYPES[spec.dtype]]:
                raise ExportError(
                    "traced tensor", got=f"{value.name} {value.dtype} {traced}", accepted=f"{spec.name} {spec}"
                )
            value.shape = ir.Shape([axis.symbol if isinstance(axis, Dim) else axis for axis in spec.shape])


DTYPES = {"float32": "FLOAT", "float16": "FLOAT16", "int64": "INT64"}


def _rename(graph: ir.Graph, module: nn.Module, root: str) -> None:
    """Name nodes after their module and operator, values after their node, constants after their first use.

    `down_blocks.0.resnets.0.conv1/Conv` says where it comes from, and does not change when another layer does.  A
    linear layer's weight that the exporter stored transposed is `<key>.T`; other weights keep their key."""
    prefix = f"{root}." if root else ""
    names = _Names()
    edge = {*graph.inputs, *graph.outputs}
    keys = module.state_dict().keys()
    weights = [value for value in graph.initializers.values() if value.name in keys]
    named = set(weights)
    for weight in weights:  # in the graph's order, not the set's: renaming moves an initializer to the end
        weight.name = names.unique(str(weight.name).removeprefix(prefix))
    for node, scope in _scopes(graph, module).items():
        inside = scope.removeprefix(prefix) if scope != root else ""
        node.name = names.unique(f"{inside}/{node.op_type}" if inside else node.op_type)
        for position, value in enumerate(node.inputs):
            if value is None or not value.is_initializer() or value in named:
                continue
            named.add(value)
            transposed = node.op_type == "MatMul" and position == 1 and f"{scope}.weight" in keys
            value.name = names.unique(f"{inside}.weight.T" if transposed else f"{node.name}.{position}")
        for position, value in enumerate(node.outputs):
            if value not in edge:
                value.name = node.name if len(node.outputs) == 1 else f"{node.name}:{position}"


class _Names:
    """Hands out names, each once: name, name_2, name_3."""

    def __init__(self) -> None:
        self._used: Counter[str] = Counter()

    def unique(self, name: str) -> str:
        self._used[name] += 1
        return name if self._used[name] == 1 else f"{name}_{self._used[name]}"


def _scopes(graph: ir.Graph, module: nn.Module) -> dict[ir.Node, str]:
    """The path of the module that each node was traced from; a node that the exporter made itself takes its input's."""
    paths = {path for path, _ in module.named_modules()}
    scopes: dict[ir.Node, str] = {}
    for node in graph:
        if _SCOPES in node.metadata_props:
            *_, path, _operator = ast.literal_eval(node.metadata_props[_SCOPES])
            path = _MODULES.sub(r".\1", path)
        else:
            producers = [value.producer() for value in node.inputs if value is not None]
            path = next((scopes[producer] for producer in producers if producer is not None), "")
        scopes[node] = path if path in paths else ""
    return scopes


def _strip(model: ir.Model) -> None:
    """Drop everything that holds source lines, stack traces and paths, or differs between runs."""
    graph = model.graph
    model.doc_string = graph.doc_string = None
    graph.name = "main"
    values = [*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)]
    for item in (model, graph, *graph, *values):
        item.metadata_props.clear()
        item.doc_string = None
