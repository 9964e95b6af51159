"""Memory on the GPU and on its way there: tensors, the pinned buffers that their copies go through, and the arena."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ...tensor import Array
from ..device import DeviceTensor

if TYPE_CHECKING:
    from cuda.core import Buffer

    from .gpu import Gpu

ALIGNMENT = 256  # bytes; TensorRT asks it of addresses


class GpuTensor:
    """An array on the GPU; see `DeviceTensor`."""

    def __init__(self, gpu: Gpu, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._gpu, self.shape, self.dtype = gpu, shape, dtype
        self.size = math.prod(shape) * dtype.itemsize  # in bytes
        self._buffer = gpu.allocate(self.size)
        gpu.allocated.add(self)
        self.address = int(self._buffer.handle)
        self._buffer.fill(0, stream=gpu.stream)
        self._writes, self._reads = Staging(gpu, shape, dtype), Staging(gpu, shape, dtype)

    def write(self, array: Array) -> None:
        assert array.shape == self.shape, (array.shape, self.shape)
        with self._gpu.turn("copying to the GPU"):
            slot = self._writes.next()
            np.copyto(slot.array, array, casting="same_kind")
            self._buffer.copy_from(slot.buffer, stream=self._gpu.stream)
            self._gpu.stream.record(slot.event)

    def read(self, rows: int | None = None) -> PendingCopy:
        with self._gpu.turn("copying from the GPU"):
            slot = self._reads.next()
            source, target = self._buffer, slot.buffer
            if rows is not None and rows < self.shape[0]:
                size = self.size // self.shape[0] * rows
                source, target = part_of(source, size), part_of(target, size)
            source.copy_to(target, stream=self._gpu.stream)
            self._gpu.stream.record(slot.event)
        return PendingCopy(self._gpu, slot, rows)

    def close(self) -> None:
        self._writes.close()
        self._reads.close()
        self.free()

    def free(self) -> None:
        """Give back the memory on the GPU, and leave what lies on the host to whoever may be reading it."""
        with self._gpu.closing():
            self._buffer.close(self._gpu.stream)


def on_gpu(tensors: Mapping[str, DeviceTensor]) -> dict[str, GpuTensor]:
    """The tensors, known to lie on the GPU.  AssertionError: one lies elsewhere."""
    found = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, GpuTensor)}
    assert found.keys() == tensors.keys(), "tensors of another device"
    return found


class PendingCopy:
    """See `Pending`."""

    def __init__(self, gpu: Gpu, slot: Slot, rows: int | None) -> None:
        self._gpu, self._slot, self._rows = gpu, slot, rows

    def wait(self) -> Array:
        with self._gpu.translated("the GPU failed while running"):
            self._slot.event.sync()
        return self._slot.array[: self._rows]


class Staging:
    """Pinned memory for copies of one tensor one way: two slots in turn, allocated when first used."""

    def __init__(self, gpu: Gpu, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._gpu, self._shape, self._dtype = gpu, shape, dtype
        self._slots: list[Slot] = []
        self._count = 0

    def next(self) -> Slot:
        """The slot whose turn it is, once its last copy is done."""
        if len(self._slots) < 2:
            self._slots.append(Slot(self._gpu, self._shape, self._dtype))
        slot = self._slots[self._count % 2]
        self._count += 1
        slot.event.sync()
        return slot

    def close(self) -> None:
        for slot in self._slots:
            slot.close()
        self._slots.clear()


class Slot:
    """Pinned memory for one copy, also as a numpy array, and the event after which it may be touched."""

    def __init__(self, gpu: Gpu, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._gpu = gpu
        size = math.prod(shape) * dtype.itemsize
        self.buffer = gpu.allocate_pinned(size)
        self.event = gpu.create_event()
        memory = (ctypes.c_uint8 * size).from_address(int(self.buffer.handle))
        self.array: Array = np.ctypeslib.as_array(memory).view(dtype).reshape(shape)

    def close(self) -> None:
        with self._gpu.closing():
            self.event.sync()
        with self._gpu.closing():
            self.event.close()
            self.buffer.close()


def part_of(buffer: Buffer, size: int) -> Buffer:
    """The first `size` bytes: copies want both ends of one size."""
    from cuda.core import Buffer

    return Buffer.from_handle(buffer.handle, size, owner=buffer)


class Arena:
    """The memory for intermediate values that all engines on a GPU share, since they run strictly in turn.

    It grows to what the largest of them needs.  A CUDA graph goes on using the block that it was recorded with, so a
    block that was outgrown is given back when the last graph that holds it is closed.
    """

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._block: ArenaBlock | None = None

    def block(self, size: int) -> ArenaBlock:
        """The current block, of at least `size` bytes; allocates only if it has to grow."""
        if self._block is None or self._block.size < size:
            grown = ArenaBlock(self._gpu, max(size, ALIGNMENT))
            self.close()
            self._block = grown
        return self._block

    def close(self) -> None:
        if self._block is not None:
            self._block.release()
            self._block = None


class ArenaBlock:
    """A piece of GPU memory with several holders; the last one to release it frees it."""

    def __init__(self, gpu: Gpu, size: int) -> None:
        self._gpu, self.size = gpu, size
        self._buffer = gpu.allocate(size)
        gpu.allocated.add(self)
        self.address = int(self._buffer.handle)
        self._holders = 1

    def hold(self) -> ArenaBlock:
        self._holders += 1
        return self

    def release(self) -> None:
        self._holders -= 1
        if not self._holders:
            self.free()

    def free(self) -> None:
        with self._gpu.closing():
            self._buffer.close(self._gpu.stream)
