"""Engines whose tensors stay where they run: what the device loop is written against.

A device does what is queued strictly in turn.  Queuing returns at once; only `Pending.wait` waits.  Implemented over
CUDA (`cuda`), where TensorRT (`tensorrt_engine`) and ONNX Runtime (`onnxruntime_cuda`) run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ..tensor import Array
from .protocol import Engine, Placed


class Pending(Protocol):
    """A copy to the host that has been queued."""

    def wait(self) -> Array:
        """The values, once they have arrived: memory that the next but one `read` of the tensor overwrites."""
        ...


class DeviceTensor(Protocol):
    """An array in the device's memory."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def write(self, array: Array) -> None:
        """Queue a copy of `array`, of this tensor's shape; it is taken over at once and may be changed afterwards."""
        ...

    def read(self, rows: int | None = None) -> Pending:
        """Queue a copy to the host of the first `rows` along axis 0, or of all."""
        ...

    def close(self) -> None: ...


class Launch(Protocol):
    """Work on tensors chosen once.  Calling it queues the work, as often as one likes."""

    @property
    def recordable(self) -> bool:
        """Whether a recording of the work stays right for as long as its tensors live."""
        ...

    def __call__(self) -> None: ...

    def close(self) -> None: ...


class InTurn:
    """Launches one after the other, as a launch."""

    def __init__(self, launches: Sequence[Launch], owned: Sequence[Launch] = ()) -> None:
        """`owned`: those to close together with this one."""
        self._launches, self._owned = tuple(launches), tuple(owned)

    @property
    def recordable(self) -> bool:
        return all(launch.recordable for launch in self._launches)

    def __call__(self) -> None:
        for launch in self._launches:
            launch()

    def close(self) -> None:
        for launch in self._owned:
            launch.close()


class Device(Protocol):
    """Where several engines run strictly in turn."""

    def record(self, launches: Sequence[Launch]) -> Launch:
        """All of `launches` as one, with as little work for the host as the device allows.  Recording may run them, so
        what their tensors hold afterwards is undefined.  Closing the result closes none of `launches`."""
        ...


@runtime_checkable
class DeviceEngine(Engine, Protocol):
    """An engine that can also run on tensors of its device."""

    @property
    def device(self) -> Device: ...

    def tensor(self, name: str, shape: tuple[int, ...]) -> DeviceTensor:
        """Memory for the input or output `name`, filled with zeros."""
        ...

    def prepare(self, tensors: Mapping[str, DeviceTensor]) -> Launch:
        """A run from and to `tensors`, which name every input and output.  EngineError: shapes that no engine takes."""
        ...


def placed(engine: DeviceEngine, name: str, array: Array) -> Placed:
    """`array` for input `name`, copied to the engine's device once for several runs.  EngineError: it does not fit."""
    next(spec for spec in engine.inputs if spec.name == name).check(array)
    tensor = engine.tensor(name, array.shape)
    tensor.write(array)
    return Placed(tensor, array.shape, array.dtype)
