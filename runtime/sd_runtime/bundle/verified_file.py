"""A file of a bundle that others map: opened once, hashed through its descriptor, and watched while it is in use.

A library opens a file by its name, and sees in its mapping whatever is written into the file later.  So two questions
are asked again, each a call of the system: whether the name led to the file that was hashed, and whether that file is
as it was, by its size and the times of its last change.  Where those differ, it is hashed again.

What cannot be had is a mapping that nobody else can change.  A file that is cut short while a network runs ends the
process (SIGBUS), and what is written and taken back within one run is not seen; only a private copy of all weights in
memory would prevent that.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import numpy as np

from ..errors import BundleError
from ..tensor import Array
from . import digests
from .manifest import FileRecord

T = TypeVar("T")
ATTEMPTS = 5  # to load while others touch the files
_DESCRIPTORS = Path("/proc/self/fd")  # where Linux shows a process its open files and folders
_FOLDERS = os.open in os.supports_dir_fd and _DESCRIPTORS.is_dir()


class VerifiedFile:
    """An open file whose bytes are those of its record."""

    def __init__(self, path: Path, record: FileRecord, damaged: Callable[[str, str], BundleError]) -> None:
        """`damaged`: the error for what was got and what is accepted, which is raised.  OSError: it cannot be read."""
        self.path, self._record, self._damaged = path, record, damaged
        flags = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_CLOEXEC", 0)
        self._folder = digests.Descriptor(os.open(path.parent, flags)) if _FOLDERS else None
        self._file = digests.open_regular(path, self._folder)
        self._state = _state(os.fstat(self._file.number))
        self._compare()

    @property
    def size(self) -> int:
        return self._record.size

    @property
    def folder(self) -> Path:
        """Where a library finds the file under its name.  On Linux that stays the same folder whatever its name."""
        return self.path.parent if self._folder is None else _DESCRIPTORS / str(self._folder.number)

    def check(self) -> None:
        """BundleError unless the bytes are still those of the record."""
        if (state := _state(os.fstat(self._file.number))) != self._state:
            self._compare()
            self._state = state

    def was_opened(self) -> bool:
        """For whoever has let a library open the file by name: whether it was this one for certain.

        False where only its times differ, as after a new hard link or another mode, or after the name led elsewhere for
        a moment: let it be opened again.  BundleError: the name leads to another file, or the bytes have changed."""
        try:
            found = (self.folder / self.path.name).stat()
        except OSError:
            found = None
        if found is None or (found.st_dev, found.st_ino) != self._identity():
            raise self._damaged("another file by that name, while it was loaded", "the one that was verified")
        before = self._state
        self.check()
        return before == self._state == _state(found)

    def _identity(self) -> tuple[int, int]:
        now = os.fstat(self._file.number)
        return now.st_dev, now.st_ino

    def map(self) -> Array:
        """(size,) uint8: a read-only view of the file."""
        if not self.size:
            return np.zeros(0, np.uint8)
        return np.frombuffer(mmap.mmap(self._file.number, self.size, access=mmap.ACCESS_READ), np.uint8)

    def _compare(self) -> None:
        size = os.fstat(self._file.number).st_size
        if size != self.size:
            raise self._damaged(f"{size} bytes", f"{self.size}")
        compare(digests.of_file(self._file, size), self._record, self._damaged)


def open_by_name(open_files: Callable[[], T], files: Iterable[VerifiedFile]) -> T:
    """What `open_files` returns, once it is certain that a library opened these very files.  BundleError: it is not."""
    watched = list(files)
    for _ in range(ATTEMPTS):
        opened = open_files()
        if all(file.was_opened() for file in watched):
            return opened
    names = ", ".join(str(file.path) for file in watched)
    raise BundleError(f"{names}: changed again and again while loaded", remedy="try again once nobody writes there")


def compare(found: tuple[str, ...], record: FileRecord, damaged: Callable[[str, str], BundleError]) -> None:
    """BundleError, made by `damaged`, unless digests are those of the record."""
    if found != record.sha256:
        raise damaged(f"SHA-256 {''.join(found)[:16]}…", f"{''.join(record.sha256)[:16]}…")


def _state(status: os.stat_result) -> tuple[int, int, int]:
    """What differs once a file was written to, cut short, or renamed: size, times of the last changes."""
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns
