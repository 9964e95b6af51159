"""scripts/compare_peers.py: what it makes of its workers' answers; the workers that this environment has are run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import compare_peers
import pytest
from compare_peers import Row, Run
from PIL import Image


def test_ours_is_measured(demo_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In this environment, once; there is no picture of diffusers' to compare with."""
    values = tmp_path / "values.json"
    few = ["--peers", "ours", "--rounds", "1", "--repeats", "1", "--steps", "3", "--short", "1"]
    size = ["--width", "64", "--height", "64", "--pictures", str(tmp_path)]
    where = [str(demo_bundle), str(demo_bundle), "--python", f"ours={sys.executable}", "--json", str(values)]
    assert compare_peers.main([*where, *few, *size]) == 0
    assert "| ours | nan dB |" in capsys.readouterr().out
    (row,) = json.loads(values.read_text())["rows"]
    assert row["cold"] > 0 and row["memory"] > 50 and row["install"] > 100
    with Image.open(tmp_path / "ours.png") as picture:
        assert picture.size == (64, 64)


def test_a_worker_that_fails_says_why(demo_bundle: Path, tmp_path: Path) -> None:
    arguments = ["/no/such/bundle", "/", "--peers", "ours", "--python", f"ours={sys.executable}"]
    with pytest.raises(SystemExit, match=r"ours failed:\n(.|\n)*BundleError"):
        compare_peers.main([*arguments, "--pictures", str(tmp_path)])


def test_the_least_of_times_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_peers, "install_size", lambda python: 170.0)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "ours.png")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "diffusers.png")
    runs = [Run(1.0, 0.2, 1.5, 130), Run(0.5, 0.3, 1.2, 150), Run(0.7, 0.2, 9.0, 140)]
    row = compare_peers.row("ours", runs, 20, tmp_path, "python")
    assert row == Row("ours", None, pytest.approx(0.05), 0.5, 140, 170.0)
    Image.new("RGB", (8, 8), (254, 0, 0)).save(tmp_path / "ours.png")
    again = compare_peers.row("ours", runs, 20, tmp_path, "python")
    assert again.psnr == pytest.approx(10 * 4.8131 + 4.771, abs=0.01)  # a third of the values is off by one


def test_table(tmp_path: Path) -> None:
    args = compare_peers.parse(["bundle", "checkpoint"])
    rows = [Row("ours", 95.04, 0.0056, 0.39, 134.2, 167.4), Row("diffusers", None, 1.69, 3.27, 532, 1632)]
    lines = compare_peers.table(args, rows).splitlines()
    assert lines[-2:] == [
        "| ours | 95.0 dB | 5.6 ms | 0.39 s | 134 MB | 167 MB |",
        "| diffusers | reference | 1.69 s | 3.27 s | 532 MB | 1632 MB |",
    ]
