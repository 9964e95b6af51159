"""Shared by the runtime's tests: our pipeline and diffusers', each loaded once a session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sd_runtime import Pipeline


@pytest.fixture(scope="session")
def pipe(demo_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(demo_bundle, device="cpu") as pipeline:
        yield pipeline


@pytest.fixture(scope="session")
def reference() -> Any:
    """diffusers' StableDiffusionPipeline; `demo_reference.switched` chooses its sampler."""
    from demo_reference import load_reference

    return load_reference()
