"""An engine on the host as a launch on the GPU: for shapes that nothing on the GPU takes, in loops that run there."""

from __future__ import annotations

from collections.abc import Mapping

from ...tensor import Array
from ..protocol import Engine, Feed, Placed
from .gpu import Gpu
from .memory import GpuTensor, Slot


class HostLaunch:
    """An engine's run on the host, from and to tensors on the GPU chosen once; see `Launch`.

    Inputs come through pinned memory of its own: that of their tensors belongs to whoever reads these."""

    recordable = False

    def __init__(self, gpu: Gpu, engine: Engine, tensors: Mapping[str, GpuTensor]) -> None:
        self._gpu, self._engine, self._tensors = gpu, engine, tensors
        self._slots: dict[str, Slot] = {}
        try:
            for spec in engine.inputs:
                tensor = tensors[spec.name]
                with gpu.turn("allocating pinned memory"):
                    self._slots[spec.name] = Slot(gpu, tensor.shape, tensor.dtype)
        except BaseException:
            self.close()
            raise

    def __call__(self) -> None:
        feeds = {name: self._fetch(self._tensors[name], slot) for name, slot in self._slots.items()}
        for name, value in self._engine.run(feeds).items():
            self._tensors[name].write(value)

    def _fetch(self, tensor: GpuTensor, slot: Slot) -> Array:
        from cuda.core import Buffer

        with self._gpu.turn("copying from the GPU"):
            source = Buffer.from_handle(tensor.address, tensor.size, owner=tensor)
            source.copy_to(slot.buffer, stream=self._gpu.stream)
            self._gpu.stream.record(slot.event)
        with self._gpu.translated("the GPU failed while running"):
            slot.event.sync()
        return slot.array

    def close(self) -> None:
        for slot in self._slots.values():
            slot.close()


def as_arrays(feeds: Mapping[str, Feed]) -> dict[str, Feed]:
    """Inputs for an engine on the host: what was placed on the GPU, as arrays."""
    return {name: feed.value.read().wait() if isinstance(feed, Placed) else feed for name, feed in feeds.items()}
