"""manifest.json: what a bundle is, where it came from, and the digest of every file in it.

Frozen dataclasses; the type hints are the schema (see `schema`).  No times and no machine's paths are stored, so the
same checkpoint exports to the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal

from .errors import BundleError
from .schema import from_json, parse_json, to_json
from .tensor import TensorSpec

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
CHUNK = 64 << 20  # bytes a digest covers, so that all cores can verify one large file

ComponentName = Literal["text_encoder", "unet", "vae_decoder", "vae_encoder", "safety_checker"]
Precision = Literal["fp32", "fp16"]


@dataclass(frozen=True)
class FileRecord:
    """One file of the bundle: its size in bytes and the SHA-256 of each 64 MiB chunk, in hex."""

    size: int
    sha256: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """Where the weights came from: `id` as the user named it, the hub's commit if there was one, and the SHA-256 (hex,
    whole file) of every checkpoint file that was read."""

    id: str
    revision: str | None
    files: dict[str, str]


@dataclass(frozen=True)
class Graph:
    """One .onnx of a component (`path` in the bundle) and the tensors at its edge."""

    path: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class Component:
    """One exported network: its weights file and its graphs by form; "plain" is always there, all share the weights."""

    weights: str
    graphs: dict[str, Graph]

    def graph(self, form: str = "plain") -> Graph:
        if form not in self.graphs:
            raise BundleError(f"graph form of {self.weights}", got=form, accepted=", ".join(self.graphs))
        return self.graphs[form]


@dataclass(frozen=True)
class Latent:
    """The latent space: channels, pixels per latent cell, and z = scaling_factor · (encoder output)."""

    channels: int
    pixels: int
    scaling_factor: float


@dataclass(frozen=True)
class Defaults:
    """What the checkpoint's authors recommend when the user does not say otherwise."""

    num_inference_steps: int
    guidance_scale: float
    height: int
    width: int


@dataclass(frozen=True)
class Manifest:
    name: str
    source: Source
    precision: Precision
    latent: Latent
    defaults: Defaults
    components: dict[str, Component]
    files: dict[str, FileRecord]
    exporter: dict[str, str] = field(default_factory=dict)  # library versions that made the graphs
    schema_version: int = SCHEMA_VERSION

    def to_bytes(self) -> bytes:
        return (json.dumps(to_json(self), indent=1, ensure_ascii=False) + "\n").encode()

    @classmethod
    def from_bytes(cls, text: bytes) -> Manifest:
        """Parse and check; BundleError names the field's path, and a newer schema says so."""
        value = parse_json(text, MANIFEST)
        version = value.get("schema_version") if isinstance(value, dict) else None
        if version != SCHEMA_VERSION:
            raise BundleError(
                f"{MANIFEST}: schema_version",
                got=version,
                accepted=str(SCHEMA_VERSION),
                remedy="export the bundle again",
            )
        manifest = from_json(cls, value, MANIFEST)
        for path in manifest.files:
            check_relative(path)
        return manifest


def check_relative(path: str) -> str:
    """`path` if it stays inside the bundle: relative, POSIX, no `..`, no NUL, no backslash.  BundleError otherwise."""
    pure = PurePosixPath(path)
    if not path or pure.is_absolute() or ".." in pure.parts or "\0" in path or "\\" in path or ":" in path:
        raise BundleError("path in manifest", got=path, accepted="relative paths inside the bundle")
    return path


def record_file(path: Path) -> FileRecord:
    """Size and chunk digests of a file on disk; the chunks are hashed on all cores."""
    size = path.stat().st_size
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = pool.map(lambda offset: hash_chunk(path, offset), range(0, max(size, 1), CHUNK))
        return FileRecord(size, tuple(digests))


def hash_chunk(path: Path, offset: int) -> str:
    """SHA-256 (hex) of the chunk of `path` that starts at `offset`; hashlib releases the interpreter lock."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(offset)
        left = CHUNK
        while left and (block := file.read(min(left, 1 << 20))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()
