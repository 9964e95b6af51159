"""TensorRT 8.5 to 11, and TensorRT for RTX: engines deserialised once, contexts that run them.  Only here are the
libraries themselves touched.

The name-based calls (set_input_shape, set_tensor_address, execute_async_v3) are the only ones that all of them have.
Where libraries and versions differ, they are told apart by what they have, never by a number; the newer way is tried
first, and the comment says since when it exists.  Weights belong to the engine, activations to the context: contexts
bring no memory of their own but borrow the GPU's arena.

A serialized engine is executable content.  Host code in it stays forbidden, and only bytes that were verified get here.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from ...bundle.manifest import EngineLibrary, Target
from ...errors import DependencyError, EngineError, one_line
from ..gpu.gpu import Gpu, failure
from ..gpu.memory import ArenaBlock, GpuTensor
from .kernels import KernelCache, specialised_context

if TYPE_CHECKING:
    import tensorrt as trt

DTYPES = {"FLOAT": "float32", "HALF": "float16", "INT32": "int32", "INT64": "int64", "UINT8": "uint8", "BOOL": "bool"}
TITLES: Mapping[EngineLibrary, str] = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT for RTX"}

Shapes = Mapping[str, tuple[int, ...]]


class TensorRT:
    """One of the libraries, opened: what it logs is collected, to say why a call failed.

    trt  its module"""

    def __init__(self, name: EngineLibrary = "tensorrt") -> None:
        """DependencyError: it is not installed, or what it needs does not load; EngineError: it finds no GPU."""
        self.name, self.title = name, TITLES[name]
        try:
            self.trt: Any = import_module(name)
        except (ImportError, OSError) as error:  # OSError: the package is there, a library that it needs is not
            remedy = f'pip install "sd-lean[{name.replace("_", "-")}]"'
            raise DependencyError(f"{self.title} does not load ({one_line(str(error))})", remedy=remedy) from error
        self.version = str(self.trt.__version__)
        self.errors = ErrorLog()
        self._logger = collecting_logger(self.trt, self.errors)
        self._cache: KernelCache | None = None
        try:
            self._runtime = self.trt.Runtime(self._logger)
        except TypeError as error:  # pybind11's for "no object was made"
            raise self.failure(f"{self.title} does not start") from error
        if hasattr(self._runtime, "engine_host_code_allowed"):  # since 8.6; before, engines could not hold any
            self._runtime.engine_host_code_allowed = False

    def load(self, name: str, plan: bytes, gpu: Gpu) -> LoadedEngine:
        """Put an engine's weights on the GPU.  `name` is for messages; EngineError, OutOfMemoryError."""
        with gpu.turn(f"loading the TensorRT engine {name}"):
            self._check_validity(name, plan)
            engine: trt.ICudaEngine | None = self._runtime.deserialize_cuda_engine(plan)
            if engine is None:
                raise self.failure(f"cannot load the TensorRT engine {name}")
            return LoadedEngine(self, gpu, name, engine)

    def _check_validity(self, name: str, plan: bytes) -> None:
        """EngineError: by its header the engine is for other GPUs, or of a version that this one does not read."""
        if not hasattr(self._runtime, "get_engine_validity"):  # TensorRT for RTX
            return
        validity, diagnostics = self._runtime.get_engine_validity(plan)
        if validity == self.trt.EngineValidity.INVALID:
            what = f"{self.title} {self.version} finds the engine {name} invalid on this GPU ({diagnostics})"
            raise EngineError(what)

    def create_context(self, engine: Any, gpu: Gpu) -> Any:
        """A context without memory for activations; None: it cannot be made."""
        trt = self.trt
        if hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):  # TensorRT for RTX
            if self._cache is None:
                self._cache = KernelCache(f"{gpu.name} sm{gpu.compute_capability} {self.version}")
            return specialised_context(trt, engine, self._cache)
        if hasattr(trt, "ExecutionContextAllocationStrategy"):  # since 10.0
            create: Callable[..., Any] = engine.create_execution_context
            return create(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if hasattr(engine, "create_execution_context_without_device_memory"):  # until 10
            return engine.create_execution_context_without_device_memory()
        raise EngineError(self.title, got=self.version, accepted="8.5 to 11")

    def failure(self, what: str) -> EngineError:
        """What the library has logged since the last failure, as an error."""
        return failure(what, self.errors.take() or f"{self.title} gives no reason")

    def close(self) -> None:
        """Let go of the library's runtime; its engines must have been closed."""
        if self._cache is not None:
            self._cache.save()
            self._cache = None
        del self._runtime


class ErrorLog:
    """The last errors that TensorRT logged, from whatever thread."""

    def __init__(self) -> None:
        self._messages: deque[str] = deque(maxlen=8)
        self._lock = threading.Lock()

    def add(self, message: str) -> None:
        with self._lock:
            self._messages.append(one_line(message, 400))

    def take(self) -> str:
        with self._lock:
            text = "; ".join(self._messages)
            self._messages.clear()
        return text


def collecting_logger(trt: Any, errors: ErrorLog) -> Any:
    """A logger that keeps errors and drops the rest: warnings are for whoever builds engines.  That there is no GPU is
    one of these."""

    class Collector(trt.ILogger):  # type: ignore[misc]  # which type checkers only know where TensorRT is installed
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
            failed = severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR)
            if failed or "CUDA initialization failure" in msg:
                errors.add(msg)

    return Collector()


