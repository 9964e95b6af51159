"""Reads .safetensors files: tensors by name, memory-mapped, with every bound of the header checked first.

    8 bytes   length of the header, little-endian
    header    JSON: name → {"dtype", "shape", "data_offsets": [begin, end]}, perhaps "__metadata__"
    data      the tensors, without gaps

Format: github.com/huggingface/safetensors.  Reading runs no code of the file's.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BundleError
from ..tensor import Array
from . import digests
from .schema import from_json, parse_json

MAX_HEADER = 32 << 20  # bytes; the format allows 100 MB, a whole SDXL checkpoint takes 0.4
MAX_TENSORS = 100_000
BFLOAT16 = "BF16"  # the upper half of a float32; numpy has no such type
DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", BFLOAT16: "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?",
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies in the data, and what its bytes are."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, ...]


class SafeTensors(Mapping[str, Array]):
    """Tensors by name, each a read-only view of the file; bfloat16 comes as a float32 copy."""

    def __init__(self, entries: Mapping[str, Entry], data: Array, check: Callable[[], object] | None = None) -> None:
        """`check`: called before the file is looked into; raises if that may no longer be."""
        self._entries, self._data, self._check = entries, data, check

    def __getitem__(self, name: str) -> Array:
        entry = self._entries[name]
        if self._check is not None:
            self._check()
        begin, end = entry.data_offsets
        stored: Array = self._data[begin:end].view(DTYPES[entry.dtype]).reshape(entry.shape)
        return widen(stored) if entry.dtype == BFLOAT16 else stored

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def open_safetensors(path: Path) -> SafeTensors:
    """Map a file.  BundleError: it cannot be read, is cut short, or its header contradicts itself."""
    try:
        file = digests.open_regular(path)
        size = os.fstat(file.number).st_size
        data = np.frombuffer(mmap.mmap(file.number, size, access=mmap.ACCESS_READ) if size else b"", np.uint8)
        return read_safetensors(path.name, data)
    except OSError as error:
        raise BundleError(f"{path}: {error.strerror}") from error


def read_safetensors(name: str, data: Array, check: Callable[[], object] | None = None) -> SafeTensors:
    """The tensors in a file's bytes, a uint8 array; `check` as in `SafeTensors`."""
    length = int.from_bytes(data[:8].tobytes(), "little")
    most = min(max(len(data) - 8, 0), MAX_HEADER)
    if len(data) < 8 or length > most:
        raise BundleError(f"{name}: header", got=f"{length} bytes", accepted=f"at most {most}")
    header = parse_json(data[8 : 8 + length].tobytes(), name, limit=MAX_HEADER)
    return SafeTensors(check_header(header, len(data) - 8 - length, name), data[8 + length :], check)


def check_header(header: Any, size: int, what: str) -> dict[str, Entry]:
    """The header's entries in file order.  BundleError unless they fill `size` bytes of data without gap or overlap."""
    if not isinstance(header, dict):
        raise BundleError(f"{what}: header", got=type(header).__name__, accepted="a JSON object")
    if len(header) > MAX_TENSORS:
        raise BundleError(f"{what}: tensors", got=len(header), accepted=f"at most {MAX_TENSORS}")
    entries = {
        name: from_json(Entry, entry, f"{what}: {name}") for name, entry in header.items() if name != "__metadata__"
    }
    position = 0
    for name in sorted(entries, key=lambda name: entries[name].data_offsets):
        entry = entries[name]
        if entry.dtype not in DTYPES:
            raise BundleError(f"{what}: {name}: dtype", got=entry.dtype, accepted=", ".join(DTYPES))
        if any(axis < 0 for axis in entry.shape):
            raise BundleError(f"{what}: {name}: shape", got=entry.shape, accepted="axes from 0")
        end = position + math.prod(entry.shape) * np.dtype(DTYPES[entry.dtype]).itemsize
        if entry.data_offsets != (position, end):
            raise BundleError(f"{what}: {name}: data_offsets", got=entry.data_offsets, accepted=str((position, end)))
        position = end
    if position != size:
        raise BundleError(f"{what}: tensors", got=f"{position} bytes", accepted=f"the {size} that the file holds")
    return entries


def widen(bits: Array) -> Array:
    """bfloat16, as uint16 holds its bits → float32, exactly."""
    widened: Array = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return widened
