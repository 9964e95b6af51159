"""Our reader of safetensors against the library's writer, and against files that lie."""

from __future__ import annotations

import json
import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from sd_runtime.bundle.safetensors_file import open_safetensors
from sd_runtime.errors import BundleError


def test_every_dtype_equals_the_library(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {
        str(dtype): torch.randn(3, 5).mul(9).to(dtype)
        for dtype in (
            torch.float64,
            torch.float32,
            torch.float16,
            torch.bfloat16,
            torch.int64,
            torch.int32,
            torch.int16,
            torch.int8,
            torch.uint8,
            torch.bool,
        )
    }
    tensors |= {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    ours = open_safetensors(tmp_path / "a.safetensors")
    assert set(ours) == set(tensors) and len(ours) == len(tensors)
    for name, tensor in tensors.items():
        expected = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
        assert ours[name].dtype == expected.dtype and ours[name].shape == expected.shape
        assert (ours[name] == expected).all()


def test_tensors_are_views_of_the_file(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4, 4)}, tmp_path / "a.safetensors")
    tensor = open_safetensors(tmp_path / "a.safetensors")["a"]
    assert not tensor.flags.owndata and not tensor.flags.writeable
    base: Any = tensor
    while isinstance(base, np.ndarray) and base.base is not None:
        base = base.base
    assert isinstance(base.obj, mmap.mmap)


def write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": F32}, b"1234567", "tensors: got 8 bytes, accepted the 7 that the file holds"),
        ({"a": F32}, b"123456789", "tensors: got 8 bytes, accepted the 9"),
        ({"a": {**F32, "shape": [3]}}, b"12345678", r"a: data_offsets: got \(0, 8\), accepted \(0, 12\)"),
        ({"a": {**F32, "shape": [-2]}}, b"12345678", "a: shape"),
        ({"a": {**F32, "shape": [2**62, 2**62]}}, b"12345678", "a: data_offsets"),
        ({"a": {**F32, "shape": [2.0]}}, b"12345678", "a.shape"),
        ({"a": {**F32, "dtype": "F8"}}, b"12345678", "a: dtype: got F8"),
        ({"a": {**F32, "data_offsets": [8, 0]}}, b"12345678", "a: data_offsets"),
        ({"a": {**F32, "data_offsets": [-8, 0]}}, b"12345678", "a: data_offsets"),
        ({"a": {**F32, "data_offsets": [0]}}, b"12345678", "a: data_offsets"),
        ({"a": F32, "b": F32}, b"12345678", "b: data_offsets"),
        ({"a": F32, "b": {**F32, "data_offsets": [9, 17]}}, b"1" * 17, "b: data_offsets"),
        ({"a": {"dtype": "F32"}}, b"", "a: missing"),
        ({"a": 3}, b"", "a: got 3"),
        ([], b"", "header: got list"),
        (b"{", b"", "not valid JSON"),
        (b'{"a": 1, "a": 2}', b"", "duplicate key"),
        (b"[" * 100_000, b"", "not valid JSON"),
    ],
)
def test_fault_12_headers_that_lie(tmp_path: Path, header: Any, data: bytes, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        open_safetensors(write(tmp_path / "x.safetensors", header, data))


@pytest.mark.parametrize("length", [2**64 - 1, 2**40, 100])
def test_header_longer_than_the_file(tmp_path: Path, length: int) -> None:
    with pytest.raises(BundleError, match=rf"header: got {length} bytes, accepted at most 2$"):
        open_safetensors(write(tmp_path / "x.safetensors", b"{}", length=length))


@pytest.mark.parametrize("content", [b"", b"1234567"])
def test_file_without_header(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(BundleError, match="header"):
        open_safetensors(tmp_path / "x.safetensors")


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="No such file"):
        open_safetensors(tmp_path / "x.safetensors")


@settings(derandomize=True)
@given(st.binary(max_size=200), st.integers(0, 200))
def test_fault_12_random_bytes_only_raise_bundle_error(
    tmp_path_factory: pytest.TempPathFactory, body: bytes, length: int
) -> None:
    path = write(tmp_path_factory.getbasetemp() / "random.safetensors", body, length=length)
    try:
        tensors = open_safetensors(path)
    except BundleError:
        return
    assert all(tensors[name].nbytes <= len(body) for name in tensors)
