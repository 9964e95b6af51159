"""What version 0.1.0 left on people's disks: its bundles still open and draw, its pictures can still be repeated."""

from __future__ import annotations

import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_cuda import FakeGpu
from fake_onnxruntime import FakeOnnxRuntime
from PIL import Image
from sd_runtime import Pipeline
from sd_runtime.cli.run import main
from sd_runtime.images.metadata import read_parameters

DATA = Path(__file__).parents[1] / "data"
PICTURE = DATA / "picture-0.1.0.png"  # drawn by 0.1.0 from that bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A tiny random checkpoint, exported by 0.1.0."""
    with tarfile.open(DATA / "bundle-0.1.0.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "bundle"


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"), int)


def test_a_picture_is_repeated_from_its_metadata(bundle: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.png"
    assert main(["--from-image", str(PICTURE), "--model", str(bundle), "--output", str(again), "--quiet"]) == 0
    assert np.abs(pixels(again) - pixels(PICTURE)).max() <= 1
    said, then = read_parameters(again), read_parameters(PICTURE)
    assert (said.prompt, said.negative_prompt, said.seed, said.extra) == (
        "a (red:1.2) star",
        "blue",
        5,
        {"Guidance rescale": "0.3"},
    )
    assert said == replace(then, version=said.version)


def test_on_a_gpu_the_host_leads_the_loop_and_says_why(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    FakeOnnxRuntime(FakeGpu().install(monkeypatch)).install(monkeypatch)
    with Pipeline.load(bundle, device="cuda") as pipeline:
        drawn = [pipeline("a star", seed=1, num_inference_steps=3, width=64, height=64) for _ in range(2)]
    with Pipeline.load(bundle, device="cpu") as pipeline:
        expected = pipeline("a star", seed=1, num_inference_steps=3, width=64, height=64)
    assert np.abs(drawn[0].samples - expected.samples).max() < 1e-3
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(
        "the bundle's sampler step is an older version's: the host leads the loop, which is slower; export"
    )
