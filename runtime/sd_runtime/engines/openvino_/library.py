"""OpenVINO itself: imported without its telemetry, what it raises translated."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ...errors import DependencyError, EngineError, OutOfMemoryError, one_line

OLDEST = (2026, 2)  # the first that reads Attention and Conv of opset 23
TELEMETRY = "openvino_telemetry"
INSTALL = 'pip install --upgrade "sd-lean[openvino]"'
PLACES = re.compile(r"(Exception from|Check '[^']*' failed at) \S+:\d+:?")  # in OpenVINO's source
OUT_OF_MEMORY = ("bad_alloc", "Cannot allocate memory", "Failed to allocate")


def import_openvino() -> Any:
    """The library, silent: left alone, its import is reported to Google Analytics, under an identifier that is kept in
    ~/intel.  Without the package that does so OpenVINO falls back to a stub of its own.

    DependencyError: it is not installed, cannot be loaded, or is too old."""
    absent: dict[str, Any] = {} if "openvino" in sys.modules else {TELEMETRY: None}  # None: not to be imported
    present = {name: sys.modules.pop(name) for name in absent if name in sys.modules}
    sys.modules.update(absent)
    try:
        import openvino
    except ImportError as error:
        raise DependencyError("OpenVINO cannot be imported", got=str(error), remedy=INSTALL) from error
    finally:
        for name in absent:
            del sys.modules[name]
        sys.modules.update(present)
    if tuple(map(int, openvino.__version__.split(".")[:2])) < OLDEST:
        accepted = f"{'.'.join(map(str, OLDEST))} or later"
        raise DependencyError("OpenVINO is too old", got=openvino.__version__, accepted=accepted, remedy=INSTALL)
    return openvino


@contextmanager
def translated(what: str) -> Iterator[None]:
    """What OpenVINO raises, as ours.  Its exceptions have no common base but Exception."""
    try:
        yield
    except EngineError:
        raise
    except Exception as error:
        raise translate(error, what) from error


def translate(error: Exception, what: str) -> EngineError:
    said = " ".join(PLACES.sub("", str(error)).split()) or type(error).__name__
    if isinstance(error, MemoryError) or any(sign in said for sign in OUT_OF_MEMORY):
        return OutOfMemoryError(
            f"{what}: out of memory ({one_line(said, 160)})", remedy="use a smaller batch or picture size"
        )
    return EngineError(f"{what}: {one_line(said, 300)}")
