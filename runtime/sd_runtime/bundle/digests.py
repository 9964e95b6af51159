"""Files opened once, and the SHA-256 of their chunks, hashed on all cores."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

CHUNK = 64 << 20  # bytes a digest covers, so that all cores can verify one large file
BLOCK = 1 << 20  # bytes read at once
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_SEEKING = threading.Lock()


class Descriptor:
    """An open file or folder, closed with the last reference to it: an engine that still runs keeps its own."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


def open_regular(path: Path, folder: Descriptor | None = None) -> Descriptor:
    """A file opened for reading, in an open `folder` if that is given.  OSError, also for a pipe or a device."""
    inside = None if folder is None else folder.number
    descriptor = Descriptor(os.open(path if inside is None else path.name, _FLAGS, dir_fd=inside))
    if not stat.S_ISREG(os.fstat(descriptor.number).st_mode):
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    return descriptor


def read_at_most(descriptor: Descriptor, limit: int) -> bytes:
    """The bytes of a file just opened, and one more than `limit` if there are more."""
    parts, left = [], limit + 1
    while left and (part := os.read(descriptor.number, min(left, CHUNK))):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def count(size: int) -> int:
    """How many digests a file of `size` bytes has; an empty one has one."""
    return max(-(-size // CHUNK), 1)


def of_bytes(data: bytes) -> tuple[str, ...]:
    view = memoryview(data)
    return _all(partial(_of_view, view[i * CHUNK : (i + 1) * CHUNK]) for i in range(count(len(data))))


def of_file(descriptor: Descriptor, size: int) -> tuple[str, ...]:
    """Of a file's first `size` bytes; one that is shorter has other digests."""
    return _all(partial(_of_chunk, descriptor, i * CHUNK) for i in range(count(size)))


def _all(chunks: Iterable[Callable[[], str]]) -> tuple[str, ...]:
    work = list(chunks)
    if len(work) == 1:
        return (work[0](),)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return tuple(future.result() for future in [pool.submit(chunk) for chunk in work])


def _of_view(view: memoryview) -> str:
    return hashlib.sha256(view).hexdigest()


def _of_chunk(descriptor: Descriptor, start: int) -> str:
    """hashlib releases the interpreter lock."""
    digest, end = hashlib.sha256(), start + CHUNK
    while start < end and (block := _read_at(descriptor.number, min(end - start, BLOCK), start)):
        digest.update(block)
        start += len(block)
    return digest.hexdigest()


def _read_at(number: int, size: int, start: int) -> bytes:
    if hasattr(os, "pread"):
        return os.pread(number, size, start)
    with _SEEKING:  # Windows
        os.lseek(number, start, os.SEEK_SET)
        return os.read(number, size)
