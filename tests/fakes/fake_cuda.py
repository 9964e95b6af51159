"""A GPU made of numpy: the part of cuda.core that the runtime uses, on a machine without CUDA.

It raises what cuda.core raises (stub_cuda runs the same tests over the real one), and is stricter than a GPU.
Nothing that is queued happens before somebody waits for it, so whoever reads too early sees poison and whoever
overwrites too early is found out.  Addresses are checked: memory that was freed, never allocated or is too small is an
illegal access.  A stream that is being captured does nothing until its graph is launched.
"""

from __future__ import annotations

import os
import sys
import threading
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

POISON = 0xFF  # as float32: NaN


class CUDAError(Exception):
    """Named and worded as cuda.core's."""


class Memory:
    """Everything allocated on the GPU or pinned on the host: address → bytes."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.used, self.peak = capacity, 0, 0
        self.allocations = {"device": 0, "pinned": 0}
        self._blocks: dict[int, np.ndarray] = {}
        self._next = 0x7_0000_0000

    def allocate(self, size: int, kind: str) -> int:
        assert size > 0, "an empty allocation"
        if kind == "device" and self.used + size > self.capacity:
            raise CUDAError("CUDA_ERROR_OUT_OF_MEMORY: The API call failed because it was unable to allocate memory.")
        block = np.full(size, POISON, np.uint8)
        address = self._next if kind == "device" else block.ctypes.data
        if kind == "device":
            self._next += -(-size // 512) * 512 + 4096  # a gap, so that overruns hit nothing
            self.used += size
            self.peak = max(self.peak, self.used)
        self._blocks[address] = block
        self.allocations[kind] += 1
        return address

    def free(self, address: int, kind: str) -> None:
        block = self._blocks.pop(address)
        self.used -= block.size if kind == "device" else 0

    def bytes_at(self, address: int, size: int) -> np.ndarray:
        """A view of `size` bytes; CUDAError if they do not lie in one live allocation."""
        starts = sorted(self._blocks)
        place = bisect_right(starts, address) - 1
        start = starts[place] if place >= 0 else 0
        if place < 0 or address + size > start + self._blocks[start].size:
            raise CUDAError(
                "CUDA_ERROR_ILLEGAL_ADDRESS: While executing a kernel, the device encountered a bad address"
            )
        return self._blocks[start][address - start : address - start + size]

    @property
    def live(self) -> int:
        return len(self._blocks)


@dataclass
class FakeGpu:
    """One machine's GPU; `install` puts it behind `import cuda.core`."""

    name: str = "NVIDIA H200"
    compute_capability: tuple[int, int] = (9, 0)
    cuda: tuple[int, ...] = (13, 0)
    driver: tuple[int, ...] = (580, 65, 6)
    capacity: int = 1 << 30
    log: list[str] = field(default_factory=list)  # what was done, in the order in which it was done
    fail: Callable[[str], None] = lambda what: None  # called before everything that is done; may raise

    def __post_init__(self) -> None:
        self.memory = Memory(self.capacity)
        self.streams: dict[int, Stream] = {}
        self.waits = 0  # how often the host waited for unfinished work
        self.current = threading.local()  # which threads have chosen this GPU

    def check_current(self) -> None:
        if not getattr(self.current, "chosen", False):
            raise CUDAError("CUDA_ERROR_INVALID_CONTEXT: the thread has not chosen a device")

    @property
    def unfinished(self) -> int:
        """How many pieces of work are queued."""
        return sum(stream.position - stream.done for stream in self.streams.values())

    def mend(self) -> None:
        """What a new process does to a GPU that refuses all work."""

    def do(self, what: str, work: Callable[[], None]) -> None:
        self.fail(what)
        self.log.append(what)
        work()

    def install(self, monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
        core, graph, system = (ModuleType(f"cuda.core{name}") for name in ("", ".graph", ".system"))
        core.Device = lambda ordinal=None: Device(self, ordinal)  # type: ignore[attr-defined]
        core.EventOptions, core.DeviceMemoryResourceOptions = EventOptions, PoolOptions  # type: ignore[attr-defined]
        core.DeviceMemoryResource = lambda device, options: DeviceMemory(self)  # type: ignore[attr-defined]
        core.LegacyPinnedMemoryResource = lambda: PinnedMemory(self)  # type: ignore[attr-defined]
        core.Buffer = SimpleNamespace(from_handle=self._view)  # type: ignore[attr-defined]
        system.get_kernel_mode_driver_version = lambda: self.driver  # type: ignore[attr-defined]
        core.graph, core.system = graph, system  # type: ignore[attr-defined]
        package, bindings, driver = (ModuleType(f"cuda{name}") for name in ("", ".bindings", ".bindings.driver"))
        driver.cuDriverGetVersion = lambda: (0, self.cuda[0] * 1000 + self.cuda[1] * 10)  # type: ignore[attr-defined]
        package.core, package.bindings, bindings.driver = core, bindings, driver  # type: ignore[attr-defined]
        for module in (package, core, graph, system, bindings, driver):
            monkeypatch.setitem(__import__("sys").modules, module.__name__, module)
        return self

    def _view(self, ptr: int, size: int, mr: None = None, owner: object = None, *, stream: None = None) -> Buffer:
        return Buffer(self, int(ptr), size, kind=None)


@dataclass
class EventOptions:
    timing_enabled: bool | None = False
    blocking_sync: bool | None = False
    ipc_enabled: bool | None = False


@dataclass
class PoolOptions:
    ipc_enabled: bool = False
    max_size: int = 0


class Device:
    def __init__(self, gpu: FakeGpu, ordinal: int | None) -> None:
        assert ordinal == 0
        self._gpu = gpu

    @property
    def name(self) -> str:
        return self._gpu.name

    @property
    def compute_capability(self) -> tuple[int, int]:
        return self._gpu.compute_capability

    def set_current(self) -> None:
        self._gpu.current.chosen = True

    def create_stream(self, obj: None = None, options: None = None) -> Stream:
        self._gpu.check_current()
        return Stream(self._gpu)

    def create_event(self, options: Any = None) -> Event:
        self._gpu.check_current()
        return Event(self._gpu)


class DeviceMemory:
    """A pool on the GPU."""

    def __init__(self, gpu: FakeGpu) -> None:
        self._gpu, self._closed = gpu, False

    def allocate(self, size: int, *, stream: Stream) -> Buffer:
        self._gpu.check_current()
        if self._closed:
            raise RuntimeError("DeviceMemoryResource has been closed")
        if stream.check().capturing:
            raise RuntimeError("_MemPool cannot perform memory operations on a capturing stream")
        if self._gpu.memory.used + size > self._gpu.memory.capacity:
            stream.sync()  # allocations are in the stream's order: what is freed before is there to be used
        return Buffer(self._gpu, self._gpu.memory.allocate(size, "device"), size, "device")

    def close(self) -> None:
        self._closed = True


class PinnedMemory:
    def __init__(self, gpu: FakeGpu) -> None:
        self._gpu = gpu

    def allocate(self, size: int, *, stream: None = None) -> Buffer:
        self._gpu.check_current()
        for capturing in self._gpu.streams.values():
            capturing.refuse_in_capture()
        return Buffer(self._gpu, self._gpu.memory.allocate(size, "pinned"), size, "pinned")


class Buffer:
    """Memory of its own, or with kind None a view of somebody's."""

    def __init__(self, gpu: FakeGpu, address: int, size: int, kind: str | None) -> None:
        self._gpu, self.handle, self.size, self._kind = gpu, address, size, kind

    def _queue(self, stream: Stream, what: str, work: Callable[[], None]) -> None:
        if not self.handle:
            raise RuntimeError("Buffer has been closed")
        stream.queue(what, work)

    def fill(self, value: int, *, stream: Stream) -> None:
        assert 0 <= value <= 255
        memory, here, size = self._gpu.memory, self.handle, self.size
        self._queue(stream, "fill", lambda: memory.bytes_at(here, size).fill(value))

    def copy_from(self, src: Buffer, *, stream: Stream) -> None:
        if src.size != self.size:
            raise ValueError(f"buffer sizes mismatch between src and dst (sizes are: src={src.size}, dst={self.size})")
        memory, here, there, size = self._gpu.memory, self.handle, src.handle, self.size

        def copy() -> None:
            memory.bytes_at(here, size)[:] = memory.bytes_at(there, size)

        self._queue(stream, "copy", copy)

    def copy_to(self, dst: Buffer, *, stream: Stream) -> Buffer:
        dst.copy_from(self, stream=stream)
        return dst

    def close(self, stream: Stream | None = None) -> None:
        """Freed in the stream's order, if it is given."""
        kind, self._kind = self._kind, None
        memory, address, self.handle, self.size = self._gpu.memory, self.handle, 0, 0
        if kind is None:
            return
        if stream is None:
            memory.free(address, kind)
        else:
            stream.queue("free", lambda: memory.free(address, kind))

    def __del__(self) -> None:
        if self._kind is not None:
            self._gpu.memory.free(self.handle, self._kind)


@dataclass(frozen=True)
class StreamHandle:
    """Not a number, as in cuda.bindings: libraries are given int(handle)."""

    value: int

    def __int__(self) -> int:
        return self.value


class Stream:
    def __init__(self, gpu: FakeGpu) -> None:
        self._gpu = gpu
        self._queued: list[tuple[str, Callable[[], None]]] = []
        self.done, self.capturing, self.spoiled, self.closed = 0, False, False, False
        self._working = threading.RLock()
        self._captured: list[tuple[str, Callable[[], None]]] = []
        self.handle = StreamHandle(0x5000 + len(gpu.streams))
        gpu.streams[int(self.handle)] = self

    def check(self) -> Stream:
        if self.closed:
            raise RuntimeError("Stream has been closed")
        self._gpu.check_current()
        return self

    def refuse_in_capture(self) -> None:
        """What might wait for a stream that is captured spoils the capture."""
        if self.capturing:
            self.spoiled = True
            raise CUDAError("CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED: operation not permitted when stream is capturing")

    def queue(self, what: str, work: Callable[[], None]) -> None:
        self.check()
        (self._captured if self.capturing else self._queued).append((what, work))

    @property
    def position(self) -> int:
        with self._working:
            return self.done + len(self._queued)

    def finish(self, position: int) -> None:
        """Do what is queued up to `position`."""
        with self._working:
            if position > self.done:
                self._gpu.waits += 1
            while self.done < position:
                what, work = self._queued.pop(0)
                self.done += 1
                self._gpu.do(what, work)

    def sync(self) -> None:
        self.check().refuse_in_capture()
        self.finish(self.position)

    def record(self, event: Event) -> Event:
        self.check()
        event.check().stream, event.position, event.captured = self, self.position, self.capturing
        return event

    def create_graph_builder(self) -> GraphBuilder:
        return GraphBuilder(self._gpu, self.check())

    def close(self) -> None:
        self.closed = True


class Event:
    def __init__(self, gpu: FakeGpu) -> None:
        self._gpu = gpu
        self.stream: Stream | None = None
        self.position, self.captured, self.closed = 0, False, False
        gpu.memory.allocations.setdefault("events", 0)
        gpu.memory.allocations["events"] += 1

    def check(self) -> Event:
        if self.closed:
            raise RuntimeError("Event has been closed")
        return self

    def sync(self) -> None:
        if self.check().captured:
            raise CUDAError("CUDA_ERROR_CAPTURED_EVENT: the event was last recorded in a capturing stream")
        if self.stream is not None:
            self.stream.finish(self.position)

    def close(self) -> None:
        self.closed = True


class GraphBuilder:
    def __init__(self, gpu: FakeGpu, stream: Stream) -> None:
        self._gpu, self._stream = gpu, stream
        self._state = "new"  # building, ended, closed

    def _expect(self, state: str, otherwise: str) -> None:
        if self._state != state:
            raise RuntimeError(otherwise)

    def begin_building(self, mode: str = "relaxed") -> GraphBuilder:
        self._expect("new", f"Graph builder is {self._state}.")
        assert mode == "thread_local", "other threads are kept from allocating, or forgotten calls from failing"
        if self._stream.capturing:
            raise CUDAError("CUDA_ERROR_ILLEGAL_STATE: a resource required by the API call is not in a valid state")
        self._state, self._stream.capturing, self._stream.spoiled, self._stream._captured = "building", True, False, []
        return self

    def end_building(self) -> GraphBuilder:
        self._expect("building", "Graph builder is not building.")
        if self._stream.spoiled:  # and the stream is left in capture mode
            raise RuntimeError("Build process encountered an error and has been invalidated.")
        self._state, self._stream.capturing = "ended", False
        return self

    def complete(self, options: None = None) -> Graph:
        self._expect("ended", "Graph has not finished building.")
        work, self._stream._captured = tuple(self._stream._captured), []
        return Graph(self._gpu, work)

    def close(self) -> None:
        building, self._state = self._state == "building", "closed"
        if building:
            self._stream.capturing = False
            if self._stream.spoiled:
                raise CUDAError("CUDA_ERROR_STREAM_CAPTURE_INVALIDATED: the capture has been invalidated")


class Graph:
    def __init__(self, gpu: FakeGpu, work: Sequence[tuple[str, Callable[[], None]]]) -> None:
        assert work, "an empty graph"
        self._gpu, self._work = gpu, work
        self.closed = False

    def _check(self) -> None:
        if self.closed:
            raise RuntimeError("Graph has been closed")

    def upload(self, stream: Stream) -> None:
        self._check()
        stream.check()

    def launch(self, stream: Stream) -> None:
        self._check()
        assert not stream.capturing, "a graph in a graph"

        def replay() -> None:
            for what, work in self._work:
                self._gpu.do(what, work)

        stream.queue("graph", replay)

    def close(self) -> None:
        self.closed, self._work = True, ()


if "STUB_CUDA" in os.environ:  # the same tests with the real cuda.core; see tests/fakes/stub_cuda
    sys.path.append(str(Path(__file__).parent / "stub_cuda"))
    from stub_gpu import CUDAError, StubGpu  # type: ignore[assignment]

    FakeGpu = StubGpu  # type: ignore[assignment, misc]
