"""One GPU over cuda.core: its memory, one stream of work, and recordings of that work as CUDA graphs.

Everything is queued on the one stream and done strictly in turn, so that nothing here needs synchronising but the host:
it reads and writes through pinned memory, two buffers each way, and waits only for what it is about to touch.  Nothing
is allocated once a shape has been seen.  What CUDA reports becomes an EngineError.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import numpy as np

from ...errors import DependencyError, EngineError, OutOfMemoryError, SDError, one_line
from ...notices import warn
from ..causes import shortened
from ..device import InTurn, Launch
from .memory import Arena, ArenaBlock, GpuTensor

if TYPE_CHECKING:
    from cuda.core import Buffer, Event, Stream
    from cuda.core.graph import Graph

# After these the driver refuses all further work of the process: the driver's name of each error, and the words that
# libraries report it with.
FATAL = {
    "CUDA_ERROR_ILLEGAL_ADDRESS": "an illegal memory access was encountered",
    "CUDA_ERROR_ILLEGAL_INSTRUCTION": "an illegal instruction was encountered",
    "CUDA_ERROR_MISALIGNED_ADDRESS": "misaligned address",
    "CUDA_ERROR_INVALID_ADDRESS_SPACE": "operation not supported on global/shared address space",
    "CUDA_ERROR_INVALID_PC": "invalid program counter",
    "CUDA_ERROR_HARDWARE_STACK_ERROR": "hardware stack error",
    "CUDA_ERROR_LAUNCH_FAILED": "unspecified launch failure",
    "CUDA_ERROR_LAUNCH_TIMEOUT": "the launch timed out and was terminated",
    "CUDA_ERROR_ASSERT": "device-side assert triggered",
    "CUDA_ERROR_ECC_UNCORRECTABLE": "uncorrectable ECC error encountered",
    "CUDA_ERROR_CONTEXT_IS_DESTROYED": "context is destroyed",
}
WARM_UP_RUNS = 2
OUT_OF_MEMORY = ("out of memory", "out_of_memory", "outofmemory", "failed to allocate")


class Gpu:
    """The GPU that an installed driver lists first (CUDA_VISIBLE_DEVICES chooses), and a stream on it.

    All engines of a pipeline share one `Gpu`.  It may be used from several threads; `turn` makes them take turns.
    """

    def __init__(self) -> None:
        """DependencyError: cuda.core is not installed; EngineError: there is no GPU or no driver."""
        try:
            from cuda.core import (
                Device,
                DeviceMemoryResource,
                DeviceMemoryResourceOptions,
                EventOptions,
                LegacyPinnedMemoryResource,
            )
        except ImportError as error:
            raise DependencyError(
                "cuda.core is not installed", accepted="1.0 or newer", remedy="pip install cuda-core"
            ) from error
        self._lock, self._process = threading.RLock(), os.getpid()
        self._unusable, self._closed = "", False
        self.allocated: WeakSet[GpuTensor | ArenaBlock] = WeakSet()
        try:
            self._device = Device(0)
            self._device.set_current()
            self.stream: Stream = self._device.create_stream()
            # A pool of its own: the device's would keep what is freed from other programs until the process ends.
            self._memory = DeviceMemoryResource(self._device, DeviceMemoryResourceOptions())
        except Exception as error:  # no driver, no GPU, too old a driver: no common base
            raise EngineError(f"no usable NVIDIA GPU: {one_line(str(error), 300).rstrip('.')}") from error
        self._pinned = LegacyPinnedMemoryResource()
        self._event_options = EventOptions(blocking_sync=True)  # a waiting thread sleeps instead of spinning
        self.arena = Arena(self)

    @property
    def name(self) -> str:
        return str(self._device.name)

    @property
    def compute_capability(self) -> str:
        major, minor = self._device.compute_capability
        return f"{major}.{minor}"

    @contextmanager
    def turn(self, what: str) -> Iterator[None]:
        """Make the calling thread the one that queues work; what goes wrong meanwhile is raised as "`what`: …"."""
        with self._lock:
            if os.getpid() != self._process:
                raise EngineError(
                    "the GPU was opened before this process forked", remedy="load the pipeline after fork"
                )
            if self._closed:  # cuda.core 1.0 takes the process down when a pool that was closed is asked for memory
                raise EngineError("the GPU was closed", remedy="load the pipeline again")
            if self._unusable:
                raise EngineError(f"the GPU is unusable since: {self._unusable}", remedy="restart the process")
            with self.translated(what):
                self._device.set_current()
                yield

    @contextmanager
    def translated(self, what: str) -> Iterator[None]:
        """Raise what CUDA or TensorRT raises as ours; after an error that CUDA does not recover from, refuse all."""
        try:
            yield
        except SDError:
            raise
        except Exception as error:
            text = str(error)
            if any(name in text or words in text for name, words in FATAL.items()):
                self._unusable = shortened(text)
            raise failure(what, text) from error

    def allocate(self, size: int) -> Buffer:
        return self._memory.allocate(size, stream=self.stream)

    def allocate_pinned(self, size: int) -> Buffer:
        """Host memory that the GPU reads and writes by itself."""
        return self._pinned.allocate(size)

    def create_event(self) -> Event:
        return self._device.create_event(self._event_options)

    def tensor(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> GpuTensor:
        """Memory on the GPU, filled with zeros."""
        with self.turn(f"allocating {dtype}{shape} on {self.name}"):
            return GpuTensor(self, shape, dtype)

    def record(self, launches: Sequence[Launch]) -> Launch:
        """`launches` as one CUDA graph, which takes the host one call however much work it holds.

        These are run twice before: what a library sets up on its first runs must not be recorded.  (ONNX Runtime takes
        memory piece by piece on the first, and in one block on the second.)  What must not or cannot be recorded at all
        is launched as it is, between the graphs of the rest."""
        with self.turn("running for the first time"):
            recorded = InTurn([launch for launch in launches if launch.recordable])
            for _ in range(WARM_UP_RUNS):
                recorded()
            self.stream.sync()
            parts = [
                self._recorded(InTurn(list(group))) if recordable else InTurn(list(group))
                for recordable, group in groupby(launches, lambda launch: launch.recordable)
            ]
        return parts[0] if len(parts) == 1 else InTurn(parts, owned=parts)

    def _recorded(self, work: Launch) -> Launch:
        try:
            with self.turn("recording a CUDA graph"):
                return CudaGraph(self, work)
        except OutOfMemoryError:
            raise
        except EngineError as error:
            if self._unusable:
                raise
            warn(f"{error}; the GPU is fed step by step instead, which is slower")
            return work

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Like `turn`, to give something back: errors are dropped, for a broken device takes nothing back."""
        with self._lock, suppress(Exception):
            self._device.set_current()
            yield

    def refuse(self) -> None:
        """After the turn under way, if there is one: let nobody take another."""
        with self._lock:
            self._closed = True

    def close(self) -> None:
        """Finish all work, give back the memory and the stream.

        Tensors and graphs were closed by their owners, but for those of requests under way: what these still have on
        the GPU is freed here, for without the stream they no longer can."""
        self.refuse()
        self.arena.close()
        with self.closing():
            self.stream.sync()
        for left in list(self.allocated):
            left.free()
        for give_back in (self.stream.sync, self._memory.close, self.stream.close):
            with self.closing():
                give_back()


