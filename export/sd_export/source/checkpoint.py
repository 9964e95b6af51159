"""Checkpoint: what a MODEL turned out to be, where its parts lie, and the digest of every file that was read."""

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

Config = Mapping[str, Any]
NETWORKS = ("text_encoder", "unet", "vae")
SAFETY_CHECKER, FEATURE_EXTRACTOR, TAESD = "safety_checker", "feature_extractor", "taesd"


@dataclass(frozen=True)
class Checkpoint:
    """A supported checkpoint, complete on this disk, its weight files' headers checked.

    `id` is MODEL as the user named it; `name` what a bundle of it is called; `revision` the hub's commit, None off the
    hub; `family` the kind of checkpoint.  `configs` holds the JSON of text_encoder, unet, vae and scheduler as in a
    diffusers folder, whatever the layout on disk; `weights` the .safetensors file of each network (one and the same in
    a single-file checkpoint); `tokenizer` the tokenizer's files, name → content, always with vocab.json and merges.txt.
    Both hold safety_checker too, and `configs` its feature_extractor, where there is one to be exported, and taesd
    where a fast decoder was added.  `prefixes` has the networks whose file has CompVis' keys, each with what they start
    with.  `files` maps each file that was read (relative, POSIX) to its SHA-256 in hex; `parts` the networks that came
    from elsewhere to their own source.
    """

    id: str
    name: str
    revision: str | None
    family: Family
    model_index: Config
    configs: Mapping[str, Config]
    weights: Mapping[str, Path]
    tokenizer: Mapping[str, bytes]
    files: Mapping[str, str]
    prefixes: Mapping[str, str] = field(default_factory=dict)
    parts: Mapping[str, Source] = field(default_factory=dict)


@contextmanager
def readable() -> Iterator[None]:
    """The operating system's refusals to read a file or a folder, as ExportErrors that name it."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise
        what = f"{one_line(error.filename, 400)} cannot be read ({error.strerror})"
        raise ExportError(what, remedy="check its permissions, and that it is on a disk that works") from error


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
