"""The wheel holds both packages and the demo checkpoint and nothing else; the base install stays small."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import install_size
import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    install_size.copy_sources(folder / "sources")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", folder, folder / "sources"], check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_holds_the_sources_and_nothing_else(wheel: Path) -> None:
    sources = {
        path.relative_to(REPOSITORY / root).as_posix()
        for root in ("export", "runtime")
        for path in (REPOSITORY / root).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and ".egg-info" not in path.as_posix()
    }
    with zipfile.ZipFile(wheel) as archive:
        packed = {info.filename: info.file_size for info in archive.infolist() if ".dist-info/" not in info.filename}
    assert packed.keys() == sources
    assert sum(size for name, size in packed.items() if "demo_checkpoint" not in name) < 1_000_000


@pytest.mark.slow
def test_base_install_is_small() -> None:
    sizes = install_size.measure()
    assert "onnxruntime" not in sizes
    assert sum(sizes.values()) <= 110 * install_size.MEGABYTE
