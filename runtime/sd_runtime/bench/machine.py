"""The machine and the libraries that were measured.  Standard library only, so that a process which starts others stays
small."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

LIBRARIES = ("sd-lean", "onnxruntime", "onnxruntime-gpu", "tensorrt", "numpy")


def describe_machine() -> dict[str, str]:
    """The processor, the cores that this process may use, and the versions of Python and the libraries."""
    return {
        "cpu": _processor(),
        "cores": str(physical_cores()),
        "python": platform.python_version(),
        **versions(LIBRARIES),
    }


def versions(libraries: tuple[str, ...]) -> dict[str, str]:
    """The versions of those libraries that are installed."""
    return {library: found for library in libraries if (found := _version(library)) is not None}


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def physical_cores() -> int:
    """The cores that this process may use, which is how many threads ONNX Runtime starts by itself."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = {(block.get("physical id"), block.get("core id", block.get("processor"))) for block in _cpuinfo()}
    return min(len(cores) or allowed, allowed)


def _processor() -> str:
    blocks = _cpuinfo()
    return blocks[0].get("model name", platform.machine()) if blocks else platform.processor() or platform.machine()


def _cpuinfo() -> list[dict[str, str]]:
    """Linux's description of each logical processor; empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return []
    lines = [[line.split(":", 1) for line in block.splitlines() if ":" in line] for block in text.split("\n\n")]
    return [{name.strip(): value.strip() for name, value in block} for block in lines if block]
