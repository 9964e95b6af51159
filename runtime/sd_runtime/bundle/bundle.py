"""A bundle on disk: found by name or path, its manifest read, every file's size and digest verified.

A bundle is executable content, like a program: run only what you trust.  What is verified here is that its bytes are
the ones the export wrote: small files are read once and the very bytes that were hashed are handed on; weights stay
memory-mapped, so their digest holds for the moment of opening.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shlex
import stat
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..errors import BundleError, one_line
from .locations import bundle_home
from .manifest import CHUNK, MANIFEST, Component, Manifest, hash_chunk

EXPORT_HINT = "make one with: sd-export --model demo"
_ABSENT: Final = (errno.ENOENT, errno.ENOTDIR)
_NO_NAME: Final = (*_ABSENT, errno.ENAMETOOLONG, errno.ELOOP)


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: every file that the manifest lists is there, is a regular file, and has the declared size."""

    root: Path
    manifest: Manifest

    @classmethod
    def open(cls, root: Path) -> Bundle:
        """Read the manifest in `root`, check the file list.  BundleError names all files that are missing or wrong."""
        try:
            text = (root / MANIFEST).read_bytes()
        except FileNotFoundError as error:
            accepted = f"a folder with {MANIFEST}"
            raise BundleError("no bundle here", got=str(root), accepted=accepted, remedy=EXPORT_HINT) from error
        except OSError as error:
            raise _unreadable(root / MANIFEST, error) from error
        try:
            manifest = Manifest.from_bytes(text)
        except BundleError as error:
            again = f"sd-export --model … --output {_quoted(root)}"  # which takes the place of readable bundles only
            remedy = error.remedy or f"if this is a bundle, remove it and export it again: {again}"
            what = f"bundle {root}: {error.what}"
            raise BundleError(what, got=error.got, accepted=error.accepted, remedy=remedy) from error
        bundle = cls(root, manifest)
        bundle._check_sizes()
        return bundle

    def _check_sizes(self) -> None:
        missing, wrong = [], []
        for name, record in self.manifest.files.items():
            path = self.path(name)
            with _readable(path):
                status = _status(path)
            if status is None or not stat.S_ISREG(status.st_mode):
                missing.append(name)
            elif status.st_size != record.size:
                wrong.append(f"{name} ({status.st_size} bytes, declared {record.size})")
        if missing or wrong:
            problem = f"missing {', '.join(missing)}" if missing else f"truncated or changed: {', '.join(wrong)}"
            raise BundleError(f"bundle {self.root}: {problem}", remedy=self.export_again)

    @property
    def export_again(self) -> str:
        return self._export("export it again")

    def _export(self, what: str) -> str:
        """The manifest has only the name of what the bundle was made from, not the place."""
        made_from = one_line(self.manifest.source.id)
        return f"{what}, from {made_from}: sd-export --model … --force --output {_quoted(self.root)}"

    def component(self, name: str) -> Component:
        """BundleError says which components the bundle does have."""
        if name not in self.manifest.components:
            raise BundleError(
                f"bundle {self.root.name} has no {name}",
                got=", ".join(self.manifest.components),
                remedy=self._export("export it with this component"),
            )
        return self.manifest.components[name]

    def path(self, name: str) -> Path:
        """Where a listed file lies; BundleError if the manifest does not list it, or if it leads out of the bundle."""
        if name not in self.manifest.files:
            raise BundleError(f"bundle {self.root.name} has no file {name}", remedy=self.export_again)
        path = self.root / name
        real = Path(os.path.realpath(path))  # unlike Path.resolve, it takes links that lead in a circle
        if not real.is_relative_to(os.path.realpath(self.root)):
            raise BundleError(f"{name} in bundle {self.root} leads out of the bundle", got=str(real))
        return path

    def under(self, folder: str) -> dict[str, str]:
        """The listed files directly in `folder`: file name → path in the bundle."""
        prefix = f"{folder}/"
        names = [name for name in self.manifest.files if name.startswith(prefix)]
        return {name[len(prefix) :]: name for name in names if "/" not in name[len(prefix) :]}

    def read(self, name: str) -> bytes:
        """The bytes of a file, verified on all cores; what is returned is what was hashed."""
        path = self.path(name)
        with _readable(path):
            data = path.read_bytes()
        view, starts = memoryview(data), range(0, max(len(data), 1), CHUNK)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            digests = pool.map(lambda start: hashlib.sha256(view[start : start + CHUNK]).hexdigest(), starts)
            self._compare(name, tuple(digests))
        return data

    def verify(self, names: Iterable[str]) -> None:
        """Hash large files on all cores, chunk by chunk; BundleError names the first that differs."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            work = {n: range(0, max(self.manifest.files[n].size, 1), CHUNK) for n in names}
            found = {n: [pool.submit(hash_chunk, self.path(n), start) for start in w] for n, w in work.items()}
            for name, futures in found.items():
                with _readable(self.root / name):
                    digests = tuple(f.result() for f in futures)
                self._compare(name, digests)

    def _compare(self, name: str, digests: tuple[str, ...]) -> None:
        expected = self.manifest.files[name].sha256
        if digests != expected:
            raise BundleError(
                f"{name} in bundle {self.root} is damaged: its SHA-256",
                got="".join(digests)[:16] + "…",
                accepted="".join(expected)[:16] + "…",
                remedy=self.export_again,
            )


def find_bundle(name: str | None) -> Path:
    """A bundle's folder from a path or the name of an exported model; `None` means the only one there is.

    BundleError lists the names that exist."""
    if name is not None and _is_bundle(Path(name)):
        return Path(name)
    home = bundle_home()
    with _readable(home):
        known = sorted(p.parent.name for p in home.glob(f"*/{MANIFEST}") if not p.parent.name.startswith("."))
    if name is None:
        if len(known) == 1:
            return home / known[0]
        if not known:
            raise BundleError(f"no model has been exported to {home} yet", remedy=EXPORT_HINT)
        raise BundleError("several models are exported", got=", ".join(known), remedy="name one of them as `bundle`")
    simple = name.rstrip("/").rsplit("/", 1)[-1]  # the hub's "owner/name" exports to "name"
    if simple in known:
        return home / simple
    exported = f"exported: {', '.join(known)}, or a bundle's folder" if known else "a bundle's folder"
    raise BundleError("unknown model", got=name, accepted=exported, remedy=f"sd-export --model {one_line(name)}")


def _is_bundle(folder: Path) -> bool:
    """False for what cannot be a folder's name, too; BundleError for a folder that may not be read."""
    with _readable(folder):
        status = _status(folder / MANIFEST, _NO_NAME)
    return status is not None and stat.S_ISREG(status.st_mode)


def _status(path: Path, absent: tuple[int, ...] = _ABSENT) -> os.stat_result | None:
    """None where there is no such file: the system's error is one of `absent`."""
    try:
        return path.stat()
    except ValueError:  # NUL or a lone surrogate, which no file's name holds
        return None
    except OSError as error:
        if error.errno in absent:
            return None
        raise


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """The system's errors as ours."""
    try:
        yield
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> BundleError:
    refused = error.errno in (errno.EACCES, errno.EPERM)
    remedy = "allow yourself to read it (chmod, chown)" if refused else "check that name and its disk"
    return BundleError(f"cannot read {path}", got=error.strerror or type(error).__name__, remedy=remedy)


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
