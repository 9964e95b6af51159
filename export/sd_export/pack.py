"""Publish a folder as a whole: built beside its target, synced to disk, then put in place by one rename.

Whatever interrupts an export, the target is the old bundle, the new one, or not there: never a half.  Beside a target
`demo` there may be `.demo.lock` (held while an export runs), `.demo.partial` (being built, or left by a killed export:
the next one removes it) and, for a moment on file systems that cannot swap two folders, `.demo.old`.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sd_runtime.errors import ExportError

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOT_WRITABLE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR),
    *(errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP),
)


@contextmanager
def locked(target: Path, notice: Callable[[str], None]) -> Iterator[None]:
    """Be the only export to `target` on this machine; wait for another one, after saying so through `notice`.

    The system drops the lock when its holder dies.  What a killed export left beside `target` is cleaned up."""
    from filelock import FileLock, Timeout

    path = _beside(target, "lock")
    with _explained(target, errno.ENOENT):  # which /proc says
        target.parent.mkdir(parents=True, exist_ok=True)
        _write_lock(path, b"")  # filelock would wait for a file that cannot be made as for one that is locked
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            notice(f"waiting for another export to {target} (process {_holder(path)})")
            lock.acquire()
    try:
        with suppress(OSError):
            _write_lock(path, str(os.getpid()).encode())
        with _explained(target):
            _clean(target)
        yield
    finally:
        lock.release()


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """An empty folder beside `target` to build in; when the block ends well, it replaces `target`, else it is removed.

    Call it under `locked`.  ExportError if the disk is full or the place is not writable."""
    folder = _beside(target, "partial")
    with _explained(target):
        try:
            folder.mkdir()
            yield folder
            _sync(folder)
            _publish(folder, target)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def write_synced(path: Path, data: bytes) -> None:
    """Replace a file as a whole: whatever happens, it is the old one or the new one, and the new one is on the disk."""
    new_folders = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(data)
        _fsync(partial, os.O_RDWR)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    for folder in (path.parent, *(new.parent for new in new_folders)):
        _fsync_folder(folder)


def _write_lock(path: Path, content: bytes) -> None:
    """Make the lock file, if there is none, and let it hold `content`.

    OSError for what is not a file: a link, whose target would be overwritten, or a pipe, which would be waited for."""
    flags = sum(getattr(os, name, 0) for name in ("O_RDWR", "O_CREAT", "O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC"))
    descriptor = os.open(path, flags, 0o666)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise FileExistsError(errno.EEXIST, "Not a regular file", str(path))
        if content:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, content)
    finally:
        os.close(descriptor)


def _beside(target: Path, what: str) -> Path:
    return target.parent / f".{target.name}.{what}"


def _holder(lock: Path) -> str:
    with suppress(OSError):
        return lock.read_text() or "unknown"
    return "unknown"


def _clean(target: Path) -> None:
    """Undo what a killed export left: a target set aside comes back, a partial folder goes."""
    old = _beside(target, "old")
    if old.exists() and not target.exists():
        old.rename(target)
    for rest in (old, _beside(target, "partial")):
        if rest.is_symlink() or rest.is_file():  # not ours: an export makes folders
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(rest))
        if rest.exists():
            shutil.rmtree(rest)


def _sync(folder: Path) -> None:
    """Flush every file of `folder`, then every folder, to the disk."""
    for root, _, files in os.walk(folder, topdown=False):
        for name in files:
            _fsync(Path(root, name), os.O_RDWR)
        _fsync_folder(Path(root))


def _fsync_folder(folder: Path) -> None:
    if sys.platform != "win32":  # which has no way to open a folder
        _fsync(folder, os.O_RDONLY)


def _fsync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _publish(folder: Path, target: Path) -> None:
    """Put `folder` in the place of `target`; afterwards `folder` is the old target or gone."""
    if not target.exists():
        folder.rename(target)
    elif not _swap(folder, target):
        old = _beside(target, "old")
        target.rename(old)
        try:
            folder.rename(target)
        except OSError:
            old.rename(target)
            raise
        shutil.rmtree(old)
    _fsync_folder(target.parent)


def _swap(first: Path, second: Path) -> bool:
    """Exchange two folders in one step (Linux's renameat2); False where the system or the file system cannot."""
    if sys.platform != "linux":
        return False
    import ctypes

    at_fdcwd, rename_exchange = -100, 2
    swap = getattr(ctypes.CDLL(None), "renameat2", None)  # glibc has it since 2.28
    return swap is not None and swap(at_fdcwd, os.fsencode(first), at_fdcwd, os.fsencode(second), rename_exchange) == 0


@contextmanager
def _explained(target: Path, *also: int) -> Iterator[None]:
    """The operating system's refusals to write, and the errors `also`, as ExportErrors that say what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            what = f"no space left to write {target} ({error.strerror})"
            raise ExportError(what, remedy="free some, or choose another place with --output") from error
        if error.errno in (*_NOT_WRITABLE, *also) and error.filename and _concerns(Path(error.filename), target):
            what = f"cannot write {target} ({error.strerror}: {error.filename})"
            raise ExportError(what, remedy="choose another place with --output") from error
        raise


def _concerns(path: Path, target: Path) -> bool:
    """Whether `path` lies beside or in `target`, or is a folder on the way there."""
    return path.is_relative_to(target.parent) or target.is_relative_to(path)