def current_target(library: TensorRT, gpu: Gpu) -> Target:
    """What an engine built here and now would be for."""
    from cuda.bindings.driver import cuDriverGetVersion
    from cuda.core import system

    _, cuda = cuDriverGetVersion()  # 13020 is 13.2
    driver = "unknown"
    with suppress(Exception):  # it asks NVML, which is missing in some containers, and has errors without a common base
        driver = ".".join(map(str, system.get_kernel_mode_driver_version()))
    return Target(
        gpu=gpu.name,
        compute_capability=gpu.compute_capability,
        tensorrt=library.version,
        cuda=f"{cuda // 1000}.{cuda % 1000 // 10}",
        driver=driver,
        library=library.name,
    )


class LoadedEngine:
    """An engine whose weights lie on the GPU, once, however many contexts run it."""

    def __init__(self, library: TensorRT, gpu: Gpu, name: str, engine: trt.ICudaEngine) -> None:
        self.library, self.gpu, self.name = library, gpu, name
        self._engine: trt.ICudaEngine | None = engine
        self._contexts: dict[tuple[tuple[str, tuple[int, ...]], ...], Context] = {}
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        reads = library.trt.TensorIOMode.INPUT
        self.inputs = tuple(name for name in names if engine.get_tensor_mode(name) == reads)
        self.outputs = tuple(name for name in names if name not in self.inputs)

    @property
    def engine(self) -> trt.ICudaEngine:
        if self._engine is None:
            raise EngineError(f"the engine {self.name} was closed")
        return self._engine

    def dtype(self, name: str) -> np.dtype[Any]:
        """The type of an input or output; TensorRT 8 has int32 where the graph has int64."""
        kind = self.engine.get_tensor_dtype(name).name
        if kind not in DTYPES:
            raise EngineError(f"engine {self.name}: type of tensor '{name}'", got=kind, accepted=", ".join(DTYPES))
        return np.dtype(DTYPES[kind])

    @property
    def exact(self) -> bool:
        """Whether the engine takes one shape of each input only."""
        ranges = [self.engine.get_tensor_profile_shape(name, 0) for name in self.inputs]
        return all(low[:] == high[:] for low, _, high in ranges)

    @property
    def many_contexts(self) -> bool:
        """Whether each shape can have a context of its own; otherwise one context is told the shapes anew each time."""
        return hasattr(self.library.trt, "ExecutionContextAllocationStrategy")  # since 10.0, like this freedom

    def context(self, shapes: Shapes) -> Context:
        """The context for these input shapes, with all of its outputs' shapes known.  Release it when done."""
        key = tuple(sorted(shapes.items())) if self.many_contexts else ()
        if key not in self._contexts:
            self._contexts[key] = Context(self)
        context = self._contexts[key]
        context.set_shapes(shapes)
        context.users += 1
        return context

    def release(self, context: Context) -> None:
        """One user less; without any, the context is closed."""
        context.users -= 1
        if not context.users:
            self._contexts = {key: known for key, known in self._contexts.items() if known is not context}
            context.close()

    def close(self) -> None:
        for context in self._contexts.values():
            context.close()
        self._contexts.clear()
        self._engine = None


