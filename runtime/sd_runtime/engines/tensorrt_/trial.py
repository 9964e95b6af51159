"""The first run of an engine that was built without a GPU, compared with the next backend's engine of the same graph.

What came of it is remembered in the user's cache folder, for this engine on this GPU with this library; the bundle
stays as it is.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress

import numpy as np

from ...bundle.bundle import Bundle
from ...bundle.locations import cache_home
from ...bundle.manifest import EnginePrecision, EngineRecord, Graph
from ...errors import DependencyError, EngineError
from ...notices import warn
from ...tensor import Array, Dim, TensorSpec
from ..gpu.gpu import Gpu
from ..protocol import Engine
from .engine import TensorRTEngine
from .library import TensorRT
from .rebuild import rebuild

LIMITS: Mapping[EnginePrecision, float] = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 1e-1}  # |got - expected| / |expected|


class Trial:
    """Tries each engine of a bundle once on one GPU."""

    def __init__(self, library: TensorRT, gpu: Gpu, bundle: Bundle) -> None:
        self._library, self._gpu, self._bundle = library, gpu, bundle
        self._file, self._lock = cache_home() / "tensorrt_rtx" / "compared.json", threading.Lock()
        self._uncompared = False  # whether it was said that engines are used without

    def passes(self, record: EngineRecord, form: str, reference: Callable[[], Engine]) -> bool:
        """Whether an engine may be used; said aloud if not.  `reference` opens what it is compared with; where that
        cannot be had, the engine is used as it is, which is said once."""
        error = self._remembered().get(self._key(record))
        if error is None:
            try:
                other = reference()
            except (DependencyError, EngineError) as missing:
                self._report_uncompared(missing)
                return True
            try:
                error = self._compare(record, other)
            except EngineError as failed:
                warn(f"{failed}; the engine is not used; to build it anew: {self._command()}")
                return False
            self._remember(record, error)
        limit = LIMITS[record.precision]
        if error <= limit:
            return True
        warn(
            f"the engine {record.path} differs from its {form} graph by {error:.1e} on {self._gpu.name}, where up to "
            f"{limit:.0e} is expected, and is not used; to build it anew: {self._command()}"
        )
        return False

    def _report_uncompared(self, missing: Exception) -> None:
        with self._lock:  # several networks are loaded at once
            reported, self._uncompared = self._uncompared, True
        if not reported:
            title = self._library.title
            warn(f"engines of {title} are used without having been compared with their graphs on this GPU: {missing}")

    def _command(self) -> str:
        return f"{rebuild(self._bundle, self._library.name)} --force"

    def _compare(self, record: EngineRecord, other: Engine) -> float:
        """The largest relative difference of an output to that of `other`, which is closed, at the engine's smallest
        shapes; infinite for NaN.  EngineError: one of them does not load or run."""
        graph = self._bundle.component(record.component).graph(record.form)
        inputs = trial_inputs(graph, record)
        try:
            expected = other.run(dict(inputs))
        finally:
            other.close()
        engine = TensorRTEngine(self._library, self._gpu, graph, [record], self._bundle.read_engine, self._command())
        try:
            return difference(engine.run(dict(inputs)), expected)
        finally:
            engine.close()

    def _key(self, record: EngineRecord) -> str:
        digest = self._bundle.manifest.files[record.path].digest
        return f"{digest} {self._gpu.name} {self._library.version}"

    def _remembered(self) -> dict[str, float]:
        try:
            known = json.loads(self._file.read_text())
        except (OSError, ValueError):
            return {}
        return (
            {key: value for key, value in known.items() if isinstance(value, float)} if isinstance(known, dict) else {}
        )

    def _remember(self, record: EngineRecord, error: float) -> None:
        """Several networks are loaded at once."""
        partial = self._file.with_name(f".{self._file.name}.{os.getpid()}")
        with self._lock, suppress(OSError):  # if it cannot be written, it is compared again next time
            known = {**self._remembered(), self._key(record): error}
            self._file.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(known, indent=1))
            partial.replace(self._file)


def trial_inputs(graph: Graph, record: EngineRecord) -> dict[str, Array]:
    """Inputs of an engine's smallest shapes, the same each time."""
    random = np.random.default_rng(0)
    return {spec.name: _values(spec, _smallest(spec, record), random) for spec in graph.inputs}


def _smallest(spec: TensorSpec, record: EngineRecord) -> tuple[int, ...]:
    if spec.name in record.profile:
        return record.profile[spec.name].min
    return tuple(axis.opt if isinstance(axis, Dim) else axis for axis in spec.shape)


def _values(spec: TensorSpec, shape: tuple[int, ...], random: np.random.Generator) -> Array:
    if spec.name == "timestep":
        return np.full(shape, 501, spec.dtype)
    if spec.dtype.startswith("float"):
        return random.standard_normal(shape, np.float32).astype(spec.dtype)
    if spec.name == "input_ids":
        return np.resize(np.arange(256), shape).astype(spec.dtype)
    return np.zeros(shape, spec.dtype)  # indices


def difference(got: Mapping[str, Array], expected: Mapping[str, Array]) -> float:
    """The largest over all outputs of root mean square difference / root mean square expected; infinite for NaN."""
    worst = 0.0
    for name, array in got.items():
        reference = expected[name].astype(np.float64)
        scale = float(np.sqrt(np.mean(reference**2))) or 1.0
        error = float(np.sqrt(np.mean((array - reference) ** 2))) / scale
        worst = max(worst, error if np.isfinite(error) else float("inf"))
    return worst
