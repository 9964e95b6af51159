"""A bundle on disk: found by name or path, its manifest read, every file's size and digest verified.

A bundle is executable content, like a program: run only what you trust.  What is verified here is that its bytes are
the ones the export wrote: small files are read once and the very bytes that were hashed are handed on, graphs only if
they name no file but their weights; weights stay memory-mapped, and are watched (see `verified_file`).

A file may be a link to another of the bundle, not to one outside.  A second name of a file, a hard link, is no link:
copies that back-ups make share their files so, and what counts is the bytes, whoever else can write them.
"""

from __future__ import annotations

import errno
import os
import shlex
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

from ..errors import BundleError, one_line
from . import digests
from .graph_file import MAX_GRAPH, check_graph, weights_file
from .locations import bundle_home
from .manifest import MANIFEST, MAX_FILE, MAX_MANIFEST, Component, Manifest
from .safetensors_file import SafeTensors, read_safetensors
from .verified_file import VerifiedFile, compare

MAX_READ = 64 << 20  # bytes of a file that is read whole, other than an engine
EXPORT_HINT = "make one with: sd-export --model demo"
_ABSENT: Final = (errno.ENOENT, errno.ENOTDIR)
_NO_NAME: Final = (*_ABSENT, errno.ENAMETOOLONG, errno.ELOOP)


@dataclass(frozen=True)
class GraphFiles:
    """A graph that may be handed to a library.

    name     its path in the bundle, for errors
    content  the bytes of the .onnx: verified, and naming no file but the weights
    folder   where a library finds the weights by the name that the graph has for them
    weights  verified and open; None: it has none
    """

    name: str
    content: bytes
    folder: Path
    weights: VerifiedFile | None = None


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: every file that the manifest lists is there, is a regular file, and has the declared size."""

    root: Path
    manifest: Manifest

    @classmethod
    def open(cls, root: str | Path) -> Bundle:
        """Read the manifest in `root`, check the file list.  BundleError names all files that are missing or wrong."""
        root = Path(root)
        text = _read_manifest(root)
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

    @cached_property
    def _real_root(self) -> str:
        return os.path.realpath(self.root)

    def path(self, name: str) -> Path:
        """Where a listed file lies; BundleError if the manifest does not list it, or if it leads out of the bundle."""
        if name not in self.manifest.files:
            raise BundleError(f"bundle {self.root.name} has no file {name}", remedy=self.export_again)
        return _inside(self.root, name, self._real_root)

    def under(self, folder: str) -> dict[str, str]:
        """The listed files directly in `folder`: file name → path in the bundle."""
        prefix = f"{folder}/"
        names = [name for name in self.manifest.files if name.startswith(prefix)]
        return {name[len(prefix) :]: name for name in names if "/" not in name[len(prefix) :]}

    def read(self, name: str, limit: int = MAX_READ) -> bytes:
        """The bytes of a file of at most `limit`; what is returned is what was hashed."""
        path, record = self.path(name), self.manifest.files[name]
        if record.size > limit:
            raise BundleError(f"{name} in bundle {self.root}", got=f"{record.size} bytes", accepted=f"at most {limit}")
        with _readable(path):
            data = digests.read_at_most(digests.open_regular(path), record.size)
        compare(digests.of_bytes(data), record, self._damaged(name))
        return data

    def read_engine(self, name: str) -> bytes:
        """The same of a serialized engine, which holds its network's weights."""
        return self.read(name, MAX_FILE)

    def open_file(self, name: str) -> VerifiedFile:
        """A large file, open and verified on all cores."""
        path = self.path(name)
        with _readable(path):
            return VerifiedFile(path, self.manifest.files[name], self._damaged(name))

    def verify(self, names: Iterable[str]) -> None:
        """Hash files; BundleError names the first that differs."""
        for name in names:
            self.open_file(name)

    def open_graph(self, component: str, form: str = "plain") -> GraphFiles:
        """One of a component's graphs for a library to load: the only way by which a graph leaves the bundle."""
        part = self.component(component)
        name, weights = part.graph(form).path, part.weights
        content = self.read(name, MAX_GRAPH)
        allowed = None if weights is None else weights_file(name, weights, self.manifest.files[weights].size)
        check_graph(name, content, allowed)
        file = None if weights is None else self.open_file(weights)
        return GraphFiles(name, content, self.path(name).parent if file is None else file.folder, file)

    def tensors(self, name: str) -> SafeTensors:
        """The tensors of a .safetensors, which is verified here, and again if it is changed meanwhile."""
        file = self.open_file(name)
        with _readable(file.path):
            return read_safetensors(name, file.map(), file.check)

    def _damaged(self, name: str) -> Callable[[str, str], BundleError]:
        what = f"{name} in bundle {self.root} is damaged"
        return lambda got, accepted: BundleError(what, got=got, accepted=accepted, remedy=self.export_again)


def _read_manifest(root: Path) -> bytes:
    try:
        path = _inside(root, MANIFEST, os.path.realpath(root))
        text = digests.read_at_most(digests.open_regular(path), MAX_MANIFEST)
    except OSError as error:
        if error.errno not in _ABSENT:
            raise _unreadable(root / MANIFEST, error) from error
        accepted = f"a folder with {MANIFEST}"
        raise BundleError("no bundle here", got=str(root), accepted=accepted, remedy=EXPORT_HINT) from error
    if len(text) > MAX_MANIFEST:
        raise BundleError(f"{root / MANIFEST}", got="more bytes", accepted=f"at most {MAX_MANIFEST}")
    return text


def _inside(root: Path, name: str, real_root: str) -> Path:
    path = root / name
    real = os.path.realpath(path)  # unlike Path.resolve, it takes links that lead in a circle
    if not Path(real).is_relative_to(real_root):
        remedy = "copy the file itself into the bundle, for example with: cp --dereference"
        raise BundleError(f"{name} in bundle {root} leads out of the bundle", got=real, remedy=remedy)
    return path


def find_bundle(name: str | None) -> Path:
    """A bundle's folder from a path or the name of an exported model; `None` means the only one there is.

    BundleError lists the names that exist."""
    if name is not None and _is_bundle(Path(name)):
        return Path(name)
    if name is not None and os.path.islink(name) and not os.path.exists(name):  # noqa: PTH110, PTH114 - these never raise
        leads = f"it is a link to '{one_line(os.readlink(name))}', which is not there"  # noqa: PTH115
        raise BundleError("bundle", got=name, accepted="a bundle's folder", remedy=leads)
    return find_exported(name)


def find_exported(name: str | None) -> Path:
    """The same by name only, for names that somebody else gave: no path leads out of the folder of bundles."""
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
