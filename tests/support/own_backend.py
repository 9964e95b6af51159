"""A backend of one's own: ONNX Runtime on the CPU, with its calls counted and batches of chosen sizes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from sd_runtime.bundle.bundle import Bundle
from sd_runtime.engines.onnxruntime_.backend import OnnxRuntimeBackend
from sd_runtime.engines.protocol import Engine, Feed
from sd_runtime.tensor import Array, TensorSpec


@dataclass
class CountedEngine:
    """An engine that counts its runs under its component's name."""

    engine: Engine
    component: str
    calls: Counter[str]

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self.engine.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self.engine.outputs

    def place(self, name: str, array: Array) -> Feed:
        return self.engine.place(name, array)

    def run(self, feeds: Mapping[str, Feed]) -> dict[str, Array]:
        self.calls[self.component] += 1
        return self.engine.run(feeds)

    def close(self) -> None:
        self.engine.close()


@dataclass
class OwnBackend:
    """See `Backend`.  `components`: those that it has engines for; None: all.  `batches`: pictures at once."""

    bundle: Bundle
    batches: Sequence[int] = (1,)
    components: frozenset[str] | None = None
    name: str = "own"
    calls: Counter[str] = field(default_factory=Counter)
    opened: list[tuple[str, str]] = field(default_factory=list)
    closed: bool = False

    def __post_init__(self) -> None:
        self._onnxruntime = OnnxRuntimeBackend(self.bundle, threads=1)

    def engine(self, component: str, form: str, fallback: Callable[[], Engine]) -> Engine | None:
        if self.components is not None and component not in self.components:
            return None
        self.opened.append((component, form))
        return CountedEngine(self._onnxruntime.engine(component, form, fallback), component, self.calls)

    def batch_sizes(self, most: int, rows: int, latent: tuple[int, ...]) -> Sequence[int]:
        return [size for size in self.batches if size <= most]

    def precision(self, component: str) -> str | None:
        return None

    def close(self) -> None:
        self.closed = True
