"""TensorRT made of ONNX Runtime: the name-based API of versions 8.5 to 11, on top of `fake_cuda`.

A serialized engine is JSON: which .onnx to run, for which shapes, and what it was built for.  What real engines leave
undefined is an error here: running into one's own input, a context entered twice at once, memory for activations that
is missing or too small, capturing before a first run, replaying a graph whose context was told other shapes since.
"""

from __future__ import annotations

import json
import sys
import threading
import weakref
from enum import IntEnum
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime
import pytest
from fake_cuda import FakeGpu
from sd_runtime.bundle.manifest import ShapeRange

ORT_TYPES = {"tensor(float)": "FLOAT", "tensor(int64)": "INT64", "tensor(int32)": "INT32", "tensor(uint8)": "UINT8"}
NUMPY_TYPES = {"FLOAT": np.float32, "INT64": np.int64, "INT32": np.int32, "UINT8": np.uint8}


def fake_plan(
    onnx_path: Path, profile: dict[str, ShapeRange], *, tensorrt: str, gpu: str = "NVIDIA H200", activations: int = 4096
) -> bytes:
    """The bytes of an engine built from a graph; `activations` in bytes, for the largest shapes."""
    ranges = {name: [r.min, r.opt, r.max] for name, r in profile.items()}
    described = {"onnx": str(onnx_path), "profile": ranges, "tensorrt": tensorrt, "gpu": gpu}
    return json.dumps(described | {"activations": activations}).encode()


class DataType:
    def __init__(self, name: str) -> None:
        self.name = name


class TensorIOMode(IntEnum):
    NONE, INPUT, OUTPUT = 0, 1, 2


