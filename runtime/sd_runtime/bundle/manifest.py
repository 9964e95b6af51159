"""manifest.json: what a bundle is, where it came from, and the digest of every file in it.

Frozen dataclasses; the type hints are the schema (see `schema`).  No times and no machine's paths are stored, so the
same checkpoint exports to the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal

from ..errors import BundleError
from ..request import Defaults
from ..tensor import TensorSpec
from . import digests
from .schema import from_json, parse_json, to_json

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
MAX_MANIFEST = 4 << 20  # bytes; a bundle with forty engines takes 200 000
MAX_FILES = 4096  # a bundle with forty engines has a hundred
MAX_FILE = 32 << 30  # bytes; Stable Diffusion's UNet takes 3.5e9 in float32

Precision = Literal["fp32", "fp16"]
EnginePrecision = Literal["fp32", "fp16", "bf16"]  # a bfloat16 engine is built from float32 weights
EngineLibrary = Literal["tensorrt", "tensorrt_rtx"]  # by the name of its module


@dataclass(frozen=True)
class FileRecord:
    """One file of the bundle: its size in bytes and the SHA-256 of each chunk of `digests.CHUNK` bytes, in hex."""

    size: int
    sha256: tuple[str, ...]

    @property
    def digest(self) -> str:
        """One SHA-256 (hex) that stands for the whole file: its own, or that of its chunks' digests."""
        if len(self.sha256) == 1:
            return self.sha256[0]
        return hashlib.sha256("".join(self.sha256).encode()).hexdigest()


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
    """One exported network: its weights file (None where it needs none) and its graphs by form, which share the
    weights; "plain" is always there."""

    weights: str | None
    graphs: dict[str, Graph]

    def graph(self, form: str = "plain") -> Graph:
        if form not in self.graphs:
            raise BundleError("graph form", got=form, accepted=", ".join(self.graphs))
        return self.graphs[form]


@dataclass(frozen=True)
class ShapeRange:
    """The shapes of one tensor that an engine takes: the smallest, the one that it was tuned for, the largest."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]

    def __post_init__(self) -> None:
        in_order = all(
            1 <= low <= tuned <= high for low, tuned, high in zip(self.min, self.opt, self.max, strict=False)
        )
        if not in_order or not len(self.min) == len(self.opt) == len(self.max):
            raise BundleError("shape range", got=(self.min, self.opt, self.max), accepted="1 ≤ min ≤ opt ≤ max")

    def accepts(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == len(self.min) and all(
            low <= size <= high for low, size, high in zip(self.min, shape, self.max, strict=True)
        )


@dataclass(frozen=True)
class Target:
    """What a TensorRT engine was built for.  One of TensorRT runs on the GPU model that it was built on, and on nothing
    else; one of TensorRT for RTX is built without a GPU, and runs on those with a compute capability that it serves.

    gpu                 as the driver names it: "NVIDIA H200"; "" without one
    compute_capability  "9.0": of the GPU, or the oldest that an engine of TensorRT for RTX serves
    tensorrt            the library's version: "10.13.3.9"
    cuda, driver        the CUDA version that the driver offers, "13.0", and the driver's own, "580.65.06"; or ""
    library             that built it, and that runs it
    serves              every compute capability that an engine of TensorRT for RTX runs on
    """

    gpu: str
    compute_capability: str
    tensorrt: str
    cuda: str
    driver: str
    library: EngineLibrary = "tensorrt"
    serves: tuple[str, ...] = ()


@dataclass(frozen=True)
class EngineRecord:
    """One TensorRT engine: a graph of a component, built for a target and a range of shapes.

    path               the serialized engine: engines/<target>/….plan
    profile            for every input with a shape that varies, the shapes that the engine takes
    graph, weights     `FileRecord.digest` of the files that it was built from
    refittable         its weights can be exchanged without building again
    activation_memory  bytes of device memory that a run takes beside the weights, at the largest shapes
    checked            how far: "structure", by what its builder says of its layers, without a GPU; "run" on one, and
                       "compared" there with ONNX Runtime; None: built by version 0.1.0, which ran what it built
    """

    component: str
    form: str
    path: str
    precision: EnginePrecision
    profile: dict[str, ShapeRange]
    target: Target
    graph: str
    weights: str | None
    refittable: bool
    activation_memory: int
    checked: Literal["structure", "run", "compared"] | None = None

    def accepts(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether the engine takes inputs of these shapes; those that the profile does not name are fixed."""
        return all(allowed.accepts(shapes[name]) for name, allowed in self.profile.items())


@dataclass(frozen=True)
class Latent:
    """The latent space: channels (1 … 64), pixels per latent cell (1 … 64), and z = scaling_factor · (encoder output),
    a factor of 0.001 … 1000.  BundleError otherwise.

    preview: a matrix that guesses colours from latents, as `preview` reads it; None: Stable Diffusion 1's will do."""

    channels: int
    pixels: int
    scaling_factor: float
    preview: tuple[tuple[float, ...], ...] | None = None

    def __post_init__(self) -> None:
        _check_range("latent.channels", self.channels, 1, 64)
        _check_range("latent.pixels", self.pixels, 1, 64)
        _check_range("latent.scaling_factor", self.scaling_factor, 1e-3, 1e3)
        if self.preview is not None and len({len(row) for row in self.preview}) != 1:
            raise BundleError("latent.preview", got=self.preview, accepted="rows of one length")


