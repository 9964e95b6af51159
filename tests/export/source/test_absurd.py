"""Checkpoints that would take all memory, found by their sizes and numbers before anything is read or built."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from sd_export.source import resolve_checkpoint, with_vae
from sd_runtime.errors import ExportError


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("part", "fields"),
    [
        ("text_encoder", {"num_hidden_layers": 10**9}),
        ("text_encoder", {"hidden_size": 10**12}),
        ("text_encoder", {"vocab_size": 10**15}),
        ("unet", {"layers_per_block": 10**6}),
        ("unet", {"block_out_channels": [32] * 10**4}),
        ("unet", {"transformer_layers_per_block": [[1, 2], [10**7]]}),
        ("unet", {"cross_attention_dim": float("1e300")}),
        ("vae", {"latent_channels": 10**10}),
        ("vae", {"block_out_channels": [10**9, 1, 1, 1]}),
    ],
)
def test_fault_46_networks_of_absurd_sizes(folder: Path, part: str, fields: dict[str, Any]) -> None:
    edit(folder / part / "config.json", **fields)
    with pytest.raises(ExportError, match=rf"{part}/config\.json: {next(iter(fields))}: got .*, accepted at most"):
        resolve_checkpoint(str(folder))


def test_fault_46_a_vae_from_elsewhere(tiny, folder: Path) -> None:
    edit(folder / "vae/config.json", layers_per_block=10**6)
    with pytest.raises(ExportError, match="layers_per_block"):
        with_vae(resolve_checkpoint(str(tiny.folder)), str(folder))


@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model.safetensors", "unet/config.json"])
def test_fault_45_giants_in_a_folder(folder: Path, name: str) -> None:
    os.truncate(folder / name, 100 << 30)  # sparse
    with pytest.raises(ExportError, match="is too large"):
        resolve_checkpoint(str(folder))


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_fault_45_a_giant_of_one_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    path.touch()
    os.truncate(path, 100 << 30)
    with pytest.raises(ExportError, match="is too large"):
        resolve_checkpoint(str(path), allow_pickle=True)
