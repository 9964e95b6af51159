"""New processes: their time from start to end, their peak memory, and the GPU's memory meanwhile.

This module imports nothing heavy, for a child's peak memory starts from that of the process which forked it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..cli.flags import flag
from ..errors import SDError, one_line

if TYPE_CHECKING:
    from ..request import Request

INTERVAL = 0.05  # seconds between two looks at the GPU's memory
MEGABYTE = 1e6
RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes; Linux counts in KiB
SD_RUN = "import sys; from sd_runtime.cli.run import main; sys.exit(main())"
FIELDS = ("num_inference_steps", "guidance_scale", "height", "width", "scheduler")  # of a request, told as flags


@dataclass(frozen=True)
class Cost:
    """What a process took: seconds, peak resident megabytes, and peak GPU megabytes above what was used before (None:
    there is no GPU)."""

    seconds: float
    megabytes: float
    gpu_megabytes: float | None = None


def cold_command(
    bundle: Path, request: Request, picture: Path, device: str, backends: Sequence[str] | None = None
) -> list[object]:
    """sd-run, as a user starts it, for the first picture of `request`."""
    values = {name: getattr(request, name) for name in FIELDS}
    values |= {"negative_prompt": request.negative_prompts[0], "seed": request.seeds[0], "bundle": bundle}
    values |= {"device": device, "backends": backends and ",".join(backends), "output": picture}
    words = [f"{flag(name)}={value}" for name, value in values.items() if value is not None]
    switches = ["--overwrite", "--quiet", "--no-safety-checker"]
    return [sys.executable, "-c", SD_RUN, *words, *switches, "--", request.prompts[0]]


def installed() -> dict[str, str]:
    """The environment of a process whose packages are compiled once, as pip compiles what it installs.

    Where bytecode is not written, every start of a clone compiles this package anew, and none of an installation."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def run(command: Sequence[object], environment: Mapping[str, str] | None = None) -> Cost:
    """Run a program to its end; None: in `installed`.  SDError with the last line of its output if it fails."""
    with tempfile.TemporaryFile() as output, GpuMemory() as gpu:
        started = time.perf_counter()
        process = subprocess.Popen(
            [str(word) for word in command],
            env=installed() if environment is None else environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            last = output.read().decode(errors="replace").strip().splitlines()[-1:]
            raise SDError(f"{command[0]} ended with {process.returncode}: {one_line(' '.join(last), 300)}")
    return Cost(seconds, usage.ru_maxrss * RSS_UNIT / MEGABYTE, gpu.peak)


def peak_megabytes() -> float:
    """The peak resident memory of this process so far."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT / MEGABYTE


class GpuMemory:
    """Watches the used memory of all GPUs through nvidia-smi while the block runs; `peak` is None without nvidia-smi.

    What other programs allocate on the GPU meanwhile counts, too."""

    def __init__(self) -> None:
        self._command = shutil.which("nvidia-smi")
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._before: float | None = None
        self._highest = 0.0

    @property
    def peak(self) -> float | None:
        """Megabytes above what was used before."""
        return None if self._before is None else max(self._highest - self._before, 0.0)

    def __enter__(self) -> GpuMemory:
        self._before = self._used()
        if self._before is not None:
            self._highest = self._before
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(INTERVAL):
            self._highest = max(self._highest, self._used() or 0.0)

    def _used(self) -> float | None:
        """Of all GPUs together, in megabytes."""
        if self._command is None:
            return None
        query = [self._command, "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        done = subprocess.run(query, capture_output=True, text=True, check=False)
        numbers = done.stdout.split()
        if done.returncode or not numbers or not all(number.isdigit() for number in numbers):
            return None
        return sum(map(int, numbers)) * (1 << 20) / MEGABYTE
