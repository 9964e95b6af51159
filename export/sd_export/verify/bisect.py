"""In which layer of a network the drift starts: every layer's output against torch's.

The nodes of a plain graph are named after the modules that they were traced from, so a layer's output is the last value
of its nodes.  Those values become outputs of the graph, which then runs next to the torch module with a hook on each
layer.  A layer is a module without modules of its own that is called once.

Both sides run on the CPU.  An engine may fuse operators, except across the values that are outputs now: if the graph's
outputs are beyond their limits and no layer is, look for the fault in such a fusion.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import torch
from sd_runtime.bundle.bundle import Bundle
from sd_runtime.engines.onnxruntime_.cpu import OnnxRuntimeEngine
from sd_runtime.tensor import Array, Dim, TensorSpec

from ..networks.registry import find
from ..source import Checkpoint
from .measures import measure
from .reference import Case, Reference
from .report import Drift, LayerError, Row

ONNX_DTYPES = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.FLOAT16: "float16"}


def bisect(bundle: Bundle, checkpoint: Checkpoint, reference: Reference, case: Case, row: Row) -> Drift:
    """Compare every layer of the network of `case`, on its inputs; layers come in the order of their execution.

    `row` is the comparison of the network's output.  A layer's limit lies half way, in orders of magnitude, between the
    row's limit and its error, so that neither rounding nor a consequence of the drift is taken for its start."""
    feeds = reference.feeds(case)
    network = find(case.component).load(checkpoint)
    prefix = f"{network.root}." if network.root else ""
    expected = {name.removeprefix(prefix): value for name, value in layer_outputs(network.module, feeds).items()}
    ours = graph_outputs(bundle, case.component, feeds, expected)
    errors = [LayerError(name, measure(ours[name], expected[name]).relative) for name in expected if name in ours]
    return Drift(case.component, case.name, layer_limit(row), tuple(errors))


def layer_limit(row: Row) -> float:
    """The relative error at which a layer counts as drifting; 1 where the end is not even finite."""
    allowed, found = row.limit.value, row.measure.relative
    return math.sqrt(allowed * max(found, allowed)) if math.isfinite(found) else 1.0


def layer_outputs(module: torch.nn.Module, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """The output of each layer that is called once, by its path, in the order of the calls."""
    outputs: dict[str, Array] = {}
    calls: Counter[str] = Counter()

    def remember(name: str, output: Any) -> None:
        calls[name] += 1
        if isinstance(output, torch.Tensor):
            outputs[name] = output.numpy()

    layers = [(name, layer) for name, layer in module.named_modules() if name and not any(layer.children())]
    hooks = [
        layer.register_forward_hook(lambda _, inputs, output, name=name: remember(name, output))
        for name, layer in layers
    ]
    try:
        with torch.no_grad():
            module(**{name: torch.from_numpy(np.array(array)) for name, array in feeds.items()})
    finally:
        for hook in hooks:
            hook.remove()
    return {name: value for name, value in outputs.items() if calls[name] == 1}


def graph_outputs(
    bundle: Bundle, component: str, feeds: Mapping[str, Array], expected: Mapping[str, Array]
) -> dict[str, Array]:
    """What the bundle's plain graph has at the end of each layer in `expected`, where the shapes agree."""
    graph, files = bundle.component(component).graph(), bundle.open_graph(component)
    model = onnx.load_model_from_string(files.content)
    last = {}  # layer → the last value of its nodes
    for node in model.graph.node:
        layer = node.name.rpartition("/")[0]
        if layer in expected and len(node.output) == 1:
            last[layer] = node.output[0]
    known = {value.name: value for value in (*model.graph.value_info, *model.graph.output)}
    present = {value.name for value in model.graph.output}
    shown = {layer: name for layer, name in last.items() if name in known and _dtype(known[name]) is not None}
    model.graph.output.extend(known[name] for name in dict.fromkeys(shown.values()) if name not in present)
    specs = tuple(_spec(known[name]) for name in dict.fromkeys(shown.values()))
    engine = OnnxRuntimeEngine(replace(files, content=model.SerializeToString()), graph.inputs, specs)
    try:
        results = engine.run(feeds)
    finally:
        engine.close()
    return {layer: results[name] for layer, name in shown.items() if results[name].shape == expected[layer].shape}


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    """A value of known type and number of axes, of whatever sizes."""
    axes = len(value.type.tensor_type.shape.dim)
    shape = tuple(Dim(f"axis {i}", 1, 1, 1 << 31) for i in range(axes))
    return TensorSpec(value.name, str(_dtype(value)), shape)


def _dtype(value: onnx.ValueInfoProto) -> str | None:
    return ONNX_DTYPES.get(value.type.tensor_type.elem_type)
