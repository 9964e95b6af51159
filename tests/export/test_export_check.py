"""The comparison that an export makes before it publishes: what it stores, what it refuses, how it is skipped."""

from __future__ import annotations

from pathlib import Path

import pytest
from sd_export.cli import main
from sd_export.exporter import export
from sd_export.networks.registry import REQUIRED
from sd_export.options import ExportOptions
from sd_export.verify import limits
from sd_export.verify.reference import FOLDER, JSON, TENSORS, Reference
from sd_runtime.bundle.bundle import Bundle
from sd_runtime.bundle.manifest import Check, Verification
from sd_runtime.errors import ExportError

QUICKEST = ("vae_encoder",)


def test_the_manifest_says_what_held(tiny_bundle: Path) -> None:
    """Comparisons and their limits; no measured number, whose last digits would differ between machines."""
    bundle = Bundle.open(tiny_bundle)
    verification = bundle.manifest.verification
    assert verification is not None and not verification.skipped
    assert {check.component for check in verification.checks} == {"tokenizer", "noise", "loop", "picture", *REQUIRED}
    assert Check("unet", "timestep 981", "relative", 2e-5) in verification.checks
    assert {JSON, TENSORS} <= bundle.manifest.files.keys()
    assert Reference.load(bundle).probe.num_inference_steps == 6


def test_skipping_is_recorded(tiny_folder: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    arguments = ["--model", str(tiny_folder), "--output", str(bundle), "--components", "vae_encoder", "--quiet"]
    assert main([*arguments, "--no-verify"]) == 0
    assert Bundle.open(bundle).manifest.verification == Verification(skipped=True)
    assert not (bundle / FOLDER).exists()
    assert main([*arguments, "--no-verify"]) == 0  # up to date
    assert main(arguments) == 1  # not what is asked for now


def test_what_differs_is_not_published(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(limits.CPU, "fp32", limits.Limits(1e-12, 1e-12, 300))
    expected = r"vae_encoder, sample picture differs from the reference: got relative .*, accepted relative ≤ 2.4e-12"
    with pytest.raises(ExportError, match=rf"{expected}; --no-verify exports it nevertheless"):
        export(ExportOptions(str(tiny_folder), output=tmp_path / "bundle", components=QUICKEST))
    assert not (tmp_path / "bundle").exists()
