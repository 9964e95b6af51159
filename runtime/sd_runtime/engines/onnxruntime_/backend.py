"""ONNX Runtime as a backend: on the GPU where its CUDA provider works, else on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from ...bundle.bundle import Bundle
from ...bundle.manifest import EnginePrecision
from ...errors import DependencyError, EngineError, OutOfMemoryError
from ...notices import warn
from ..backend import Machine
from ..protocol import Engine
from .cpu import OnnxRuntimeEngine
from .installation import check_only_one
from .library import has_cuda, import_onnxruntime

if TYPE_CHECKING:
    from ..gpu.gpu import Gpu


def open_onnxruntime(bundle: Bundle, machine: Machine) -> OnnxRuntimeBackend:
    """DependencyError, EngineError: the device that was asked for cannot be had."""
    if machine.device == "cpu":
        return OnnxRuntimeBackend(bundle, machine.threads)
    if machine.on_cpu:
        return OnnxRuntimeBackend(bundle, machine.threads, _open_gpu(machine))
    return OnnxRuntimeBackend(bundle, machine.threads, machine.gpu())  # which TensorRT's engines run on


class OnnxRuntimeBackend:
    """A session for each graph, each only after its files' digests were checked."""

    name = "onnxruntime"

    def __init__(self, bundle: Bundle, threads: int | None = None, gpu: Gpu | None = None) -> None:
        """`gpu`: used where the installed ONNX Runtime is a build for GPUs."""
        self._bundle, self._threads, self._offered = bundle, threads, gpu

    @cached_property
    def _gpu(self) -> Gpu | None:
        try:
            return self._offered if self._offered is not None and has_cuda() else None
        except DependencyError:  # TensorRT does without ONNX Runtime what it has engines for
            return None

    def engine(self, component: str, form: str, fallback: Callable[[], Engine]) -> Engine:
        """A session; for the plain graph, of the form that is written for the device, where there is one."""
        import_onnxruntime()
        tuned = "cpu" if self._gpu is None else "cuda"
        if form != "plain" or tuned not in self._bundle.component(component).graphs:
            return self._session(component, form)
        try:
            return self._session(component, tuned)
        except OutOfMemoryError:
            raise
        except EngineError as error:
            warn(f"{error}; the plain graph of {component} is used instead, which is slower")
            return self._session(component, form)

    def _session(self, name: str, form: str) -> Engine:
        bundle, component = self._bundle, self._bundle.component(name)
        if self._gpu is None:
            return cpu_engine(bundle, name, form, self._threads)
        from .cuda import OnnxRuntimeCudaEngine

        graph = component.graph(form)
        return OnnxRuntimeCudaEngine(
            self._gpu,
            bundle.open_graph(name, form),
            graph.inputs,
            graph.outputs,
            float16=component.weights is not None and bundle.manifest.precision == "fp16",
        )

    def batch_sizes(self, most: int, rows: int, latent: tuple[int, ...]) -> Sequence[int]:
        """On the CPU one by one: more at once gain nothing there, and take memory in proportion."""
        return (1,) if self._gpu is None else range(1, most + 1)

    def precision(self, component: str) -> EnginePrecision:
        return self._bundle.manifest.precision

    def close(self) -> None: ...


def cpu_engine(bundle: Bundle, component: str, form: str, threads: int | None = None) -> OnnxRuntimeEngine:
    """ONNX Runtime on the CPU for one of a component's graphs."""
    graph = bundle.component(component).graph(form)
    return OnnxRuntimeEngine(
        bundle.open_graph(component, form),
        graph.inputs,
        graph.outputs,
        float16=bundle.manifest.precision == "fp16",
        threads=threads,
    )


def _open_gpu(machine: Machine) -> Gpu | None:
    """The GPU for ONNX Runtime; None for the CPU: if it is a build for CPUs, or, with a warning, if no GPU is usable.
    DependencyError, EngineError: there is none, and device is "cuda", or there is one that cannot be used for want of
    libraries."""
    needed = machine.device == "cuda"
    if not has_cuda():
        try:
            check_only_one()
        except DependencyError as error:  # a build for GPUs is installed, too, and hidden by the one for CPUs
            if needed:
                raise
            warn(f"{error}; the CPU is used instead")
        if not needed:
            return None
        raise DependencyError(
            "device cuda: this ONNX Runtime has no CUDA provider",
            remedy='pip uninstall -y onnxruntime, then pip install "sd-lean[gpu]"',
        )
    from .cuda import check_driver, load_cuda_libraries

    try:
        check_driver()
        gpu = machine.gpu()
    except (DependencyError, EngineError) as error:
        if needed:
            raise
        warn(f"{error}; the CPU is used instead")
        return None
    try:
        load_cuda_libraries()
    except BaseException:
        machine.close()
        raise
    return gpu
