"""Wheel and source distribution hold both packages and the demo checkpoint and nothing else; extras name one build of
ONNX Runtime at most; the base install stays small."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import BytesParser
from itertools import combinations
from pathlib import Path

import install_size
import pytest
import sd_runtime
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

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
    assert sum(size for name, size in packed.items() if "demo_checkpoint" not in name) < 1_400_000


def test_source_distribution_makes_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    install_size.copy_sources(tmp_path / "sources")
    code = "import sys; from setuptools.build_meta import build_sdist, build_wheel as w; {}(sys.argv[1])"
    command = [sys.executable, "-c", code.format("build_sdist"), tmp_path]
    subprocess.run(command, cwd=tmp_path / "sources", check=True, capture_output=True)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    subprocess.run([sys.executable, "-c", code.format("w"), tmp_path], cwd=unpacked, check=True, capture_output=True)
    (again,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(again) as second:
        assert {i.filename: i.CRC for i in first.infolist()} == {i.filename: i.CRC for i in second.infolist()}


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return BytesParser().parsebytes(archive.read(name))


def requirements(metadata: Message, extra: str, python: str) -> dict[str, SpecifierSet]:
    """What an extra needs beyond the base, by name, with extras that it names itself."""
    needed: dict[str, SpecifierSet] = {}
    for text in metadata.get_all("Requires-Dist", []):
        requirement = Requirement(text)
        given, base = {"extra": extra, "python_version": python}, {"extra": "", "python_version": python}
        if requirement.marker is None or not requirement.marker.evaluate(given) or requirement.marker.evaluate(base):
            continue
        if requirement.name == "sd-lean":
            for other in requirement.extras:
                needed |= requirements(metadata, other, python)
        else:
            needed[requirement.name] = requirement.specifier
    return needed


def test_version(metadata: Message) -> None:
    assert metadata["Version"] == sd_runtime.__version__


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.13"])
def test_extras_bring_one_build_of_onnxruntime_at_most(metadata: Message, python: str) -> None:
    extras = {name: requirements(metadata, name, python) for name in metadata.get_all("Provides-Extra", [])}
    builds = {name: {r for r in needed if r.startswith("onnxruntime")} for name, needed in extras.items()}
    assert all(extras.values())
    assert {name: found for name, found in builds.items() if found} == {
        "cpu": {"onnxruntime"},
        "gpu": {"onnxruntime-gpu"},
        "gpu-cu12": {"onnxruntime-gpu"},
        "test": {"onnxruntime"},
    }
    for name in ("cpu", "gpu", "gpu-cu12"):
        (build,) = builds[name]
        assert "1.22.1" not in extras[name][build], "it cannot load the graphs"
        assert "1.27.0" not in extras[name][build] or build == "onnxruntime", "its extra cuda cannot be installed"


def test_extras_for_different_cuda_exclude_each_other(metadata: Message) -> None:
    """pip then refuses them together; for Python 3.10, all are for CUDA 12."""
    cuda_12, cuda_13 = {"gpu-cu12", "tensorrt-cu12"}, {"gpu", "tensorrt", "tensorrt-rtx"}
    for python in ("3.10", "3.11"):
        for one, other in combinations(sorted(cuda_12 | cuda_13), 2):
            bindings = [requirements(metadata, name, python)["cuda-bindings"] for name in (one, other)]
            common = [v for v in ("12.9.10", "13.4.4") if all(v in allowed for allowed in bindings)]
            apart = python == "3.11" and (one in cuda_12) != (other in cuda_12)
            assert len(common) == (0 if apart else 1), (one, other, python)


def test_python_m_sd_runtime_is_sd_run() -> None:
    command = [sys.executable, "-m", "sd_runtime", "--help"]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    assert run.stdout.startswith("usage: sd-run ")


@pytest.mark.slow
def test_base_install_is_small() -> None:
    sizes = install_size.measure()
    assert "onnxruntime" not in sizes
    assert sum(sizes.values()) <= 110 * install_size.MEGABYTE
