"""Reads an .onnx far enough to know which files it names, before any library sees a byte of it.

A tensor of a graph may lie outside ("external data"): the library then opens the file that the graph names, and not
every version keeps that inside the folder.  Here the one file that a graph may name is its component's weights, and
only an initializer may name it.  What is read is protobuf's wire format (protobuf.dev/programming-guides/encoding) with
the field numbers of onnx.proto; what does not follow it is refused rather than guessed at.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from ..errors import BundleError, one_line

MAX_GRAPH = 32 << 20  # bytes; a UNet's graph takes half a megabyte
MAX_DEPTH = 8  # graphs within graphs, as the bodies of If and Loop
EXTERNAL = 1  # TensorProto.DataLocation
LOCATION = b"location"  # the key that names the file, in whatever tensor: without it none is opened
ORT_FORMAT = b"ORTM"  # at byte 4: ONNX Runtime's own format, which it would read as such, whatever else the bytes are

# Where tensors may be: message → field → message.  Fields that are not here hold no tensor.
MESSAGES: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "initializer", 15: "sparse tensor"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse tensor", 23: "sparse tensor"},
    "sparse tensor": {1: "tensor", 2: "tensor"},
}
GRAPH_FIELD, OPERATOR_FIELD, TENSOR_NAME, EXTERNAL_DATA, DATA_LOCATION = 7, 4, 8, 13, 14
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types; the others are groups, which ONNX does not use
_NUMBER = re.compile(rb"[0-9]{1,18}")
_SHAPE_TYPE_NAME = rb"(?:\x08[\x80-\xff]{0,4}[\x00-\x7f])*\x10[\x00-\x7f]B([\x00-\x7f])(.{0,127})"
_OFFSET_LENGTH = rb"j(.)\n\x06offset\x12(.)([0-9]{1,18})j(.)\n\x06length\x12(.)([0-9]{1,18})p\x01"


@dataclass(frozen=True)
class WeightsFile:
    """The one file that a graph may name: where it lies seen from the graph's folder, and its size in bytes."""

    location: str
    size: int


def weights_file(graph: str, weights: str, size: int) -> WeightsFile:
    """The weights as a graph must name them, from both paths in the bundle.  BundleError: a path would lead upwards."""
    folder, path = PurePosixPath(graph).parent, PurePosixPath(weights)
    if not path.is_relative_to(folder):
        raise BundleError(f"weights of {graph}", got=weights, accepted=f"a file in {folder}")
    return WeightsFile(path.relative_to(folder).as_posix(), size)


def check_graph(name: str, data: bytes, weights: WeightsFile | None) -> None:
    """BundleError, naming the file `name` and the tensor, if a graph names another file than its `weights`, or a part
    beyond their end; None: it may name none.  Also if the bytes are not an ONNX model, or beyond the limits above."""
    if len(data) > MAX_GRAPH:
        raise BundleError(f"{name}: graph", got=f"{len(data)} bytes", accepted=f"at most {MAX_GRAPH}")
    reader = _Reader(name, data, weights)
    if data[4:8] == ORT_FORMAT or not any(n == GRAPH_FIELD and t == BYTES for n, t, *_ in reader.fields(0, len(data))):
        raise BundleError(f"{name} is not an ONNX model", got=f"{len(data)} bytes without a graph")
    reader.walk("model", 0, len(data), 0)


def _usual(location: bytes) -> re.Pattern[bytes] | None:
    """An initializer in the weights as exports spell it: shape, type, name, then `location`, offset and length."""
    if len(location) > 100:
        return None  # its size takes more than a byte
    where = bytes([12 + len(location)]) + b"\n\x08location\x12" + bytes([len(location)]) + location
    return re.compile(_SHAPE_TYPE_NAME + b"j" + re.escape(where) + _OFFSET_LENGTH, re.DOTALL)