@dataclass(frozen=True)
class Check:
    """A comparison with the checkpoint that the export made and that kept its limit: of which component's output,
    `name` telling its calls apart, and the `limit` of a `measure`."""

    component: str
    name: str
    measure: Literal["relative", "max_abs", "psnr"]
    limit: float


@dataclass(frozen=True)
class Verification:
    """Whether the export compared the bundle with its checkpoint before it published, and what was within which limit.

    What was measured is not here: its last digits depend on the machine.  `sd-verify` measures it again."""

    skipped: bool
    checks: tuple[Check, ...] = ()


@dataclass(frozen=True)
class Manifest:
    name: str
    source: Source
    precision: Precision
    latent: Latent
    defaults: Defaults
    components: dict[str, Component]
    files: dict[str, FileRecord]
    parts: dict[str, Source] = field(default_factory=dict)  # networks from elsewhere: "vae", "taesd"
    exporter: dict[str, str] = field(default_factory=dict)  # library versions that made the graphs
    verification: Verification | None = None  # None: made before exports compared
    engines: tuple[EngineRecord, ...] = ()
    schema_version: int = SCHEMA_VERSION

    @property
    def model_hash(self) -> str:
        """Ten digits that name the weights: of the checkpoint's SHA-256 where it was one file, as AUTOMATIC1111 has
        them, else of the exported UNet's."""
        if len(self.source.files) == 1:
            return next(iter(self.source.files.values()))[:10]
        weights = self.components["unet"].weights
        return "".join(self.files[weights].sha256)[:10] if weights is not None else ""

    def to_bytes(self) -> bytes:
        return (json.dumps(to_json(self), indent=1, ensure_ascii=False) + "\n").encode()

    @classmethod
    def from_bytes(cls, text: bytes) -> Manifest:
        """Parse and check that every file a component or an engine needs is listed.  BundleError names the
        field's path, and a newer schema says so."""
        value = parse_json(text, MANIFEST, MAX_MANIFEST)
        if b"\\ud" in text.lower():
            _check_unicode(value)
        version = value.get("schema_version") if isinstance(value, dict) else None
        if version != SCHEMA_VERSION:
            newer = isinstance(version, int) and version > SCHEMA_VERSION
            remedy = "the bundle is newer than this program: pip install --upgrade sd-lean" if newer else None
            raise BundleError(f"{MANIFEST}: schema_version", got=version, accepted=str(SCHEMA_VERSION), remedy=remedy)
        manifest = from_json(cls, value, MANIFEST)
        _check_range("number of files", len(manifest.files), 0, MAX_FILES)
        for path, record in manifest.files.items():
            check_relative(path)
            _check_range(f"files.{path}.size", record.size, 0, MAX_FILE)
            if len(record.sha256) != digests.count(record.size):
                accepted = f"{digests.count(record.size)} digests for {record.size} bytes"
                raise BundleError(f"{MANIFEST}: files.{path}.sha256", got=len(record.sha256), accepted=accepted)
        for engine in manifest.engines:
            if engine.component not in manifest.components:
                known = ", ".join(manifest.components)
                raise BundleError(
                    f"{MANIFEST}: component of the engine {engine.path}", got=engine.component, accepted=known
                )
        for user, path in manifest._needed():
            if path not in manifest.files:
                raise BundleError(f"{MANIFEST}: file of {user}", got=path, accepted="one that `files` lists")
        return manifest

    def engines_of(self, library: EngineLibrary) -> tuple[EngineRecord, ...]:
        return tuple(record for record in self.engines if record.target.library == library)

    def _needed(self) -> Iterator[tuple[str, str]]:
        """(who needs it, a file's path in the bundle)"""
        for name, component in self.components.items():
            if component.weights is not None:
                yield name, component.weights
            for graph in component.graphs.values():
                yield name, graph.path
        for engine in self.engines:
            yield f"the {engine.component} engine", engine.path


def _check_unicode(value: object) -> None:
    """BundleError for the halves of characters that JSON can spell, and no file and no terminal takes."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise BundleError(f"{MANIFEST}: text", got=error.object[error.start], accepted="Unicode") from error


def _check_range(what: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise BundleError(f"{MANIFEST}: {what}", got=value, accepted=f"{low:.12g} … {high:.12g}")


def check_relative(path: str) -> str:
    """`path` if it stays inside the bundle: relative, POSIX, printable, no `..`, no backslash.  BundleError if not."""
    pure = PurePosixPath(path)
    if (
        not path.isprintable()
        or not pure.name
        or pure.is_absolute()
        or ".." in pure.parts
        or "\\" in path
        or ":" in path
    ):
        raise BundleError("path in manifest", got=path, accepted="relative paths inside the bundle")
    return path


def record_file(path: Path) -> FileRecord:
    """Size and chunk digests of a file on disk."""
    descriptor = digests.open_regular(path)
    size = os.fstat(descriptor.number).st_size
    return FileRecord(size, digests.of_file(descriptor, size))
