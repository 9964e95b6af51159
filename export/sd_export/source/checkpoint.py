"""Checkpoint: the files of a MODEL, its configs, and the digest of every file that was read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sd_runtime.bundle.manifest import Source
from sd_runtime.errors import ExportError, one_line

from .families.base import Family
from .pickles import Converted

Config = Mapping[str, Any]
NETWORKS = ("text_encoder", "unet", "vae")
SAFETY_CHECKER, FEATURE_EXTRACTOR, TAESD = "safety_checker", "feature_extractor", "taesd"


@dataclass(frozen=True)
class Checkpoint:
    """A supported checkpoint, complete on this disk, its weight files' headers checked.

    id           MODEL as the user named it
    name         of its bundle, unless the user gives another
    revision     the hub's commit; None for a checkpoint that is not from the hub
    family       the kind of checkpoint
    model_index  the JSON of model_index.json
    configs      the JSON of text_encoder, unet, vae and scheduler as in a diffusers folder, whatever the layout on
                 disk; with a safety checker also safety_checker and feature_extractor, with a fast decoder also taesd
    weights      the .safetensors files of each network: one, its shards, or one that all networks share
    tokenizer    the tokenizer's files, name → content, always with vocab.json and merges.txt
    files        each file that was read (relative, POSIX) → its SHA-256 in hex
    prefixes     network → the start of its keys, for networks whose file has CompVis' keys
    parts        network → its own source, for networks from elsewhere
    converted    keeps the files that were made of pickles, as long as it lives
    """

    id: str
    name: str
    revision: str | None
    family: Family
    model_index: Config
    configs: Mapping[str, Config]
    weights: Mapping[str, tuple[Path, ...]]
    tokenizer: Mapping[str, bytes]
    files: Mapping[str, str]
    prefixes: Mapping[str, str] = field(default_factory=dict)
    parts: Mapping[str, Source] = field(default_factory=dict)
    converted: Converted | None = field(default=None, compare=False)

    def place(self, network: str) -> str:
        """Where a network's weights lie, for people."""
        first, *more = self.weights[network]
        return f"{first} and {len(more)} more" if more else str(first)


@contextmanager
def explain_read_errors() -> Iterator[None]:
    """The operating system's refusals to read a file or a folder, as ExportErrors that name it."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise
        what = f"{one_line(error.filename, 400)} cannot be read ({error.strerror})"
        raise ExportError(what, remedy="check its permissions, and that it is on a disk that works") from error


def dangling(path: Path) -> str | None:
    """What a link is that leads nowhere, as in a hub's cache whose blobs were removed; None: it is none."""
    if path.is_symlink() and not path.exists():
        return f"{one_line(str(path), 400)} is a link to '{one_line(str(path.readlink()), 400)}', which is not there"
    return None


def hash_files(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Relative name → SHA-256 (hex) of each file, hashed in threads: hashlib releases the interpreter lock."""
    names = sorted(names)
    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(lambda name: _sha256(folder / name), names), strict=True))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
