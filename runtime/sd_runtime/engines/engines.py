"""The networks of a bundle as engines, loaded side by side, each from the first backend that has it."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

from ..bundle.bundle import Bundle
from ..bundle.catalogue import EAGER, check_signature
from ..errors import EngineError
from .backend import Backend, Machine
from .protocol import Engine
from .registry import open_backends

if TYPE_CHECKING:
    from ..bundle.manifest import EnginePrecision


class Engines:
    """Engines by component name and graph form; loading is thread-safe, `close` releases all of them."""

    def __init__(self, bundle: Bundle, backends: Sequence[Backend], machine: Machine | None = None) -> None:
        """`backends`, in order of preference, and `machine`, which has the GPU, belong to this object from now on."""
        self._bundle, self._backends, self._machine = bundle, tuple(backends), machine or Machine("cpu")
        self._engines: dict[tuple[str, str], Engine] = {}
        self._lock, self._closed = threading.Lock(), False

    @classmethod
    def open(
        cls,
        bundle: Bundle,
        device: str = "auto",
        *,
        threads: int | None = None,
        backends: Sequence[str | Backend] | None = None,
    ) -> Engines:
        """UsageError, DependencyError, EngineError: device or backends cannot be had."""
        machine = Machine(device, threads)
        try:
            return cls(bundle, open_backends(bundle, machine, backends), machine)
        except BaseException:
            machine.close()
            raise

    @property
    def on_cpu(self) -> bool:
        """Whether no GPU is used."""
        return self._machine.on_cpu

    @property
    def backends(self) -> tuple[Backend, ...]:
        return self._backends

    def precision(self, name: str) -> EnginePrecision:
        """The precision in which a component's plain graph is computed here."""
        found = (backend.precision(name) for backend in self._backends)
        return next((precision for precision in found if precision is not None), self._bundle.manifest.precision)

    def batch_sizes(self, most: int, rows: int, latent: tuple[int, ...]) -> Sequence[int]:
        """How many pictures at once, up to `most`, are good for the UNet; see `Backend.batch_sizes`."""
        found = (backend.batch_sizes(most, rows, latent) for backend in self._backends)
        return next((sizes for sizes in found if sizes), (1,))

    def preload(self, names: Iterable[str] = EAGER) -> None:
        """Load several components at once, each on a thread of its own; if one fails, release all."""
        try:
            with ThreadPoolExecutor() as pool:
                for future in [pool.submit(self.engine, name) for name in names]:
                    future.result()
        except BaseException:
            self.close()
            raise

    def engine(self, name: str, form: str = "plain") -> Engine:
        """The engine of a component in one of its graph forms.  BundleError or EngineError say why there is none."""
        with self._lock:
            if self._closed:
                raise EngineError("the pipeline was closed")
            known = self._engines.get((name, form))
        if known is not None:
            return known
        graph = self._bundle.component(name).graph(form)
        loaded = self._load(name, form, 0)
        try:
            check_signature(graph.path, name, form, loaded.inputs, loaded.outputs)
        except BaseException:
            loaded.close()
            raise
        with self._lock:
            kept = self._engines.setdefault((name, form), loaded)
        if kept is not loaded:  # another thread was quicker
            loaded.close()
        return kept

    def _load(self, name: str, form: str, first: int) -> Engine:
        """The engine of the first backend that has one, from number `first` on."""
        for number, backend in enumerate(self._backends[first:], first):
            engine = backend.engine(name, form, partial(self._load, name, form, number + 1))
            if engine is not None:
                return engine
        asked = ", ".join(backend.name for backend in self._backends[first:]) or "there is none left to ask"
        raise EngineError(f"no backend has an engine for {name} ({form})", got=asked)

    def close(self) -> None:
        """Release the engines; a second time, do nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._machine.refuse()
            for engine in self._engines.values():
                engine.close()
            self._engines.clear()
        for backend in self._backends:
            backend.close()
        self._machine.close()
