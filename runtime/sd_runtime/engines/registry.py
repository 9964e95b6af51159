"""Which backends there are, and in what order they are asked.

To add one: a folder beside this file, with an opener, and one entry in `BACKENDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from ..bundle.bundle import Bundle
from ..bundle.manifest import EngineLibrary
from ..errors import EngineError, UsageError
from .backend import Backend, Machine


def _tensorrt(bundle: Bundle, machine: Machine, library: EngineLibrary = "tensorrt") -> Backend | None:
    if machine.device == "cpu" or not bundle.manifest.engines_of(library):
        return None  # before anything is imported: a bundle without engines starts no slower for them
    from .tensorrt_.selection import open_tensorrt

    return open_tensorrt(bundle, machine, library)


def _onnxruntime(bundle: Bundle, machine: Machine) -> Backend:
    from .onnxruntime_.backend import open_onnxruntime

    return open_onnxruntime(bundle, machine)


def _openvino(bundle: Bundle, machine: Machine, *, bfloat16: bool = False) -> Backend:
    from .openvino_.backend import open_openvino

    return open_openvino(bundle, machine, bfloat16=bfloat16)


Opener = Callable[[Bundle, Machine], Backend | None]  # None, said aloud: it cannot run this bundle on this machine

BACKENDS: dict[str, Opener] = {
    "tensorrt": _tensorrt,
    "tensorrt_rtx": partial(_tensorrt, library="tensorrt_rtx"),
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "openvino-bf16": partial(_openvino, bfloat16=True),
}
USUAL = ("tensorrt", "tensorrt_rtx", "onnxruntime")  # in the order in which they are asked where nothing else is said


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
