"""Which layers of a network leave float16's range, so that they stay float32 and no picture turns black.

The VAEs of some checkpoints reach values beyond 65504 in a few layers: the sum becomes infinite, the next normalisation
NaN, the picture black.  Here the float32 graph is run once on inputs of the kinds that it will meet, with the largest
magnitude of every intermediate value as an output of its own, attention's scores included.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from sd_runtime.errors import ExportError
from sd_runtime.tensor import Array

from .forms.attention import decompose_attention
from .forms.editor import Editor
from .precision import FLOAT, FLOAT16, LARGEST

HEADROOM = 4  # inputs met later may be this much more extreme than the probes


def float32_values(model: ir.Model, probes: Sequence[Array]) -> frozenset[str]:
    """The names of values that come near to float16's limit, in a float32 graph with one input.  Without probes nothing
    is run."""
    if not probes:
        return frozenset()
    limit = LARGEST / HEADROOM
    names = {value.name for node in model.graph for value in node.outputs}
    reached: dict[str, float] = {}
    for name, peak in peaks(model, probes).items():
        while name not in names:  # part of an attention that was taken apart
            name = name.rpartition("/")[0]
        reached[name] = max(peak, reached.get(name, 0))
    return frozenset(name for name, peak in reached.items() if not peak < limit)


def require_finite(graph: Path, probes: Sequence[Array]) -> None:
    """Run the finished graph on the probes.  ExportError: a value still becomes infinite or NaN.

    Every value is examined, not only the result: on the CPU, ONNX Runtime computes float16 graphs in float32 and
    rounds only what leaves them."""
    if not probes:
        return
    wrong = [name for name, peak in peaks(ir.load(graph), probes).items() if not np.isfinite(peak)]
    if wrong:
        what = f"{graph.parent.name} overflows float16 at {wrong[0]}"
        raise ExportError(what, remedy="export with --precision fp32")


def peaks(model: ir.Model, probes: Sequence[Array]) -> dict[str, float]:
    """The largest magnitude that each float value takes on any of the probes; `model` is left as it is."""
    probed = ir.external_data.load_to_model(model.clone())
    editor = Editor(probed)
    decompose_attention(editor)
    names = _observe(editor)
    (source,) = probed.graph.inputs
    session = _session(ir.to_proto(probed).SerializeToString())
    runs = [session.run([f"{name}/peak" for name in names], {source.name: probe}) for probe in probes]
    return {name: float(np.max([run[i] for run in runs])) for i, name in enumerate(names)}


def _observe(editor: Editor) -> list[str]:
    """Make the largest magnitude of every float value an output, named after it with `/peak` behind."""
    names = []
    for node in list(editor.graph):
        value = node.outputs[0]
        if value.dtype not in (FLOAT, FLOAT16) or value.name is None:
            continue
        magnitude = ir.node("Abs", [value], name=f"{value.name}/magnitude")
        peak = ir.node("ReduceMax", [magnitude.outputs[0]], {"keepdims": 0}, name=f"{value.name}/peak")
        peak.outputs[0].name = peak.name
        peak.outputs[0].type, peak.outputs[0].shape = ir.TensorType(value.dtype), ir.Shape([])
        editor.graph.insert_after(node, (magnitude, peak))
        editor.graph.outputs.append(peak.outputs[0])
        names.append(value.name)
    return names


def _session(model: bytes) -> Any:
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)  # errors only: a warning for every output that nothing else reads
    return onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
