"""OpenVINO as a backend, on the CPU: all graphs in float32, or in bfloat16 where the processor has it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...bundle.bundle import Bundle
from ...bundle.manifest import EnginePrecision
from ...errors import EngineError
from ..backend import Machine
from ..protocol import Engine
from .engine import CPU, OpenVINOEngine
from .library import import_openvino


def open_openvino(bundle: Bundle, machine: Machine, *, bfloat16: bool = False) -> OpenVINOBackend:
    """DependencyError: OpenVINO is not installed; EngineError: it cannot be had on this device, or not in bfloat16."""
    if machine.device == "cuda" and machine.on_cpu:
        remedy = "choose device auto or cpu, or another backend"
        raise EngineError("device cuda: OpenVINO runs on the CPU", remedy=remedy)
    return OpenVINOBackend(bundle, machine.threads, bfloat16=bfloat16)


class OpenVINOBackend:
    """The plain form of each graph, compiled after its files' digests were checked.

    OpenVINO finds a graph's weights by the graph's path alone, so it reads both from the disk; afterwards it is checked
    that they are still what was verified."""

    def __init__(self, bundle: Bundle, threads: int | None = None, *, bfloat16: bool = False) -> None:
        self.name = "openvino-bf16" if bfloat16 else "openvino"
        self._bundle, self._bfloat16 = bundle, bfloat16
        self._core = import_openvino().Core()
        if bfloat16 and "BF16" not in self._core.get_property(CPU, "OPTIMIZATION_CAPABILITIES"):
            raise EngineError(
                "backend openvino-bf16: this processor has no bfloat16",
                got=self._core.get_property(CPU, "FULL_DEVICE_NAME"),
                remedy="choose the backend openvino, which computes in float32",
            )
        # float32 is asked for, too: left to itself, OpenVINO takes bfloat16 where it is faster
        self._options: dict[str, object] = {"INFERENCE_PRECISION_HINT": "bf16" if bfloat16 else "f32"}
        if threads is not None:
            self._options["INFERENCE_NUM_THREADS"] = threads

    def engine(self, component: str, form: str, fallback: Callable[[], Engine]) -> OpenVINOEngine:
        """For every graph and all of its shapes: `fallback` is not needed."""
        graph = self._bundle.component(component).graph(form)
        files, opened = self._bundle.open_graph(component, form), self._bundle.open_file(graph.path)
        return OpenVINOEngine(self._core, files, opened, graph.inputs, graph.outputs, self._options)

    def batch_sizes(self, most: int, rows: int, latent: tuple[int, ...]) -> Sequence[int]:
        """One by one: more at once gain nothing on a CPU, and take memory in proportion."""
        return (1,)

    def precision(self, component: str) -> EnginePrecision:
        return "bf16" if self._bfloat16 else self._bundle.manifest.precision

    def close(self) -> None:
        del self._core