class _Reader:
    def __init__(self, name: str, data: bytes, weights: WeightsFile | None) -> None:
        self._name, self._data, self._weights = name, data, weights
        self._usual = None if weights is None else _usual(weights.location.encode())

    def walk(self, kind: str, start: int, end: int, depth: int) -> None:
        """Look for tensors in a message; what cannot name a file is passed over."""
        if depth > MAX_DEPTH:
            raise BundleError(f"{self._name}: graphs within graphs", got="more", accepted=f"at most {MAX_DEPTH} deep")
        data, children = self._data, MESSAGES[kind]
        for number, wire, begin, stop in self.fields(start, end):
            if wire != BYTES:
                continue
            child = children.get(number)
            if child is not None and data.find(LOCATION, begin, stop) >= 0:
                if child == "initializer":
                    if not self._is_usual(begin, stop):
                        self._check(begin, stop)
                elif child == "tensor":
                    self._check_inside(kind, begin, stop)
                else:
                    self.walk(child, begin, stop, depth + (child == "graph"))
            elif kind == "node" and number == OPERATOR_FIELD and data[begin:stop] == b"EPContext":
                raise BundleError(f"{self._name}: operator", got="EPContext", accepted="operators that open no file")

    def _is_usual(self, start: int, end: int) -> bool:
        """Whether an initializer is spelt as exports spell it and lies in the weights: ten times as quick to see."""
        found = None if self._usual is None else self._usual.fullmatch(self._data, start, end)
        if found is None or self._weights is None:
            return False
        name, _, *numbers = found.groups()
        told, meant = [name[0]], [len(found[2])]
        for entry, size, digits in (numbers[:3], numbers[3:]):
            told += [entry[0], size[0]]
            meant += [10 + len(digits), len(digits)]
        return told == meant and int(numbers[2]) + int(numbers[5]) <= self._weights.size

    def _check(self, start: int, end: int) -> None:
        """An initializer's external data: the weights file, and a part of it."""
        tensor, told, entries = self._tensor(start, end)
        if not entries and told == 0:  # its data holds that word by chance
            return
        found = dict(entries)
        where, weights = f"{self._name}: external data of '{tensor}'", self._weights
        if told != EXTERNAL or len(found) < len(entries) or set(found) - {b"location", b"offset", b"length"}:
            got = ", ".join(one_line(key.decode(errors="replace"), 20) for key, _ in entries)
            raise BundleError(where, got=got, accepted="location, offset and length, once each, marked as external")
        location = found.get(b"location", b"").decode(errors="replace")
        if weights is None or location != weights.location:
            raise BundleError(where, got=location, accepted="no file" if weights is None else weights.location)
        offset, length = found.get(b"offset", b"0"), found.get(b"length", b"0")
        if not (_NUMBER.fullmatch(offset) and _NUMBER.fullmatch(length)):
            raise BundleError(where, got=f"offset {offset!r}, length {length!r}", accepted="numbers of bytes")
        if int(offset) + int(length) > weights.size:
            got = f"bytes {int(offset)} to {int(offset) + int(length)}"
            raise BundleError(where, got=got, accepted=f"a part of the {weights.size} of {location}")

    def _check_inside(self, kind: str, start: int, end: int) -> None:
        """A tensor in an attribute or in a sparse tensor: its data are its own."""
        tensor, told, entries = self._tensor(start, end)
        if entries or told:
            got = dict(entries).get(LOCATION, b"").decode(errors="replace")
            where = f"{self._name}: external data of '{tensor}' in a{'n' if kind[0] in 'aeiou' else ''} {kind}"
            raise BundleError(where, got=got, accepted="external data of initializers only")

    def _tensor(self, start: int, end: int) -> tuple[str, int, list[tuple[bytes, bytes]]]:
        """A TensorProto's name, where it says that its data are, and its external data: (key, value) pairs."""
        data, name, told, entries = self._data, b"", 0, []
        for number, wire, begin, stop in self.fields(start, end):
            if wire == BYTES and number == EXTERNAL_DATA:
                pair = {n: data[a:b] for n, t, a, b in self.fields(begin, stop) if t == BYTES}
                entries.append((pair.get(1, b""), pair.get(2, b"")))
            elif wire == BYTES and number == TENSOR_NAME:
                name = data[begin:stop]
            elif wire == VARINT and number == DATA_LOCATION:
                told = begin
        return one_line(name.decode(errors="replace")), told, entries

    def fields(self, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """A message's fields: number, wire type and, for bytes, where they start and end; for a varint its value."""
        data, at = self._data, start
        while at < end:
            tag = data[at]
            if tag < 0x80:
                at += 1
            else:
                tag, at = self._varint(at, end, 5)
            number, wire = tag >> 3, tag & 7
            if not number:
                raise self._error(at)
            if wire == BYTES:
                size = data[at] if at < end else 0x80
                if size < 0x80:
                    at += 1
                else:
                    size, at = self._varint(at, end, 5)
                if size > end - at:
                    raise self._error(at)
                yield number, wire, at, at + size
                at += size
            elif wire == VARINT:
                value, at = self._varint(at, end, 10)
                yield number, wire, value, at
            elif wire in (FIXED32, FIXED64):
                size = 4 if wire == FIXED32 else 8
                if size > end - at:
                    raise self._error(at)
                yield number, wire, at, at + size
                at += size
            else:
                raise self._error(at)

    def _varint(self, at: int, end: int, most: int) -> tuple[int, int]:
        """A number in 7-bit groups, the lowest first, of at most `most` bytes; and where it ends."""
        value = shift = 0
        for place in range(at, min(end, at + most)):
            byte = self._data[place]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, place + 1
            shift += 7
        raise self._error(at)

    def _error(self, at: int) -> BundleError:
        return BundleError(f"{self._name} is not an ONNX model", got=f"no field at byte {at}")
