"""Backends: what runs a bundle's networks.  A backend is a library on a device; a list of them is asked in turn.

To add one: a folder beside this file, and one entry in `BACKENDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from ..bundle.bundle import Bundle
from ..errors import EngineError, UsageError
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
        """That it computes a component's plain graph in; None: it does not run it."""
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

    def close(self) -> None:
        """Give the GPU back; the engines on it were closed."""
        if self._gpu is not None:
            self._gpu.close()
            self._gpu = None


def _tensorrt(bundle: Bundle, machine: Machine) -> Backend | None:
    from .tensorrt_.selection import open_tensorrt

    return open_tensorrt(bundle, machine)


def _onnxruntime(bundle: Bundle, machine: Machine) -> Backend:
    from .onnxruntime_.backend import open_onnxruntime

    return open_onnxruntime(bundle, machine)


Opener = Callable[[Bundle, Machine], Backend | None]  # None, said aloud: it cannot run this bundle on this machine

BACKENDS: dict[str, Opener] = {
    "tensorrt": _tensorrt,
    "onnxruntime": _onnxruntime,
}
USUAL = ("tensorrt", "onnxruntime")  # in the order in which they are asked where nothing else is said


def open_backends(bundle: Bundle, machine: Machine, wanted: Sequence[str | Backend] | None = None) -> list[Backend]:
    """The backends for a bundle: names of `BACKENDS`, or backends of the caller's own, in order of preference.

    UsageError: an unknown name; DependencyError, EngineError: one that was named cannot be had."""
    if wanted is not None and (isinstance(wanted, str) or not wanted):
        raise UsageError("backends", got=wanted, accepted=f"a list of {', '.join(BACKENDS)}, or backends of your own")
    opened: list[Backend] = []
    try:
        for one in USUAL if wanted is None else wanted:
            backend = _open(one, bundle, machine) if isinstance(one, str) else one
            if backend is not None:
                opened.append(backend)
    except BaseException:
        for backend in opened:
            backend.close()
        raise
    if not opened:
        raise EngineError(f"none of the backends runs this bundle here: {', '.join(map(str, wanted or USUAL))}")
    return opened


def _open(name: str, bundle: Bundle, machine: Machine) -> Backend | None:
    if name not in BACKENDS:
        raise UsageError("backends", got=name, accepted=", ".join(BACKENDS))
    return BACKENDS[name](bundle, machine)
