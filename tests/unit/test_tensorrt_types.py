"""The TensorRT code against the signatures of real packages, where TENSORRT_STUBS says where these are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "check_tensorrt_types"


@pytest.mark.skipif("TENSORRT_STUBS" not in os.environ, reason="TENSORRT_STUBS names no folders with signatures")
def test_every_call_fits_every_version() -> None:
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run([SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_folders_must_be_given() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TENSORRT_STUBS"}
    done = subprocess.run([SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "no folders with TensorRT's signatures" in done.stderr
