"""The packaged checkpoint is small, complete, loads in diffusers without a warning, and its recipe still runs."""

from __future__ import annotations

import json
import logging
import os
import struct
import subprocess
import sys
from pathlib import Path

import demo_data
import demo_tokenizer
import numpy as np
import pytest

REPOSITORY = Path(__file__).parents[2]
CHECKPOINT = REPOSITORY / "export/sd_export/demo_checkpoint"
LAYOUT = {
    "README.md",
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
}


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def safetensors_dtypes(path: Path) -> set[str]:
    """The dtypes in a file's header: 8 bytes of length, then JSON."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    return {entry["dtype"] for name, entry in header.items() if name != "__metadata__"}


def test_layout_and_size() -> None:
    assert files(CHECKPOINT) == LAYOUT
    assert sum((CHECKPOINT / name).stat().st_size for name in LAYOUT) <= 10_000_000


@pytest.mark.parametrize("name", sorted(name for name in LAYOUT if name.endswith(".safetensors")))
def test_weights_are_half_precision(name: str) -> None:
    assert safetensors_dtypes(CHECKPOINT / name) == {"F16"}


def test_architecture_is_complete() -> None:
    unet = json.loads((CHECKPOINT / "unet/config.json").read_text())
    assert set(unet["down_block_types"]) == {"CrossAttnDownBlock2D", "DownBlock2D"}
    assert set(unet["up_block_types"]) == {"CrossAttnUpBlock2D", "UpBlock2D"}
    vae = json.loads((CHECKPOINT / "vae/config.json").read_text())
    assert 2 ** (len(vae["block_out_channels"]) - 1) == 8
    index = json.loads((CHECKPOINT / "model_index.json").read_text())
    assert index["_defaults"] == {"num_inference_steps": 25, "guidance_scale": 2.5, "height": 128, "width": 128}


def test_draws_in_diffusers(caplog: pytest.LogCaptureFixture) -> None:
    """Our key `_defaults` does not disturb diffusers, and the picture has the colours of its prompt."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    diffusers.utils.logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        pipeline = diffusers.StableDiffusionPipeline.from_pretrained(CHECKPOINT, dtype=torch.float32)
    diffusers.utils.logging.disable_propagation()
    assert "defaults" not in caplog.text
    pipeline.set_progress_bar_config(disable=True)
    result = pipeline(
        "a large white circle on a blue background",
        num_inference_steps=25,
        guidance_scale=2.5,
        generator=torch.Generator().manual_seed(1),
    )
    pixels = np.asarray(result.images[0]).astype(int)
    assert pixels.shape == (128, 128, 3)
    assert (abs(pixels[:8, :8] - (45, 90, 220)) < 50).all()
    assert (abs(pixels[60:68, 60:68] - 245) < 50).all()


def test_recipe_runs(tmp_path: Path) -> None:
    """A few steps of scripts/train_demo.py make a checkpoint of the same layout and architecture."""
    pytest.importorskip("diffusers")
    out = tmp_path / "checkpoint"
    command = [sys.executable, REPOSITORY / "scripts/train_demo.py", out, "--threads", "1"]
    small = ["--pictures", "32", "--vae-steps", "2", "--unet-steps", "2", "--place-steps", "2"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    run = subprocess.run([*command, *small], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert files(out) == LAYOUT - {"README.md"}
    for part in ("unet", "scheduler"):
        (config,) = (CHECKPOINT / part).glob("*config.json")
        assert json.loads((out / part / config.name).read_text()) == json.loads(config.read_text())


def test_recipe_draws_what_training_saw(tmp_path: Path) -> None:
    """The tokenizer trained on the recipe's captions is the packaged one, so the captions are those of the training."""
    captions = [scene.caption for scene in demo_data.training_scenes()]
    demo_tokenizer.save_tokenizer(tmp_path, *demo_tokenizer.train_tokenizer(captions, 200))
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / name).read_bytes() == (CHECKPOINT / "tokenizer" / name).read_bytes()
    assert len(demo_data.held_out()) >= 100