class Severity(IntEnum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class ILogger:
    Severity = Severity

    def log(self, severity: Severity, msg: str) -> None:
        raise NotImplementedError


class Strategy(IntEnum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class Specialization(IntEnum):
    LAZY, EAGER, NONE = range(3)


class CudaGraphs(IntEnum):
    DISABLED, WHOLE_GRAPH_CAPTURE = range(2)


class Validity(IntEnum):
    VALID, SUBOPTIMAL, INVALID = range(3)


class Dims:
    def __init__(self, shape: list[int]) -> None:
        assert isinstance(shape, list)
        self._shape = tuple(shape)

    def __getitem__(self, key: Any) -> Any:
        return self._shape[key]

    def __len__(self) -> int:
        return len(self._shape)


class FakeTensorRT:
    """The library in one version, on one machine; `install` puts it behind `import tensorrt`."""

    def __init__(self, gpu: FakeGpu, version: str = "10.13.3", module: str = "tensorrt") -> None:
        self.gpu, self.version, self.module = gpu, version, module
        self.rtx = module == "tensorrt_rtx"
        self.asked_validity = 0  # how often an engine's header was looked at
        self.compiled: list[bytes] = []  # runtime caches that were read
        self.number = (11, 0) if self.rtx else tuple(map(int, version.split(".")[:2]))
        self.runtimes: list[Runtime] = []
        self.engines: list[Engine] = []
        self.contexts: weakref.WeakSet[Context] = weakref.WeakSet()  # those alive
        self.contexts_made = 0
        self.damaged = False  # deserialisation returns None whatever it is given
        self.capturable = True  # engines with loops or conditions are not
        self.starts = True  # without a GPU, neither a runtime nor a builder is made

    def install(self, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
        module = ModuleType(self.module)
        module.__version__ = self.version  # type: ignore[attr-defined]
        module.TensorIOMode, module.ILogger, module.Dims = TensorIOMode, ILogger, Dims  # type: ignore[attr-defined]
        module.Runtime = lambda logger: Runtime(self, logger)  # type: ignore[attr-defined]
        if self.number >= (10, 0):
            module.ExecutionContextAllocationStrategy = Strategy  # type: ignore[attr-defined]
        if self.rtx:
            module.DynamicShapesKernelSpecializationStrategy = Specialization  # type: ignore[attr-defined]
            module.CudaGraphStrategy, module.EngineValidity = CudaGraphs, Validity  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, self.module, module)
        return self


def must_start(library: FakeTensorRT, logger: ILogger) -> None:
    """As version 8.5 fails: with a warning, and in the words of pybind11."""
    if not library.starts:
        logger.log(Severity.WARNING, "CUDA initialization failure with error: 35. Please check your CUDA installation")
        raise TypeError("pybind11::init(): factory function returned nullptr")


class Runtime:
    def __init__(self, library: FakeTensorRT, logger: ILogger) -> None:
        must_start(library, logger)
        self.library, self.logger = library, logger
        if library.number >= (8, 6):
            self.engine_host_code_allowed = False
        if library.rtx:
            self.get_engine_validity = self._validity
        library.runtimes.append(self)

    def error(self, message: str) -> None:
        self.logger.log(Severity.ERROR, message)

    def _validity(self, header: bytes) -> tuple[Validity, int]:
        self.library.asked_validity += 1
        return (Validity.VALID, 0) if self._reads(json.loads(header)) else (Validity.INVALID, 4)

    def _reads(self, plan: dict[str, Any]) -> bool:
        """TensorRT for RTX does not ask for the GPU's name."""
        fits = self.library.rtx or plan.get("gpu") == self.library.gpu.name
        return fits and plan.get("tensorrt") == self.library.version

    def deserialize_cuda_engine(self, serialized: bytes) -> Engine | None:
        self.logger.log(Severity.INFO, "Loaded engine size: 1 MiB")
        plan = {} if self.library.damaged else json.loads(serialized)
        assert not self.library.rtx or self.library.asked_validity, "the header comes first"
        if not self._reads(plan):
            self.error(
                "Serialization assertion stdVersionRead == kSERIALIZATION_VERSION failed.Version tag does not match"
            )
            return None
        kinds = {
            (8, 5): Engine8,
            (8, 6): Engine8,
            (10, 0): Engine100,
        }
        kind = EngineRtx if self.library.rtx else kinds.get(self.library.number, Engine)
        self.library.engines.append(kind(self, plan))
        return self.library.engines[-1]


class Engine:
    """As in TensorRT 10.1 and later."""

    def __init__(self, runtime: Runtime, plan: dict[str, Any]) -> None:
        self.runtime, self.library, self.gpu = runtime, runtime.library, runtime.library.gpu
        self.profile = {name: [tuple(shape) for shape in r] for name, r in plan["profile"].items()}
        self.activations = plan["activations"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(plan["onnx"], options, providers=["CPUExecutionProvider"])
        self.inputs = {i.name: i for i in self.session.get_inputs()}
        self.outputs = {o.name: o for o in self.session.get_outputs()}
        self.weights = self.gpu.memory.allocate(1024, "device")  # once, however many contexts there are

    def __del__(self) -> None:
        if hasattr(self, "weights"):
            self.gpu.memory.free(self.weights, "device")

    @property
    def num_io_tensors(self) -> int:
        return len(self.inputs) + len(self.outputs)

    def get_tensor_name(self, index: int) -> str:
        return [*self.inputs, *self.outputs][index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        kind = ORT_TYPES[(self.inputs | self.outputs)[name].type]
        return DataType("INT32" if kind == "INT64" and self.library.number < (10, 0) else kind)

    def get_tensor_profile_shape(self, name: str, index: int) -> list[Dims]:
        assert index == 0
        return [Dims(list(shape)) for shape in self.range_of(name)]

    def range_of(self, name: str) -> list[tuple[int, ...]]:
        return self.profile[name] if name in self.profile else [tuple(self.inputs[name].shape)] * 3

    def create_execution_context(self, strategy: Strategy = Strategy.STATIC) -> Context | None:
        assert strategy == Strategy.USER_MANAGED, "contexts must not bring memory of their own"
        return self._context(Context)

    def _context(self, kind: type[Context]) -> Context:
        context = kind(self)
        self.library.contexts.add(context)
        self.library.contexts_made += 1
        return context


class Context:
    """As in TensorRT 10.1 and later."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.memory: tuple[int, int | None] | None = None  # address, and size if it was told
        self.told = 0  # how often shapes changed
        self.warm = -1  # for which of these it has run
        self._inside = threading.Lock()

    def set_input_shape(self, name: str, shape: Dims) -> bool:
        low, _, high = self.engine.range_of(name)
        sizes = shape[:]
        if len(sizes) != len(low) or not all(a <= n <= b for a, n, b in zip(low, sizes, high, strict=True)):
            self.engine.runtime.error(
                f"IExecutionContext::setInputShape: Error Code 3: API Usage Error (Parameter check failed, condition: "
                f"engineDims.d[i] == dims.d[i]. Static dimension mismatch while setting input shape for {name}.)"
            )
            return False
        if self.shapes.get(name) != sizes:
            self.shapes[name] = sizes
            self.told += 1
            self.memory = None  # partitioned for other shapes
        return True

    def get_tensor_shape(self, name: str) -> Dims:
        if name in self.engine.inputs:
            return Dims(list(self.shapes[name]))
        feeds = {i: np.zeros(self.shapes[i], numpy_type(node.type)) for i, node in self.engine.inputs.items()}
        return Dims(list(self.engine.session.run([name], feeds)[0].shape))

    def update_device_memory_size_for_shapes(self) -> int:
        return self.needed()

    def needed(self) -> int:
        """Bytes for the activations of these shapes."""
        assert self.shapes.keys() == self.engine.inputs.keys(), "shapes are missing"
        share = [np.prod(self.shapes[n]) / np.prod(self.engine.range_of(n)[2]) for n in self.engine.inputs]
        return int(self.engine.activations * min(share))

    def set_device_memory(self, memory: int, size: int) -> None:
        self.memory = (memory, size)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self.engine.inputs | self.engine.outputs:
            self.engine.runtime.error(f"{name} is not a tensor of this engine")
            return False
        self.addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert self._inside.acquire(blocking=False), "a context is used by two threads at once"
        try:
            return self._enqueue(stream_handle)
        finally:
            self._inside.release()

    def _enqueue(self, stream_handle: int) -> bool:
        engine, gpu = self.engine, self.engine.gpu
        stream = gpu.streams[stream_handle]
        assert self.shapes.keys() == engine.inputs.keys(), "shapes are missing"
        assert self.addresses.keys() == engine.inputs.keys() | engine.outputs.keys(), "addresses are missing"
        if self.memory is None:
            engine.runtime.error("Error Code 2: no memory for activations was set")
            return False
        if stream.capturing and (self.warm != self.told or not engine.library.capturable):
            engine.runtime.error("operation not permitted when stream is capturing")
            return False
        self.warm = self.told
        work = Run(self)
        stream.queue("enqueue " + ",".join(engine.outputs), work)
        return True


class Run:
    """One run, with the addresses that were set when it was queued."""

    def __init__(self, context: Context) -> None:
        self._context, self.told = weakref.ref(context), context.told
        self.shapes, self.addresses, self.memory = dict(context.shapes), dict(context.addresses), context.memory

    @property
    def context(self) -> Context:
        context = self._context()
        assert context is not None, "the context is gone before its run is done"
        return context

    def __call__(self) -> None:
        context, engine, memory = self.context, self.context.engine, self.context.engine.gpu.memory
        assert context.told == self.told, "a captured run is replayed after its context was told other shapes"
        self._use_activations()
        feeds, spans = {}, []
        for name, node in engine.inputs.items():
            kind = NUMPY_TYPES[engine.get_tensor_dtype(name).name]
            size = int(np.prod(self.shapes[name])) * np.dtype(kind).itemsize
            raw = memory.bytes_at(self.addresses[name], size)
            spans.append((self.addresses[name], self.addresses[name] + size))
            feeds[name] = raw.view(kind).reshape(self.shapes[name]).astype(numpy_type(node.type))
        results = engine.session.run(list(engine.outputs), feeds)
        for name, result in zip(engine.outputs, results, strict=True):
            start = self.addresses[name]
            assert all(start + result.nbytes <= low or start >= high for low, high in spans), f"{name} is an input too"
            memory.bytes_at(start, result.nbytes)[:] = result.reshape(-1).view(np.uint8)

    def _use_activations(self) -> None:
        """Whatever lies in the arena is gone after a run."""
        assert self.memory is not None
        address, size = self.memory
        needed = self.context.needed()
        assert size is None or size >= needed, "too little memory for activations"
        self.context.engine.gpu.memory.bytes_at(address, needed)[:] = 0xAA


class Context100(Context):
    """TensorRT 10.0: shapes tell the size, but the memory's address is a property that can only be written."""

    set_device_memory = property()  # type: ignore[assignment]

    def _write(self, address: int) -> None:
        self.memory = (address, None)

    device_memory = property(None, _write)


class Engine100(Engine):
    def create_execution_context(self, strategy: Strategy = Strategy.STATIC) -> Context | None:
        assert strategy == Strategy.USER_MANAGED
        return self._context(Context100)


class RuntimeCache:
    def __init__(self, library: FakeTensorRT) -> None:
        self.library, self.content = library, b""

    def deserialize(self, blob: bytes) -> bool:
        self.library.compiled.append(blob)
        self.content = blob
        return True

    def serialize(self) -> memoryview:
        return memoryview(self.content or b"kernels")


class RuntimeConfig:
    """The library's own defaults, each of which is wrong for us."""

    def __init__(self, library: FakeTensorRT) -> None:
        self.library = library
        self.strategy, self.cuda_graph_strategy = Strategy.STATIC, CudaGraphs.WHOLE_GRAPH_CAPTURE
        self.dynamic_shapes_kernel_specialization_strategy = Specialization.LAZY
        self.cache: RuntimeCache | None = None

    def set_execution_context_allocation_strategy(self, strategy: Strategy) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache(self.library)

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        self.cache = cache
        return True


class ContextRtx(Context):
    """A capture must have been asked about."""

    asked = False

    def is_stream_capturable(self, stream_handle: int) -> bool:
        assert stream_handle in self.engine.gpu.streams
        self.asked = True
        return self.engine.library.capturable

    def _enqueue(self, stream_handle: int) -> bool:
        assert self.asked or not self.engine.gpu.streams[stream_handle].capturing, "nobody asked"
        return super()._enqueue(stream_handle)


class EngineRtx(Engine):
    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig(self.library)

    def create_execution_context(self, config: RuntimeConfig) -> Context | None:  # type: ignore[override]
        assert config.strategy == Strategy.USER_MANAGED, "contexts must not bring memory of their own"
        assert config.dynamic_shapes_kernel_specialization_strategy == Specialization.EAGER
        assert config.cuda_graph_strategy == CudaGraphs.DISABLED and config.cache is not None
        return self._context(ContextRtx)


class Context8(Context100):
    """TensorRT 8.5 and 8.6."""

    update_device_memory_size_for_shapes = property()  # type: ignore[assignment]

    def needed(self) -> int:
        return int(self.engine.activations)


class Engine8(Engine):
    """TensorRT 8: one profile serves one context."""

    @property
    def device_memory_size(self) -> int:
        return int(self.activations)

    create_execution_context = None  # type: ignore[assignment]

    def create_execution_context_without_device_memory(self) -> Context | None:
        if any(context.engine is self for context in self.library.contexts):
            self.runtime.error("Profile 0 has been chosen by another IExecutionContext")
            return None
        return self._context(Context8)


def numpy_type(kind: str) -> Any:
    return NUMPY_TYPES[ORT_TYPES[kind]]
