"""A graph of a component as TensorRT engines: for each request the one that was built closest to its shapes."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

from ...bundle.manifest import EngineRecord, Graph
from ...errors import EngineError
from ...tensor import Array, Dim, FeedCheck, TensorSpec
from ..device import Device, DeviceEngine, DeviceTensor, Launch, placed
from ..gpu.gpu import Gpu
from ..gpu.host_fallback import HostLaunch, as_arrays
from ..gpu.memory import GpuTensor, on_gpu
from ..protocol import Engine, Feed, Placed
from .library import LoadedEngine, Shapes, TensorRT

IDLE_CALLS = 4  # sets of shapes whose tensors `run` keeps for the next time


class TensorRTEngine:
    """See `Engine` and `DeviceEngine`.

    An engine for exact shapes is preferred to one for a range of them, and one listed earlier to one listed later.  The
    first is put on the GPU at once, the others when a request first has their shapes.  Shapes that none of them takes
    go to an engine of another library, if there is one.
    """

    def __init__(
        self,
        library: TensorRT,
        gpu: Gpu,
        graph: Graph,
        records: Sequence[EngineRecord],
        read: Callable[[str], bytes],
        rebuild: str,
        fallback: Callable[[Shapes], Engine] | None = None,
    ) -> None:
        """`records`: one or more, all of `graph`; `read`: path in the bundle → verified bytes; `rebuild`: a command.

        `fallback`: opens, when it is first needed, the engine for shapes that no record takes, or says in an
        EngineError why it cannot."""
        self._library, self._gpu, self._graph = library, gpu, graph
        self._read, self._rebuild = read, rebuild
        self._records = sorted(records, key=breadth)
        self._fallback, self._opening = fallback, threading.Lock()
        self._other: Engine | None = None
        self._inputs = graph.inputs if fallback else tuple(narrowed(spec, self._records) for spec in graph.inputs)
        self._check = FeedCheck(self._inputs)
        self._loaded: dict[str, LoadedEngine] = {}
        self._calls: OrderedDict[tuple[tuple[str, tuple[int, ...]], ...], Call] = OrderedDict()
        self._first = self._load(self._records[0])

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._graph.outputs

    @property
    def device(self) -> Device:
        return self._gpu

    def _load(self, record: EngineRecord) -> LoadedEngine:
        """The engine of a record, loaded if it was not."""
        if record.path not in self._loaded:
            data = self._read(record.path)  # before it is this engine's turn, so that others load meanwhile
            with self._gpu.turn(f"loading {record.path}"):
                if record.path not in self._loaded:
                    loaded = self._library.load(record.path, data, self._gpu)
                    self._check_signature(loaded)
                    self._loaded[record.path] = loaded
        return self._loaded[record.path]

    def _check_signature(self, loaded: LoadedEngine) -> None:
        for kind, specs, names in (
            ("inputs", self._graph.inputs, loaded.inputs),
            ("outputs", self._graph.outputs, loaded.outputs),
        ):
            declared = sorted(spec.name for spec in specs)
            if declared != sorted(names):
                what = f"{kind} of the engine {loaded.name} differ from the manifest"
                raise EngineError(
                    what, got=", ".join(sorted(names)), accepted=", ".join(declared), remedy=self._rebuild
                )

    def _loaded_for(self, shapes: Shapes) -> LoadedEngine | None:
        """The engine for these shapes, loaded: not within a turn, for others need not wait while it is read."""
        record = next((record for record in self._records if record.accepts(shapes)), None)
        return None if record is None else self._load(record)

    def _fallback_engine(self, shapes: Shapes) -> Engine:
        """The other library's engine, for shapes that none of ours takes."""
        if self._fallback is None:
            raise not_built_for(shapes, self._records, f"build one that takes them: {self._rebuild}")
        with self._opening:
            if self._other is None:
                self._other = self._fallback(shapes)
            return self._other

    def tensor(self, name: str, shape: tuple[int, ...]) -> GpuTensor:
        return self._gpu.tensor(shape, self._first.dtype(name))

    def prepare(self, tensors: Mapping[str, DeviceTensor]) -> Launch:
        shapes = {spec.name: tensors[spec.name].shape for spec in self._inputs}
        loaded = self._loaded_for(shapes)
        if loaded is None:
            other = self._fallback_engine(shapes)
            if isinstance(other, DeviceEngine):
                return other.prepare(tensors)
            return HostLaunch(self._gpu, other, on_gpu(tensors))
        with self._gpu.turn(f"preparing the engine of {self._records[0].component}"):
            return EngineLaunch(loaded, shapes, on_gpu(tensors))

    def place(self, name: str, array: Array) -> Feed:
        return placed(self, name, array)

    def run(self, feeds: Mapping[str, Feed]) -> dict[str, Array]:
        self._check(feeds)
        shapes = {name: feed.shape for name, feed in feeds.items()}
        loaded = self._loaded_for(shapes)
        if loaded is None:
            other = self._fallback_engine(shapes)
            return other.run(feeds if isinstance(other, DeviceEngine) else as_arrays(feeds))
        with self._gpu.turn(f"running the engine of {self._records[0].component}"):
            return self._call(loaded, shapes).run(feeds)

    def _call(self, loaded: LoadedEngine, shapes: Shapes) -> Call:
        """The call for these shapes, from before if there was one; the one not used for longest makes room."""
        key = tuple(sorted(shapes.items()))
        if key not in self._calls:
            while len(self._calls) >= IDLE_CALLS:
                self._calls.popitem(last=False)[1].close()
            self._calls[key] = Call(loaded, shapes)
        self._calls.move_to_end(key)
        return self._calls[key]

    def close(self) -> None:
        if self._other is not None:
            self._other.close()
        with self._gpu.closing():
            for call in self._calls.values():
                call.close()
            self._calls.clear()
            for loaded in self._loaded.values():
                loaded.close()
            self._loaded.clear()