def failure(what: str, cause: str) -> EngineError:
    """An OutOfMemoryError if `cause` reads like one, else an EngineError."""
    if any(sign in cause.lower() for sign in OUT_OF_MEMORY):
        remedy = "use a smaller batch or picture size"
        return OutOfMemoryError(f"{what}: GPU memory ran out ({shortened(cause)})", remedy=remedy)
    return EngineError(f"{what}: {shortened(cause)}")


class CudaGraph:
    """A launch recorded as a CUDA graph; see `Gpu.record`."""

    recordable = False  # a graph is not recorded into another

    def __init__(self, gpu: Gpu, launch: Launch) -> None:
        self._gpu = gpu
        self._graph = capture(gpu.stream, launch)
        self._graph.upload(gpu.stream)
        self._block = gpu.arena.block(0).hold()

    def __call__(self) -> None:
        with self._gpu.turn("replaying a CUDA graph"):
            self._graph.launch(self._gpu.stream)

    def close(self) -> None:
        with self._gpu.closing():
            self._graph.close()
        self._block.release()


def capture(stream: Stream, work: Callable[[], None]) -> Graph:
    """What `work` queues on `stream`, as a graph.  The stream captures whatever library queues it, TensorRT too."""
    builder = stream.create_graph_builder()
    try:
        builder.begin_building("thread_local")  # other threads may go on allocating
        work()
        builder.end_building()
        return builder.complete()
    finally:
        with suppress(Exception):  # this also ends a capture that failed, and what it says hides why
            builder.close()
