"""Shared by all tests: the demo checkpoint's bundle, exported once a session; our pipeline and diffusers' over it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from sd_runtime import Pipeline

# Small tensors on few cores: threads that wait for each other cost more than they bring.  Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# No deadline a case: on a busy machine any of them can take a second.  The same cases every time: a failure repeats.
hypothesis.settings.register_profile("here", hypothesis.settings.default, deadline=None, derandomize=True)
hypothesis.settings.load_profile("here")


@pytest.fixture(scope="session")
def demo_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 bundle of the packaged demo checkpoint; tests must not change it.

    While developing, SD_LEAN_TEST_BUNDLE=FOLDER names one that is there already."""
    if existing := os.environ.get("SD_LEAN_TEST_BUNDLE"):
        return Path(existing)
    pytest.importorskip("torch")
    from sd_export.exporter import export
    from sd_export.options import ExportOptions

    return export(ExportOptions("demo", output=tmp_path_factory.mktemp("bundles") / "demo"))


@pytest.fixture(scope="session")
def pipe(demo_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(demo_bundle, device="cpu") as pipeline:
        yield pipeline


@pytest.fixture(scope="session")
def reference() -> Any:
    """diffusers' StableDiffusionPipeline; `demo_reference.switched` chooses its sampler."""
    from demo_reference import load_reference

    return load_reference()
