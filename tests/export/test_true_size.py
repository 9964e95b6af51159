"""Stable Diffusion 1.5's true sizes: 5 to 15 minutes, 8 GB of memory, 10 GB of disk.  Run with -m slow."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "true_size.py"


@pytest.mark.slow
def test_true_size(tmp_path: Path) -> None:
    """Export, parity and a picture in both precisions, within the script's limits."""
    command = [sys.executable, str(SCRIPT), "--folder", str(tmp_path), "--precision", "fp32", "fp16"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0, done.stdout
