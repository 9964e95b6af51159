"""Hostile and damaged files: bounded, one line, the file named, nothing executed."""

from __future__ import annotations

import json
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from sd_export.source import resolve_checkpoint
from sd_export.source.header import tensor_shapes
from sd_runtime.errors import ExportError

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def write_safetensors(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


class Canary:
    """Unpickling this creates the file that it was given."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".pt", ".pth"])
def test_fault_11_pickle_checkpoint(tmp_path, suffix) -> None:
    canary = tmp_path / "canary"
    path = tmp_path / f"model{suffix}"
    path.write_bytes(pickle.dumps(Canary(canary)))
    with pytest.raises(ExportError, match=r"is a pickle.*accepted \.safetensors; sd-export --model .* --allow-pickle"):
        resolve_checkpoint(str(path))
    assert not canary.exists()


def test_fault_11_pickle_in_a_folder(folder) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "unet/diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Canary(folder / "canary")))
    with pytest.raises(ExportError, match=r"unet/diffusion_pytorch_model\.bin is a pickle"):
        resolve_checkpoint(str(folder))
    assert not (folder / "canary").exists()


def test_fault_11_pickle_renamed(tmp_path) -> None:
    path = tmp_path / "model.safetensors"
    torch.save({"weight": torch.zeros(1)}, path)
    with pytest.raises(ExportError, match=r"model\.safetensors is not an intact safetensors file"):
        resolve_checkpoint(str(path))


@pytest.mark.parametrize("declared", [2**63, 2**40, 99_999_999])
def test_fault_12_header_bomb(tmp_path, declared) -> None:
    """A header of any declared length costs little memory: run with 1 GiB of address space."""
    path = tmp_path / "bomb.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", declared) + b'{"a":')
        file.truncate(200_000_000)
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
from sd_export.source import resolve_checkpoint
resolve_checkpoint({str(path)!r})
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"ExportError: {path} is not an intact safetensors file (its header would have" in out.stderr


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 7),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 9),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}, b"\0" * 16),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 16]}}, b"\0" * 16),
        ({"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]}}, b""),
        ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"\0" * 4),
        ({"a": {"dtype": "F31", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2**70]}}, b"\0" * 4),
        ({"a": {"dtype": "F32"}}, b""),
        (b"{", b""),
        (b"[" * 1000, b""),
        (b"\xff\xfe", b""),
        (b"", b""),
    ],
)
def test_impossible_headers(tmp_path, header, data) -> None:
    path = write_safetensors(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(ExportError, match=r"bad\.safetensors is not an intact safetensors file \(.*fetch it again"):
        tensor_shapes(path)


@pytest.mark.parametrize("size", [0, 5, 8, 100, 5000, -1])
def test_truncated_weights_are_named(folder, size) -> None:
    path = folder / WEIGHTS
    content = path.read_bytes()
    path.write_bytes(content[:size])
    with pytest.raises(ExportError, match=f"{WEIGHTS} is not an intact safetensors file"):
        resolve_checkpoint(str(folder))


def test_git_lfs_pointer_says_so(folder) -> None:
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")
    with pytest.raises(ExportError, match=r"is a Git LFS pointer.*git lfs pull"):
        resolve_checkpoint(str(folder))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 250), value=st.integers(0, 255))
def test_any_changed_byte_of_a_header_is_an_error_or_harmless(tmp_path, position, value) -> None:
    path = tmp_path / "flip.safetensors"
    save_file({"weight": torch.zeros(2, 3), "bias": torch.zeros(3, dtype=torch.float16)}, path)
    content = bytearray(path.read_bytes())
    content[position % len(content)] = value
    path.write_bytes(content)
    try:
        shapes = tensor_shapes(path)
    except ExportError as error:
        assert "\n" not in str(error)
    else:
        assert all(isinstance(shape, tuple) for shape in shapes.values())
