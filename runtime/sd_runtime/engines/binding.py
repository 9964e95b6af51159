"""ONNX Runtime's IO binding: runs from and to tensors that stay where the session computes.  See `device`.

A run is finished when it returns, so nothing here has to be waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import EngineError
from ..tensor import Array
from .device import DeviceTensor, InTurn, Launch


@dataclass(frozen=True)
class OnnxRuntimeDevice:
    """The CPU or the GPU, as ONNX Runtime names them."""

    name: str

    def record(self, launches: Sequence[Launch]) -> Launch:
        return InTurn(launches)


class OrtTensor:
    """An OrtValue on a device."""

    def __init__(self, ort: Any, array: Array, device: str) -> None:
        self.shape, self.dtype = array.shape, array.dtype
        self.value = ort.OrtValue.ortvalue_from_numpy(array, device, 0)

    def write(self, array: Array) -> None:
        assert array.shape == self.shape, (array.shape, self.shape)
        self.value.update_inplace(np.ascontiguousarray(array, self.dtype))

    def read(self, rows: int | None = None) -> Arrived:
        return Arrived(np.array(self.value.numpy()[:rows]))  # on the CPU, numpy() is a view

    def close(self) -> None:
        del self.value


@dataclass(frozen=True)
class Arrived:
    """A copy to the host that is done; see `Pending`."""

    array: Array

    def wait(self) -> Array:
        return self.array


class BoundLaunch:
    """A session's run on tensors chosen once; see `Launch`."""

    recordable = False

    def __init__(
        self,
        session: Any,
        tensors: Mapping[str, DeviceTensor],
        inputs: Sequence[str],
        translate: Callable[[Exception, str], EngineError],
    ) -> None:
        self._session, self._binding, self._translate = session, session.io_binding(), translate
        for name, tensor in tensors.items():
            assert isinstance(tensor, OrtTensor), "a tensor of another device"
            bind = self._binding.bind_ortvalue_input if name in inputs else self._binding.bind_ortvalue_output
            bind(name, tensor.value)

    def __call__(self) -> None:
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # ONNX Runtime's exceptions have no common base but Exception
            raise self._translate(error, "the engine failed while running") from error

    def close(self) -> None:
        del self._binding, self._session
