"""A graph of a component as TensorRT engines: for each request the one that was built closest to its shapes."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

from ..errors import EngineError
from ..manifest import EngineRecord, Graph
from ..tensor import Array, Dim, FeedCheck, TensorSpec
from .cuda import Gpu
from .cuda_memory import GpuTensor, on_gpu
from .device import Device, DeviceTensor, placed
from .protocol import Feed, Placed
from .tensorrt import Plan, Shapes, TensorRT

IDLE_CALLS = 4  # sets of shapes whose tensors `run` keeps for the next time


class TensorRTEngine:
    """See `Engine` and `DeviceEngine`.

    An engine for exact shapes is preferred to one for a range of them, and one listed earlier to one listed later.  The
    first is put on the GPU at once, the others when a request first has their shapes.
    """

    def __init__(
        self,
        library: TensorRT,
        gpu: Gpu,
        graph: Graph,
        records: Sequence[EngineRecord],
        read: Callable[[str], bytes],
        rebuild: str,
    ) -> None:
        """`records`: one or more, all of `graph`; `read`: path in the bundle → verified bytes; `rebuild`: a command."""
        self._library, self._gpu, self._graph = library, gpu, graph
        self._read, self._rebuild = read, rebuild
        self._records = sorted(records, key=breadth)
        self._inputs = tuple(narrowed(spec, self._records) for spec in graph.inputs)
        self._check = FeedCheck(self._inputs)
        self._plans: dict[str, Plan] = {}
        self._calls: OrderedDict[tuple[tuple[str, tuple[int, ...]], ...], Call] = OrderedDict()
        self._first = self._plan(self._records[0])

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._graph.outputs

    @property
    def device(self) -> Device:
        return self._gpu

    def _plan(self, record: EngineRecord) -> Plan:
        """The engine of a record, loaded if it was not."""
        if record.path not in self._plans:
            data = self._read(record.path)  # before it is this engine's turn, so that others load meanwhile
            with self._gpu.turn(f"loading {record.path}"):
                if record.path not in self._plans:
                    plan = self._library.load(record.path, data, self._gpu)
                    self._check_signature(plan)
                    self._plans[record.path] = plan
        return self._plans[record.path]

    def _check_signature(self, plan: Plan) -> None:
        for kind, specs, names in (
            ("inputs", self._graph.inputs, plan.inputs),
            ("outputs", self._graph.outputs, plan.outputs),
        ):
            declared = sorted(spec.name for spec in specs)
            if declared != sorted(names):
                what = f"{kind} of the engine {plan.name} differ from the manifest"
                raise EngineError(
                    what, got=", ".join(sorted(names)), accepted=", ".join(declared), remedy=self._rebuild
                )

    def _plan_for(self, shapes: Shapes) -> Plan:
        for record in self._records:
            if record.accepts(shapes):
                return self._plan(record)
        ranges = " or ".join(describe(record) for record in self._records)
        got = ", ".join(f"{name}{shape}" for name, shape in shapes.items())
        what = f"no TensorRT engine of {self._records[0].component} was built for these shapes"
        raise EngineError(what, got=got, accepted=ranges, remedy=f"build one that takes them: {self._rebuild}")

    def tensor(self, name: str, shape: tuple[int, ...]) -> GpuTensor:
        return self._gpu.tensor(shape, self._first.dtype(name))

    def prepare(self, tensors: Mapping[str, DeviceTensor]) -> PlanLaunch:
        shapes = {spec.name: tensors[spec.name].shape for spec in self._inputs}
        with self._gpu.turn(f"preparing the engine of {self._records[0].component}"):
            return PlanLaunch(self._plan_for(shapes), shapes, on_gpu(tensors))

    def place(self, name: str, array: Array) -> Feed:
        return placed(self, name, array)

    def run(self, feeds: Mapping[str, Feed]) -> dict[str, Array]:
        self._check(feeds)
        with self._gpu.turn(f"running the engine of {self._records[0].component}"):
            return self._call({name: feed.shape for name, feed in feeds.items()}).run(feeds)

    def _call(self, shapes: Shapes) -> Call:
        """The call for these shapes, from before if there was one; the one not used for longest makes room."""
        key = tuple(sorted(shapes.items()))
        if key not in self._calls:
            plan = self._plan_for(shapes)
            while len(self._calls) >= IDLE_CALLS:
                self._calls.popitem(last=False)[1].close()
            self._calls[key] = Call(plan, shapes)
        self._calls.move_to_end(key)
        return self._calls[key]

    def close(self) -> None:
        with self._gpu.closing():
            for call in self._calls.values():
                call.close()
            self._calls.clear()
            for plan in self._plans.values():
                plan.close()
            self._plans.clear()


class PlanLaunch:
    """An engine's run on tensors chosen once; see `Launch`."""

    def __init__(self, plan: Plan, shapes: Shapes, tensors: Mapping[str, GpuTensor]) -> None:
        self._plan, self._shapes, self._tensors = plan, shapes, tensors
        self._context = plan.context(shapes)
        for name, tensor in tensors.items():
            shape = self._context.shape(name)
            if (tensor.dtype, tensor.shape) != (plan.dtype(name), shape):
                self.close()
                got, accepted = f"{tensor.dtype}{tensor.shape}", f"{plan.dtype(name)}{shape}"
                raise EngineError(f"tensor '{name}' of the engine {plan.name}", got=got, accepted=accepted)

    @property
    def recordable(self) -> bool:
        """Not where the context is told other shapes in between: what a graph recorded would no longer hold."""
        return self._plan.many_contexts or self._plan.exact

    def __call__(self) -> None:
        with self._plan.gpu.turn(f"running the engine {self._plan.name}"):
            self._context.set_shapes(self._shapes)
            self._context.enqueue(self._tensors)

    def close(self) -> None:
        self._plan.release(self._context)


class Call:
    """An engine's run from and to numpy arrays of one set of shapes, through tensors of its own."""

    def __init__(self, plan: Plan, shapes: Shapes) -> None:
        self._plan, self._shapes = plan, shapes
        self._context = plan.context(shapes)
        self._tensors: dict[str, GpuTensor] = {}
        try:
            for name in (*plan.inputs, *plan.outputs):
                self._tensors[name] = plan.gpu.tensor(self._context.shape(name), plan.dtype(name))
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
        pending = {name: tensors[name].read() for name in self._plan.outputs}
        return {name: copy.wait().copy() for name, copy in pending.items()}

    def close(self) -> None:
        self._plan.release(self._context)
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


def describe(record: EngineRecord) -> str:
    """The shapes of an engine for people: sample(2, 4, 64..96, 64)."""
    return " ".join(
        f"{name}({', '.join(str(a) if a == b else f'{a}..{b}' for a, b in zip(r.min, r.max, strict=True))})"
        for name, r in record.profile.items()
    )
