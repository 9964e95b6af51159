"""A bundle on disk: found by name or path, its manifest read, every file's size and digest verified.

A bundle is executable content, like a program: run only what you trust.  What is verified here is that its bytes are
the ones the export wrote: small files are read once and the very bytes that were hashed are handed on; weights stay
memory-mapped, so their digest holds for the moment of opening.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from .errors import BundleError
from .locations import bundle_home
from .manifest import CHUNK, MANIFEST, Component, Manifest, hash_chunk

EXPORT_HINT = "make one with: sd-export --model demo"


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: every file that the manifest lists is there, is a regular file, and has the declared size."""

    root: Path
    manifest: Manifest

    @classmethod
    def open(cls, root: Path) -> Bundle:
        """Read the manifest in `root`, check the file list.  BundleError names all files that are missing or wrong."""
        try:
            manifest = Manifest.from_bytes((root / MANIFEST).read_bytes())
        except FileNotFoundError as error:
            raise BundleError("no bundle here", got=str(root), accepted=f"a folder with {MANIFEST}") from error
        except OSError as error:
            raise BundleError(f"cannot read {root / MANIFEST} ({error.strerror})") from error
        bundle = cls(root, manifest)
        bundle._check_sizes()
        return bundle

    def _check_sizes(self) -> None:
        missing, wrong = [], []
        for name, record in self.manifest.files.items():
            path = self.path(name)
            if not path.is_file():
                missing.append(name)
            elif path.stat().st_size != record.size:
                wrong.append(f"{name} ({path.stat().st_size} bytes, declared {record.size})")
        if missing or wrong:
            problem = f"missing {', '.join(missing)}" if missing else f"truncated or changed: {', '.join(wrong)}"
            raise BundleError(f"bundle {self.root}: {problem}", remedy=self.export_again)

    @property
    def export_again(self) -> str:
        return f"export it again: sd-export --model {self.manifest.source.id} --force"

    def component(self, name: str) -> Component:
        """BundleError says which components the bundle does have."""
        if name not in self.manifest.components:
            raise BundleError(
                f"bundle {self.root.name} has no {name}",
                got=", ".join(self.manifest.components),
                remedy=f"export it with this component: sd-export --model {self.manifest.source.id} --force",
            )
        return self.manifest.components[name]

    def path(self, name: str) -> Path:
        """Where a listed file lies; BundleError if the manifest does not list it, or if it leads out of the bundle."""
        if name not in self.manifest.files:
            raise BundleError(f"bundle {self.root.name} has no file {name}", remedy=self.export_again)
        path = self.root / name
        if not path.resolve().is_relative_to(self.root.resolve()):
            raise BundleError(f"{name} in bundle {self.root} leads out of the bundle", got=str(path.resolve()))
        return path

    def under(self, folder: str) -> dict[str, str]:
        """The listed files directly in `folder`: file name → path in the bundle."""
        prefix = f"{folder}/"
        names = [name for name in self.manifest.files if name.startswith(prefix)]
        return {name[len(prefix) :]: name for name in names if "/" not in name[len(prefix) :]}

    def read(self, name: str) -> bytes:
        """The bytes of a file, verified on all cores; what is returned is what was hashed."""
        data = self.path(name).read_bytes()
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
                self._compare(name, tuple(f.result() for f in futures))

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
    if name is not None and (Path(name) / MANIFEST).is_file():
        return Path(name)
    home = bundle_home()
    known = sorted(p.parent.name for p in home.glob(f"*/{MANIFEST}") if not p.parent.name.startswith("."))
    if name is None:
        if len(known) == 1:
            return home / known[0]
        if not known:
            raise BundleError(f"no model has been exported to {home} yet", remedy=EXPORT_HINT)
        raise BundleError("several models are exported", got=", ".join(known), remedy="choose one with --model")
    simple = name.rstrip("/").rsplit("/", 1)[-1]  # the hub's "owner/name" exports to "name"
    if simple in known:
        return home / simple
    exported = f"exported: {', '.join(known)}, or a bundle's folder" if known else "a bundle's folder"
    raise BundleError("unknown model", got=name, accepted=exported, remedy=f"sd-export --model {name}")
