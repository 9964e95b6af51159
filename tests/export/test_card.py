"""The bundle's README.md: what the hub reads of it, and that it says what holds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from sd_export.card import make_card, read_license
from sd_export.source import resolve_checkpoint
from sd_runtime.bundle.bundle import Bundle
from sd_runtime.bundle.manifest import MANIFEST, Manifest, Source, Verification


@pytest.fixture(scope="module")
def manifest(demo_bundle: Path) -> Manifest:
    return Bundle.open(demo_bundle).manifest


def front(card: str) -> dict[str, Any]:
    value: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return value


def test_the_export_writes_it_and_editing_it_changes_no_bundle(demo_bundle: Path, tmp_path: Path) -> None:
    card = (demo_bundle / "README.md").read_text()
    assert front(card)["pipeline_tag"] == "text-to-image"
    assert "README.md" not in json.loads((demo_bundle / MANIFEST).read_text())["files"]
    assert str(demo_bundle) not in card and str(Path.home()) not in card


def test_it_says_where_the_weights_are_from(manifest: Manifest) -> None:
    checkpoint = resolve_checkpoint("demo")
    assert "base_model" not in front(make_card(manifest, checkpoint))
    pinned = replace(checkpoint, id="someone/model", revision="0" * 40)
    card = make_card(replace(manifest, source=Source("someone/model", "0" * 40, {})), pinned, "openrail")
    assert front(card)["base_model"] == "someone/model" and front(card)["license"] == "openrail"
    assert "revision `" + "0" * 40 in card


def test_every_folder_is_explained_and_every_limit_is_there(manifest: Manifest) -> None:
    card = make_card(manifest, resolve_checkpoint("demo"))
    for folder in {name.partition("/")[0] for name in manifest.files if "/" in name}:
        assert f"| `{folder}` | " in card and f"| `{folder}` |  |" not in card
    assert manifest.verification is not None
    assert card.count("relative error at most") == sum(c.measure == "relative" for c in manifest.verification.checks)
    skipped = replace(manifest, verification=Verification(skipped=True))
    assert "--no-verify" in make_card(skipped, resolve_checkpoint("demo"))


def test_a_safety_checker_that_optimum_does_not_run_is_named(manifest: Manifest) -> None:
    checkpoint = resolve_checkpoint("demo")
    assert "optimum and diffusers draw" not in make_card(manifest, checkpoint)
    components = manifest.components | {"safety_checker": manifest.components["unet"]}
    assert "**optimum and diffusers draw" in make_card(replace(manifest, components=components), checkpoint)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\nlicense: creativeml-openrail-m\ntags: [a]\n---\n# x\nlicense: no", "creativeml-openrail-m"),
        ('---\nlicense: "mit"\n---\n', "mit"),
        ("# a card\nlicense: mit\n", None),
        ("---\nlicense:\n---\n", None),
        ("---\nno end", None),
        ("", None),
    ],
)
def test_the_licence_is_read_from_the_checkpoints_card(tmp_path: Path, text: str, expected: str | None) -> None:
    (tmp_path / "README.md").write_text(text)
    assert read_license(tmp_path) == expected
    assert read_license(tmp_path / "nowhere") is None
