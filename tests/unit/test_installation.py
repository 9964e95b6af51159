"""Faults of an installed ONNX Runtime, found in folders that are laid out as pip leaves them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from sd_runtime.engines.onnxruntime_.installation import (
    check_cuda_major,
    check_loadable,
    check_only_one,
    imported,
    installations,
)
from sd_runtime.errors import DependencyError

CUDA_13 = ("numpy>=1.21.6", 'nvidia-cuda-runtime~=13.0; extra == "cuda"')
CUDA_12 = ("numpy>=1.21.6", 'nvidia-cuda-runtime-cu12~=12.0; extra == "cuda"')


def install(
    folder: Path, name: str, version: str, requires: tuple[str, ...] = (), *, package: str = "onnxruntime"
) -> None:
    """What pip writes for a wheel that consists of one package."""
    metadata = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    metadata.mkdir(parents=True)
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        *(f"Requires-Dist: {r}" for r in requires),
    ]
    (metadata / "METADATA").write_text("\n".join(lines) + "\n")
    (metadata / "top_level.txt").write_text(f"{package}\n")
    (folder / package).mkdir(exist_ok=True)
    (folder / package / "__init__.py").write_text("")


def remove_files(folder: Path) -> None:
    """What uninstalling one of two builds does to the other: the shared files are gone, a library stays."""
    (folder / "onnxruntime/__init__.py").unlink()
    (folder / "onnxruntime/capi").mkdir()
    (folder / "onnxruntime/capi/libonnxruntime_providers_cuda.so").write_bytes(b"")


def test_what_is_installed(tmp_path: Path) -> None:
    install(tmp_path, "onnxruntime-gpu", "1.31.1", CUDA_13)
    install(tmp_path, "onnxruntime-genai", "0.11.2", package="onnxruntime_genai")
    install(tmp_path / "other", "onnxruntime-gpu", "1.26.0", CUDA_12)
    found = installations([str(tmp_path), str(tmp_path / "other"), str(tmp_path)])
    assert [(str(one), one.folder, one.cuda) for one in found] == [
        ("onnxruntime-gpu 1.31.1", tmp_path, 13),
        ("onnxruntime-gpu 1.26.0", tmp_path / "other", 12),
    ]


@pytest.mark.parametrize(("name", "version"), [("onnxruntime", "1.23.0"), ("onnxruntime-gpu", "1.31.1")])
def test_one_build_is_no_fault(tmp_path: Path, name: str, version: str) -> None:
    search = [str(tmp_path)]
    install(tmp_path, name, version)
    check_loadable(search)
    check_only_one(search)
    check_cuda_major(12080, search)


def test_this_environment_has_no_fault() -> None:
    """The real metadata, and the same library as Python imports."""
    import onnxruntime

    check_loadable()
    check_only_one()
    (found,) = imported()
    assert found.version == onnxruntime.__version__
    assert found.folder == Path(onnxruntime.__file__).parents[1]


def test_two_builds_in_one_folder(tmp_path: Path) -> None:
    install(tmp_path, "onnxruntime", "1.32.0")
    install(tmp_path, "onnxruntime-gpu", "1.31.1", CUDA_13)
    check_loadable([str(tmp_path)])  # one of them can be imported
    with pytest.raises(DependencyError) as caught:
        check_only_one([str(tmp_path)])
    assert str(caught.value) == (
        "several builds of ONNX Runtime overwrite each other: got onnxruntime 1.32.0 and onnxruntime-gpu 1.31.1, "
        "accepted one of them in an environment; pip uninstall -y onnxruntime onnxruntime-gpu, then "
        'pip install "sd-lean[gpu]"'
    )


def test_two_builds_in_two_folders_do_not_meet(tmp_path: Path) -> None:
    """As in an environment with --system-site-packages: the first folder's is imported, whole."""
    install(tmp_path / "first", "onnxruntime-gpu", "1.31.1", CUDA_13)
    install(tmp_path / "second", "onnxruntime", "1.20.1")
    search = [str(tmp_path / "first"), str(tmp_path / "second")]
    check_loadable(search)
    check_only_one(search)
    assert [str(one) for one in imported(search)] == ["onnxruntime-gpu 1.31.1"]
    assert [str(one) for one in imported(search[::-1])] == ["onnxruntime 1.20.1"]


@pytest.mark.parametrize(
    ("name", "requires", "extra"),
    [("onnxruntime", (), "cpu"), ("onnxruntime-gpu", CUDA_12, "gpu-cu12"), ("onnxruntime-gpu", CUDA_13, "gpu")],
)
def test_what_is_left_of_a_build(tmp_path: Path, name: str, requires: tuple[str, ...], extra: str) -> None:
    install(tmp_path, name, "1.31.1", requires)
    remove_files(tmp_path)
    with pytest.raises(DependencyError) as caught:
        check_loadable([str(tmp_path)])
    assert str(caught.value) == (
        f"{name} 1.31.1 is listed as installed, but its files are gone: got what is left after another build of ONNX "
        f'Runtime was uninstalled; pip uninstall -y {name}, then pip install "sd-lean[{extra}]"'
    )


