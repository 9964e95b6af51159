"""ONNX Runtime as an engine on the CPU, weights memory-mapped from the bundle.

The graph's bytes come verified from the bundle; its weights stay in their .safetensors, which ONNX Runtime maps into
memory, so that a second process shares the pages.  Pre-packing copies every weight into a private, re-ordered buffer:
10 % faster, but seconds of loading and gigabytes of private memory at Stable Diffusion's size: only
small models get it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...bundle.bundle import GraphFiles
from ...tensor import Array, TensorSpec
from ..host_runs import HostRuns
from ..protocol import Feed
from .library import CPU, import_onnxruntime, open_session, translate

PREPACK_LIMIT = 64 << 20  # bytes of weights up to which pre-packing costs too little to matter


class OnnxRuntimeEngine:
    """One graph in one ONNX Runtime session; see `Engine` for the contract."""

    def __init__(
        self,
        files: GraphFiles,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        *,
        float16: bool = False,
        threads: int | None = None,
    ) -> None:
        """`float16`: whether the weights are.  EngineError: the graph does not load; BundleError: the weights are not
        those that were verified."""
        self.inputs, self.outputs = inputs, outputs
        self._name, self._runs = files.name, HostRuns(files, inputs, outputs)
        small = files.weights is None or files.weights.size <= PREPACK_LIMIT
        options = _cpu_options(prepack=small, threads=threads)
        options.enable_cpu_mem_arena = not float16  # it would keep what is widened for each call: every weight
        self._session = open_session(files, inputs, outputs, options, [CPU])

    def place(self, name: str, array: Array) -> Feed:
        """`array` itself: it is where the graph reads it."""
        next(spec for spec in self.inputs if spec.name == name).check(array)
        return array

    def run(self, feeds: Mapping[str, Feed]) -> dict[str, Array]:
        session = self._session

        def run() -> dict[str, Array]:
            names = [spec.name for spec in self.outputs]
            try:
                results: list[Array] = session.run(names, dict(feeds))
            except Exception as error:  # ONNX Runtime's exceptions have no common base but Exception
                raise translate(error, f"{self._name} failed while running") from error
            return dict(zip(names, results, strict=True))

        return self._runs(feeds, run)

    def close(self) -> None:
        """Release the session and its memory, once nobody runs it."""
        self._runs.close()
        self._session = None


def _cpu_options(*, prepack: bool, threads: int | None) -> Any:
    ort = import_onnxruntime()
    options, levels = ort.SessionOptions(), ort.GraphOptimizationLevel
    # ALL also re-orders weights for the processor: a seventh faster, and private
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if prepack else levels.ORT_ENABLE_EXTENDED
    if threads is not None:
        options.intra_op_num_threads = threads
    if not prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    return options
