"""A finished engine against its ONNX reference: is it right, is it whole, is it as fast as it was before?

Engines differ from build to build, and a wrong one draws plausible noise: each is run once before anyone relies on it.
"""

from __future__ import annotations

import json
import re
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from sd_runtime.engines.device import DeviceEngine
from sd_runtime.errors import ExportError
from sd_runtime.manifest import EnginePrecision
from sd_runtime.tensor import Array, TensorSpec, all_finite

from .build_plan import Job

if TYPE_CHECKING:
    import tensorrt as trt

LIMITS: dict[EnginePrecision, float] = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 1e-1}  # |got - expected| / |expected|
FLAT = 1e-3  # of the reference's deviation: less is a solid colour
RUNS = 10
SLOWER = 1.15  # times the fastest earlier build

# How fused attention shows in an engine's layers, and how what is left of one that was taken apart does.
_FUSED = re.compile(r"mha|flash|attention", re.IGNORECASE)
_APART = re.compile(r"softmax|subexp|expsum", re.IGNORECASE)


@dataclass(frozen=True)
class Attention:
    """How many attentions an engine runs fused, and how many in single steps; a builder may hide both."""

    fused: int
    apart: int


def probe(job: Job) -> dict[str, Array]:
    """Inputs of the shapes that the engine is tuned for: the same for every build."""
    random = np.random.default_rng(0)
    return {spec.name: _values(spec, job.shapes[spec.name], random) for spec in job.graph.inputs}


def _values(spec: TensorSpec, shape: tuple[int, ...], random: np.random.Generator) -> Array:
    if spec.dtype == "float32":
        if spec.name == "timestep":
            return np.full(shape, 501, np.float32)
        return random.standard_normal(shape, np.float32)
    if spec.name == "input_ids":
        return np.resize(np.arange(256), shape).astype(spec.dtype)
    return np.zeros(shape, spec.dtype)  # indices


def compare(job: Job, got: Mapping[str, Array], expected: Mapping[str, Array] | None) -> float | None:
    """The largest relative difference of an output to the reference's, or None without one.

    ExportError, and the engine is not to be used: NaN, a solid colour, or further from the reference than LIMITS."""
    worst = None
    for name, array in got.items():
        remedy = f"build again; if it persists, use another --precision than {job.precision}"
        if not all_finite(array):
            raise ExportError(f"the engine {job.label} gives NaN or infinity in '{name}'", remedy=remedy)
        if expected is None or not array.size:
            continue
        reference = expected[name].astype(np.float64)
        if array.size > 1 and array.std() < FLAT * reference.std():
            raise ExportError(f"the engine {job.label} gives the same number everywhere in '{name}'", remedy=remedy)
        scale = float(np.sqrt(np.mean(reference**2))) or 1.0
        error = float(np.sqrt(np.mean((array - reference) ** 2))) / scale
        worst = max(error, worst or 0.0)
        if error > LIMITS[job.precision]:
            what = f"the engine {job.label} differs from its ONNX graph in '{name}'"
            raise ExportError(what, got=f"{error:.1e}", accepted=f"up to {LIMITS[job.precision]:.0e}", remedy=remedy)
    return worst


def milliseconds(engine: DeviceEngine, inputs: Mapping[str, Array]) -> float:
    """The median time of a run on the GPU, as the device loop runs it: recorded once and replayed."""
    outputs = engine.run(dict(inputs))
    tensors = {name: engine.tensor(name, array.shape) for name, array in {**inputs, **outputs}.items()}
    first_output = next(iter(outputs))
    try:
        for name, array in inputs.items():
            tensors[name].write(array)
        launch = engine.prepare(tensors)
        recorded = engine.device.record([launch])
        times = []
        for _ in range(RUNS):
            start = time.perf_counter()
            recorded()
            tensors[first_output].read(1).wait()
            times.append(time.perf_counter() - start)
        recorded.close()
        launch.close()
    finally:
        for tensor in tensors.values():
            tensor.close()
    return statistics.median(times) * 1e3


def attention(engine: trt.ICudaEngine) -> Attention:
    """What the engine inspector shows of attention; built with less than detailed verbosity, it shows nothing."""
    import tensorrt as trt

    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    fused = apart = 0
    for layer in json.loads(text).get("Layers", []):
        if not isinstance(layer, dict):
            continue
        kernel = f"{layer.get('LayerType', '')} {layer.get('TacticName', '')}"
        name = str(layer.get("Name", ""))
        kernel += f" {name}" if name.startswith("_") else ""  # named by the compiler, not after the graph
        if _FUSED.search(kernel):
            fused += 1
        elif _APART.search(f"{kernel} {name.rpartition('/')[2]}"):
            apart += 1
    return Attention(fused, apart)


def slower_than_before(job: Job, source: str, took: float, history: Path) -> str | None:
    """A remark if earlier builds from the same `source` (digests of graph and weights) were much faster; `history` is a
    JSON file that remembers the fastest, in milliseconds."""
    try:
        known = json.loads(history.read_text())
    except (OSError, ValueError):
        known = {}
    key = " ".join((job.label, job.form, job.precision, source[:16]))
    best = known.get(key) if isinstance(known, dict) else None
    if not isinstance(best, float) or took < best:
        known = {**(known if isinstance(known, dict) else {}), key: took}
        history.parent.mkdir(parents=True, exist_ok=True)
        history.write_text(json.dumps(known, indent=1))
    if isinstance(best, float) and took > SLOWER * best:
        return f"{took:.1f} ms a run, where an earlier build took {best:.1f} ms: build again, with the GPU to itself"
    return None
