"""What an export tells its user: a line for each stage with time and size; on a terminal also a bar that ticks.

Warnings that reach this package's logger meanwhile are shown in the same way.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

LOGGER = logging.getLogger("sd_export")
REFRESH = 0.5  # seconds; a trace computes for up to minutes without a word
QUIET_SPELL = 30.0  # seconds without a line, in logs


class Progress:
    """Reports to `stream` (stderr unless said otherwise); `quiet` says nothing but notes."""

    def __init__(self, stages: int = 0, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        self._stream: TextIO | None = stream if stream is not None else sys.stderr  # None where the caller closed it
        self._quiet, self._stages = quiet, stages
        self._bar: Any = None
        self._last_line = 0.0  # when the last line was printed
        self._notices = _Notices(self)

    def __enter__(self) -> Progress:
        LOGGER.addHandler(self._notices)
        if not self._quiet and self._stream is not None and self._stream.isatty():
            from tqdm import tqdm

            style = "{desc} {bar} {n_fmt}/{total_fmt} [{elapsed}]"
            self._bar = tqdm(total=self._stages, file=self._stream, bar_format=style, leave=False)
        return self

    def __exit__(self, *_: object) -> None:
        LOGGER.removeHandler(self._notices)
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def expect(self, stages: int) -> None:
        """Announce that `stages` more will follow."""
        if self._bar is not None:
            self._bar.total = self._bar.n + stages
            self._bar.refresh()

    @contextmanager
    def stage(self, what: str, output: Path | None = None) -> Iterator[None]:
        """Time the block; afterwards report it, with the size of the file `output` that it made."""
        start, self._last_line = time.perf_counter(), time.monotonic()
        with self._ticking(what):
            yield
        size = f"  {describe_size(output.stat().st_size):>8}" if output is not None else ""
        self.say(f"{what:<28}{time.perf_counter() - start:8.1f} s{size}")
        if self._bar is not None:
            self._bar.update()

    def note(self, text: str) -> None:
        """Print what the user must know, even when quiet."""
        self._write(text)

    def say(self, text: str) -> None:
        """Print what is good to know; nothing when quiet."""
        if not self._quiet:
            self._write(text)

    def detail(self, what: str, text: str) -> None:
        """Where the stage `what` is: in the bar, or without one as a line every so often, since a log that stands still
        for half an hour looks like a program that hangs."""
        if self._bar is not None:
            self._bar.set_description_str(f"{what}: {text}", refresh=False)
        elif (now := time.monotonic()) - self._last_line > QUIET_SPELL:
            self._last_line = now
            self.say(f"{what}: {text}")

    def _write(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        elif self._stream is not None:
            with suppress(OSError):  # nobody listens
                print(text, file=self._stream, flush=True)

    @contextmanager
    def _ticking(self, what: str) -> Iterator[None]:
        """Keep the bar's clock moving while the block computes."""
        if self._bar is None:
            yield
            return
        done = threading.Event()
        bar = self._bar
        bar.set_description_str(what)

        def tick() -> None:
            while not done.wait(REFRESH):
                bar.refresh()

        thread = threading.Thread(target=tick, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


class _Notices(logging.Handler):
    """Hands warnings on as notes, so that they do not run into the bar."""

    def __init__(self, progress: Progress) -> None:
        super().__init__(logging.WARNING)
        self._progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        self._progress.note(record.getMessage())


def describe_size(size: float) -> str:
    """Bytes for people: 732 B, 14.2 MB, 3.4 GB."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def mute_libraries() -> None:
    """Keep what diffusers, transformers and torch would say by themselves from this process, unless the environment
    wants it: before they are imported."""
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
