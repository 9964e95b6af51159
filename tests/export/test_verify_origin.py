"""The checkpoint that a bundle was made from is found again where nothing needs to be downloaded, or not at all."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
from sd_export.source import resolve_checkpoint
from sd_export.source.resolve import DEMO_FOLDER
from sd_export.verify.origin import difference, find, find_source, open_checkpoint
from sd_runtime.bundle.bundle import Bundle
from sd_runtime.bundle.manifest import Manifest, Source
from sd_runtime.errors import ExportError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def manifest(demo_bundle: Path) -> Manifest:
    """Of a bundle of the demo, as if that had come from the hub."""
    files = dict(resolve_checkpoint("demo").files)
    return replace(Bundle.open(demo_bundle).manifest, source=Source("owner/name", COMMIT, files))


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache with that commit in it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.file_download, "HF_HUB_CACHE", str(tmp_path), raising=False)
    folder = tmp_path / "models--owner--name" / "snapshots" / COMMIT
    shutil.copytree(DEMO_FOLDER, folder)
    return folder


def test_in_the_hub_s_cache(manifest: Manifest, snapshot: Path) -> None:
    found = find_source(manifest)
    assert found is not None and found.files == manifest.source.files
    assert find(manifest.source) == str(snapshot)


def test_not_in_the_hub_s_cache(manifest: Manifest, snapshot: Path) -> None:
    shutil.rmtree(snapshot)
    assert find_source(manifest) is None


def test_damaged_in_the_hub_s_cache(manifest: Manifest, snapshot: Path) -> None:
    """Another file than the bundle was made from is no reference."""
    config = snapshot / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text() + "\n")
    assert find_source(manifest) is None
    noted = difference(resolve_checkpoint(str(snapshot)), manifest)
    assert noted is not None and noted.endswith("is not what the bundle was made from: scheduler/scheduler_config.json")


def test_a_folder_has_no_place(manifest: Manifest) -> None:
    assert find(Source("my-model", None, {})) is None
    assert find_source(replace(manifest, source=Source("my-model", None, {}))) is None


def test_a_part_from_elsewhere_must_be_here_too(manifest: Manifest, snapshot: Path) -> None:
    part = Source("owner/name", COMMIT, {})
    assert open_checkpoint("demo", replace(manifest, parts={"vae": part})).parts["vae"].id == COMMIT
    lost = replace(manifest, parts={"vae": Source("a-folder", None, {})})
    with pytest.raises(ExportError, match="the bundle's vae is from 'a-folder', which is not here"):
        open_checkpoint("demo", lost)
    assert find_source(lost) is None