def test_what_is_left_hides_no_whole_build(tmp_path: Path) -> None:
    install(tmp_path / "first", "onnxruntime-gpu", "1.31.1", CUDA_13)
    remove_files(tmp_path / "first")
    install(tmp_path / "second", "onnxruntime", "1.32.0")
    search = [str(tmp_path / "first"), str(tmp_path / "second")]
    check_loadable(search)
    assert [str(one) for one in imported(search)] == ["onnxruntime 1.32.0"]
    assert python_imports(search) == str(tmp_path / "second/onnxruntime/__init__.py")


def python_imports(search: list[str]) -> str | None:
    code = "import json, sys; sys.path[:0] = json.loads(sys.argv[1]); import onnxruntime; print(onnxruntime.__file__)"
    command = [sys.executable, "-I", "-S", "-c", code, json.dumps(search)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_an_empty_folder_is_no_library(tmp_path: Path) -> None:
    """pip leaves one behind when both of two builds were uninstalled, and Python imports it."""
    (tmp_path / "onnxruntime").mkdir()
    assert python_imports([str(tmp_path)]) == "None"
    with pytest.raises(DependencyError, match=r'^no engine library is installed.*pip install "sd-lean\[cpu\]"'):
        check_loadable([str(tmp_path)])


def test_a_build_of_ones_own_without_metadata_is_taken(tmp_path: Path) -> None:
    (tmp_path / "onnxruntime").mkdir()
    (tmp_path / "onnxruntime/__init__.py").write_text("")
    check_loadable([str(tmp_path)])
    check_only_one([str(tmp_path)])
    assert imported([str(tmp_path)]) == ()


@pytest.mark.parametrize(
    ("name", "version", "requires", "remedy"),
    [
        ("onnxruntime", "1.22.1", (), 'pip install "sd-lean[cpu]"'),
        ("onnxruntime-gpu", "1.22.0", CUDA_12, 'pip install "sd-lean[gpu-cu12]"'),
        ("onnxruntime-gpu", "1.9.0", (), 'pip install "sd-lean[gpu-cu12]"'),
        ("onnxruntime-directml", "1.22.0", (), 'pip install "onnxruntime-directml>=1.23"'),
    ],
)
def test_too_old(tmp_path: Path, name: str, version: str, requires: tuple[str, ...], remedy: str) -> None:
    install(tmp_path, name, version, requires)
    with pytest.raises(DependencyError) as caught:
        check_loadable([str(tmp_path)])
    assert str(caught.value) == (
        f"ONNX Runtime is too old for a bundle's graphs: got {name} {version}, accepted 1.23 or newer; {remedy}"
    )


def test_one_of_two_builds_is_too_old(tmp_path: Path) -> None:
    install(tmp_path, "onnxruntime", "1.22.1")
    install(tmp_path, "onnxruntime-gpu", "1.26.0", CUDA_12)
    remedy = 'pip uninstall -y onnxruntime onnxruntime-gpu, then pip install "sd-lean[gpu-cu12]"'
    with pytest.raises(DependencyError, match=r"too old for a bundle's graphs: got onnxruntime 1\.22\.1 and") as caught:
        check_loadable([str(tmp_path)])
    assert caught.value.remedy == remedy


@pytest.mark.parametrize(
    ("requires", "driver", "complaint"),
    [
        (
            CUDA_13,
            12080,
            "onnxruntime-gpu 1.31.1 is built for CUDA 13: got an NVIDIA driver for CUDA 12.8; "
            'pip install "sd-lean[gpu-cu12]", or update the driver to 580 or newer',
        ),
        (
            CUDA_12,
            11040,
            "onnxruntime-gpu 1.31.1 is built for CUDA 12: got an NVIDIA driver for CUDA 11.4; "
            "update the driver to 525 or newer",
        ),
        (
            CUDA_13,
            11080,
            "onnxruntime-gpu 1.31.1 is built for CUDA 13: got an NVIDIA driver for CUDA 11.8; "
            "update the driver to 580 or newer",
        ),
    ],
)
def test_a_driver_that_is_too_old(tmp_path: Path, requires: tuple[str, ...], driver: int, complaint: str) -> None:
    install(tmp_path, "onnxruntime-gpu", "1.31.1", requires)
    with pytest.raises(DependencyError) as caught:
        check_cuda_major(driver, [str(tmp_path)])
    assert str(caught.value) == complaint


@pytest.mark.parametrize(("requires", "driver"), [(CUDA_13, 13000), (CUDA_12, 12020), (CUDA_12, 13020), ((), 12000)])
def test_a_driver_that_serves(tmp_path: Path, requires: tuple[str, ...], driver: int) -> None:
    """A driver serves builds for older CUDA, too."""
    install(tmp_path, "onnxruntime-gpu", "1.31.1", requires)
    check_cuda_major(driver, [str(tmp_path)])
