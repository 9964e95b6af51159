"""Weights in several files, with an index that says which tensor is where."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sd_export.networks.unet import load_unet
from sd_export.source import resolve_checkpoint
from sd_runtime.errors import ExportError


@pytest.fixture
def sharded(tiny, folder: Path) -> Path:
    """The tiny checkpoint with its UNet saved by diffusers itself in shards of at most 1 MB."""
    for path in (folder / "unet").glob("*.safetensors"):
        path.unlink()
    tiny.unet.save_pretrained(folder / "unet", max_shard_size="1MB")
    assert len(list((folder / "unet").glob("*-of-*.safetensors"))) > 1
    return folder


def index(folder: Path) -> Path:
    return folder / "unet/diffusion_pytorch_model.safetensors.index.json"


def test_shards_are_one_network(tiny, sharded) -> None:
    checkpoint = resolve_checkpoint(str(sharded))
    loaded = load_unet(checkpoint).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tiny.unet.state_dict().items())
    shards = {f"unet/{path.name}" for path in checkpoint.weights["unet"]}
    assert len(shards) > 1 and shards <= set(checkpoint.files)


def test_one_file_is_preferred(tiny, sharded) -> None:
    tiny.unet.save_pretrained(sharded / "whole")
    (sharded / "whole/diffusion_pytorch_model.safetensors").rename(sharded / "unet/diffusion_pytorch_model.safetensors")
    assert len(resolve_checkpoint(str(sharded)).weights["unet"]) == 1


def changed(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads(index(folder).read_text())
        change(content)
        index(folder).write_text(json.dumps(content))

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (changed(lambda c: c.pop("weight_map")), "weight_map: got NoneType, accepted an object of file names"),
        (changed(lambda c: c.update(weight_map={"a": 3})), "weight_map"),
        (
            changed(lambda c: c["weight_map"].update(a="../secret.safetensors")),
            "accepted a .safetensors file beside it",
        ),
        (changed(lambda c: c["weight_map"].update(a="shard.bin")), "accepted a .safetensors file beside it"),
        (changed(lambda c: c["weight_map"].update(a="gone.safetensors")), "names shards that are missing"),
        (changed(lambda c: c["weight_map"].update({str(n): f"{n}.safetensors" for n in range(99)})), "at most 64"),
        (lambda folder: index(folder).write_text("{"), "index.json"),
        (lambda folder: index(folder).write_text("[]"), "a JSON object"),
    ],
)
def test_an_index_that_cannot_be_is_named(sharded, damage, message) -> None:
    damage(sharded)
    with pytest.raises(ExportError, match=message):
        resolve_checkpoint(str(sharded))


def test_a_tensor_that_no_shard_holds_is_named(sharded) -> None:
    shard = max((sharded / "unet").glob("*-of-*.safetensors"))
    state = load_file(shard)
    gone = state.popitem()[0]
    save_file(state, shard)
    with pytest.raises(ExportError, match=rf"missing {gone}"):
        load_unet(resolve_checkpoint(str(sharded)))