class EngineLaunch:
    """An engine's run on tensors chosen once; see `Launch`."""

    def __init__(self, loaded: LoadedEngine, shapes: Shapes, tensors: Mapping[str, GpuTensor]) -> None:
        self._engine, self._shapes, self._tensors = loaded, shapes, tensors
        self._context = loaded.context(shapes)
        for name, tensor in tensors.items():
            shape = self._context.shape(name)
            if (tensor.dtype, tensor.shape) != (loaded.dtype(name), shape):
                self.close()
                got, accepted = f"{tensor.dtype}{tensor.shape}", f"{loaded.dtype(name)}{shape}"
                raise EngineError(f"tensor '{name}' of the engine {loaded.name}", got=got, accepted=accepted)

    @property
    def recordable(self) -> bool:
        """Not where the context is told other shapes in between: what a graph recorded would no longer hold; and not
        where the library says that a run cannot be."""
        return (self._engine.many_contexts or self._engine.exact) and self._context.capturable

    def __call__(self) -> None:
        with self._engine.gpu.turn(f"running the engine {self._engine.name}"):
            self._context.set_shapes(self._shapes)
            self._context.enqueue(self._tensors)

    def close(self) -> None:
        self._engine.release(self._context)


class Call:
    """An engine's run from and to numpy arrays of one set of shapes, through tensors of its own."""

    def __init__(self, loaded: LoadedEngine, shapes: Shapes) -> None:
        self._engine, self._shapes = loaded, shapes
        self._context = loaded.context(shapes)
        self._tensors: dict[str, GpuTensor] = {}
        try:
            for name in (*loaded.inputs, *loaded.outputs):
                self._tensors[name] = loaded.gpu.tensor(self._context.shape(name), loaded.dtype(name))
        except BaseException:
            self.close()
            raise

    def run(self, feeds: Mapping[str, Feed]) -> dict[str, Array]:
        tensors = dict(self._tensors)
        for name, feed in feeds.items():
            if isinstance(feed, Placed):
                tensors[name] = feed.value
            else:
                tensors[name].write(feed)
        self._context.set_shapes(self._shapes)
        self._context.enqueue(tensors)
        pending = {name: tensors[name].read() for name in self._engine.outputs}
        return {name: copy.wait().copy() for name, copy in pending.items()}

    def close(self) -> None:
        self._engine.release(self._context)
        for tensor in self._tensors.values():
            tensor.close()


def breadth(record: EngineRecord) -> float:
    """How far the shapes of an engine reach: 0 for exact ones."""
    return sum(
        math.log(high / low)
        for allowed in record.profile.values()
        for low, high in zip(allowed.min, allowed.max, strict=True)
    )


def narrowed(spec: TensorSpec, records: Sequence[EngineRecord]) -> TensorSpec:
    """An input with the sizes that at least one of the engines takes, on each axis by itself."""
    ranges = [record.profile[spec.name] for record in records if spec.name in record.profile]
    if len(ranges) < len(records):
        return spec
    shape = tuple(
        Dim(axis.symbol, min(r.min[i] for r in ranges), ranges[0].opt[i], max(r.max[i] for r in ranges))
        if isinstance(axis, Dim)
        else axis
        for i, axis in enumerate(spec.shape)
    )
    return TensorSpec(spec.name, spec.dtype, shape)


def not_built_for(shapes: Shapes, records: Sequence[EngineRecord], remedy: str) -> EngineError:
    """The error that none of a component's engines takes these shapes."""
    what = f"no TensorRT engine of {records[0].component} was built for these shapes"
    got = ", ".join(f"{name}{shape}" for name, shape in shapes.items())
    return EngineError(what, got=got, accepted=" or ".join(describe(record) for record in records), remedy=remedy)


def describe(record: EngineRecord) -> str:
    """The shapes of an engine for people: sample(2, 4, 64..96, 64)."""
    return " ".join(
        f"{name}({', '.join(str(a) if a == b else f'{a}..{b}' for a, b in zip(r.min, r.max, strict=True))})"
        for name, r in record.profile.items()
    )
