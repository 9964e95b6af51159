"""What `fake_cuda` offers to tests, over the real cuda.core and the driver in driver.c.

With STUB_CUDA=FOLDER in the environment, the folder with the stub's libcuda.so.1, tests that ask for a FakeGpu get this
one: our code then goes through the real cuda.core.  Only what `fake_tensorrt` and `fake_onnxruntime` queue in place of
kernels is Python.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# Loaded before anybody asks for a libcuda.so.1, it is the one that they get.
LIBRARY = ctypes.CDLL(str(Path(os.environ["STUB_CUDA"]) / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
LIBRARY.stub_bytes.argtypes, LIBRARY.stub_bytes.restype = [ctypes.c_void_p, ctypes.c_size_t], ctypes.c_void_p
LIBRARY.stub_allocate.argtypes, LIBRARY.stub_allocate.restype = [ctypes.c_size_t], ctypes.c_void_p
LIBRARY.stub_release.argtypes = [ctypes.c_void_p]
LIBRARY.stub_set_memory.argtypes = [ctypes.c_size_t]
LIBRARY.stub_count.argtypes, LIBRARY.stub_count.restype = [ctypes.c_char_p], ctypes.c_uint64
LIBRARY.stub_used.restype = LIBRARY.stub_live.restype = LIBRARY.stub_unfinished.restype = ctypes.c_size_t
LIBRARY.stub_is_alive.argtypes, LIBRARY.stub_is_alive.restype = [ctypes.c_void_p], ctypes.c_bool
LIBRARY.stub_is_capturing.argtypes, LIBRARY.stub_is_capturing.restype = [ctypes.c_void_p], ctypes.c_bool
LIBRARY.stub_enqueue.argtypes = [ctypes.c_void_p, ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int), ctypes.c_int]

CODES = {
    "CUDA_ERROR_ILLEGAL_ADDRESS": 700,
    "CUDA_ERROR_LAUNCH_FAILED": 719,
    "CUDA_ERROR_UNKNOWN": 999,
    "Failed to allocate": 2,
}


class CUDAError(Exception):
    """For tests to raise; through the driver it comes back as cuda.core's."""


class Memory:
    """The driver's memory, counted from when the GPU was made."""

    def __init__(self) -> None:
        self._live, self._used = LIBRARY.stub_live(), LIBRARY.stub_used()
        self._before = self._counted()
        self._capacity = 0

    def _counted(self) -> dict[str, int]:
        return {kind: LIBRARY.stub_count(kind.encode()) for kind in ("device", "pinned", "events")}

    @property
    def allocations(self) -> dict[str, int]:
        return {kind: count - self._before[kind] for kind, count in self._counted().items()}

    @property
    def live(self) -> int:
        return int(LIBRARY.stub_live()) - self._live

    @property
    def used(self) -> int:
        return int(LIBRARY.stub_used()) - self._used

    @property
    def capacity(self) -> int:
        return self._capacity

    @capacity.setter
    def capacity(self, size: int) -> None:
        self._capacity = size
        LIBRARY.stub_set_memory(size + self._used)

    def allocate(self, size: int, kind: str) -> int:
        address = LIBRARY.stub_allocate(size)
        if not address:
            raise CUDAError("CUDA_ERROR_OUT_OF_MEMORY: out of memory")
        return int(address)

    def free(self, address: int, kind: str) -> None:
        LIBRARY.stub_release(address)

    def bytes_at(self, address: int, size: int) -> np.ndarray:
        place = LIBRARY.stub_bytes(address, size)
        if not place:
            raise CUDAError("CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered")
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(place))


@dataclass
class StubStream:
    """A stream of the driver's, as the fake libraries use it."""

    gpu: StubGpu
    handle: int

    @property
    def capturing(self) -> bool:
        return bool(LIBRARY.stub_is_capturing(self.handle))

    @property
    def closed(self) -> bool:
        return not LIBRARY.stub_is_alive(self.handle)

    def sync(self) -> None:
        if code := LIBRARY.cuStreamSynchronize(ctypes.c_void_p(self.handle)):
            raise CUDAError(f"cuStreamSynchronize: error {code}")

    def queue(self, what: str, work: Callable[[], None]) -> None:
        number = next(NUMBERS)
        QUEUED[number] = Piece(self.gpu, what, work, captured=self.capturing)
        if code := LIBRARY.stub_enqueue(self.handle, called, number):
            raise CUDAError(f"stub_enqueue: error {code}")


class Streams:
    """Handle → stream, of those made since the GPU was."""

    def __init__(self, gpu: StubGpu) -> None:
        self._gpu, self._before = gpu, set(all_streams())

    def __getitem__(self, handle: int) -> StubStream:
        assert isinstance(handle, int)
        return StubStream(self._gpu, handle)

    def values(self) -> list[StubStream]:
        return [self[handle] for handle in all_streams() if handle not in self._before]

    def __len__(self) -> int:
        return len(self.values())


def all_streams() -> list[int]:
    handles = (ctypes.c_void_p * 4096)()
    return [int(handle) for handle in handles[: LIBRARY.stub_streams(handles)] if handle]


@dataclass
class StubGpu:
    """In the place of `fake_cuda.FakeGpu`."""

    name: str = "NVIDIA H200"
    driver: tuple[int, ...] = (580, 65, 6)
    log: list[str] = field(default_factory=list)  # what was done, in the order in which it was done
    fail: Callable[[str], None] = lambda what: None  # called before everything that is done; may raise

    def __post_init__(self) -> None:
        gc.collect()  # what earlier tests left is given back before counting starts
        self.mend()
        self.memory = Memory()
        self.memory.capacity = 1 << 30
        self.streams = Streams(self)
        self._unfinished = LIBRARY.stub_unfinished()
        self._waits = LIBRARY.stub_count(b"waits")

    def mend(self) -> None:
        """What a new process does to a GPU that refuses all work."""
        LIBRARY.stub_mend()

    @property
    def unfinished(self) -> int:
        """How many pieces of work are queued."""
        return int(LIBRARY.stub_unfinished()) - self._unfinished

    @property
    def waits(self) -> int:
        return int(LIBRARY.stub_count(b"waits")) - self._waits

    def do(self, what: str, work: Callable[[], None] = lambda: None) -> int:
        """The driver's code for how it went."""
        try:
            self.fail(what)
            self.log.append(what)
            work()
        except Exception as error:
            code = next((code for name, code in CODES.items() if name in str(error)), 0)
            if not code:
                traceback.print_exc()
            return code or CODES["CUDA_ERROR_LAUNCH_FAILED"]
        return 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> StubGpu:
        from cuda.core import system

        INSTALLED.append(self)
        monkeypatch.setattr(system, "get_kernel_mode_driver_version", lambda: self.driver)  # which is NVML's to say
        return self

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{name}: only the fake has it")


@dataclass
class Piece:
    """Of work, that a fake library has queued."""

    gpu: StubGpu
    what: str
    work: Callable[[], None]
    captured: bool  # so that it may be called often


# The driver calls these as long as the process lives.
INSTALLED: list[StubGpu] = []
QUEUED: dict[int, Piece] = {}
NUMBERS = itertools.count()


@ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)
def called(number: int) -> int:
    piece = QUEUED[number]
    if not piece.captured:
        del QUEUED[number]
    return piece.gpu.do(piece.what, piece.work)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def dropped(number: int) -> None:
    del QUEUED[number]


@ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p)
def announced(what: bytes) -> int:
    return INSTALLED[-1].do(what.decode()) if INSTALLED else 0


LIBRARY.stub_announce(announced)
LIBRARY.stub_on_drop(dropped)