class Context:
    """An execution context: an engine at work on one set of shapes, on the GPU's one stream."""

    def __init__(self, loaded: LoadedEngine) -> None:
        self._loaded = loaded
        self._context: trt.IExecutionContext | None = loaded.library.create_context(loaded.engine, loaded.gpu)
        if self._context is None:
            raise loaded.library.failure(f"cannot create a context for the engine {loaded.name}")
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._activation_memory = 0  # bytes, for the current shapes
        self._block: ArenaBlock | None = None
        self.users = 0

    @property
    def context(self) -> trt.IExecutionContext:
        if self._context is None:
            raise EngineError(f"the engine {self._loaded.name} was closed")
        return self._context

    def set_shapes(self, shapes: Shapes) -> None:
        """Choose the inputs' shapes; nothing is done where they are chosen already."""
        if self._shapes == shapes:
            return
        trt = self._loaded.library.trt
        if self._shapes:
            self._loaded.gpu.stream.sync()  # what is under way needs the old ones
        for name, shape in shapes.items():
            if not self.context.set_input_shape(name, trt.Dims(list(shape))):
                what = f"engine {self._loaded.name} does not take '{name}' of shape {shape}"
                raise self._loaded.library.failure(what)
        self._shapes = dict(shapes)
        self._activation_memory = activation_memory(self._loaded.engine, self.context)
        self._block = None

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape that an output has for the inputs' shapes."""
        return tuple(self.context.get_tensor_shape(name)[:])

    @property
    def capturable(self) -> bool:
        """Whether its runs may be recorded, where the library can tell: TensorRT for RTX."""
        context: Any = self.context
        if not hasattr(context, "is_stream_capturable"):
            return True
        return bool(context.is_stream_capturable(int(self._loaded.gpu.stream.handle)))

    def enqueue(self, tensors: Mapping[str, GpuTensor]) -> None:
        """Queue one run from and to `tensors`, which name every input and output."""
        context, gpu = self.context, self._loaded.gpu
        for name, tensor in tensors.items():
            if not context.set_tensor_address(name, tensor.address):
                raise self._loaded.library.failure(f"engine {self._loaded.name} does not take a tensor '{name}'")
        block = gpu.arena.block(self._activation_memory)
        if block is not self._block:
            set_activation_memory(context, block)
            self._block = block
        if not context.execute_async_v3(int(gpu.stream.handle)):
            raise self._loaded.library.failure(f"the engine {self._loaded.name} failed to start")

    def close(self) -> None:
        with self._loaded.gpu.closing():
            self._loaded.gpu.stream.sync()  # what is under way needs it
        self._context = None


def activation_memory(engine: trt.ICudaEngine, context: trt.IExecutionContext) -> int:
    """Bytes that a run of `context` needs: for its shapes where TensorRT tells, else for the largest."""
    if hasattr(context, "update_device_memory_size_for_shapes"):  # since 10.0
        return int(context.update_device_memory_size_for_shapes())
    if hasattr(engine, "device_memory_size"):  # until 10
        return int(engine.device_memory_size)
    return 0


def set_activation_memory(context: trt.IExecutionContext, block: ArenaBlock) -> None:
    if hasattr(context, "set_device_memory"):  # since 10.1
        context.set_device_memory(block.address, block.size)
    else:
        setattr(context, "device_memory", block.address)  # noqa: B010 - can only be written, so no stub names it
