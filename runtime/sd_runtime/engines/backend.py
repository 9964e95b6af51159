"""A backend: what runs a bundle's networks, a library on a device.  `registry` says which there are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from ..errors import UsageError
from .protocol import Engine

if TYPE_CHECKING:
    from ..bundle.manifest import EnginePrecision
    from .gpu.gpu import Gpu

DEVICES = ("auto", "cpu", "cuda")


class Backend(Protocol):
    """One library, opened for one bundle."""

    @property
    def name(self) -> str: ...

    def engine(self, component: str, form: str, fallback: Callable[[], Engine]) -> Engine | None:
        """The engine for one of a component's graphs; None: it has none, the next backend is asked.

        fallback: opens the next backend's engine for that graph, for shapes that this one's does not take; who opens it
        closes it.  BundleError, EngineError, DependencyError: there is one, and it cannot be had."""
        ...

    def batch_sizes(self, most: int, rows: int, latent: tuple[int, ...]) -> Sequence[int]:
        """How many pictures at once, up to `most`, its UNet runs well; none: ask the next backend.

        rows: of the UNet's batch for each picture; latent: (C, h, w)."""
        ...

    def precision(self, component: str) -> EnginePrecision | None:
        """The precision in which a component's plain graph is computed; None: this backend does not run it."""
        ...

    def close(self) -> None:
        """Let go of the library; its engines were closed."""
        ...


class Machine:
    """Where backends are opened: the device that is asked for, and the one GPU that they share.

    device   "cpu", "cuda", or "auto": the GPU where there is one that works
    threads  how many each network takes on the CPU; None: one a core
    """

    def __init__(self, device: str = "auto", threads: int | None = None) -> None:
        if device not in DEVICES:
            raise UsageError("device", got=device, accepted=", ".join(DEVICES))
        if threads is not None and threads < 1:
            raise UsageError("threads", got=threads, accepted="at least 1")
        self.device, self.threads = device, threads
        self._gpu: Gpu | None = None

    @property
    def on_cpu(self) -> bool:
        """Whether no backend has opened the GPU."""
        return self._gpu is None

    def gpu(self) -> Gpu:
        """The GPU, opened by whoever asks first.  DependencyError, EngineError: there is none that works."""
        if self._gpu is None:
            from .gpu.gpu import Gpu

            self._gpu = Gpu()
        return self._gpu

    def refuse(self) -> None:
        """Let no more work begin on the GPU: what it needs is about to be freed."""
        if self._gpu is not None:
            self._gpu.refuse()

    def close(self) -> None:
        """Give the GPU back; the engines on it were closed."""
        if self._gpu is not None:
            self._gpu.close()
            self._gpu = None
