"""What is wrong with the ONNX Runtime that is installed, found in the files of the environment before it is imported.

Several distributions (onnxruntime, onnxruntime-gpu, …) install the same package folder, `onnxruntime`.  Of two in one
environment, the one that was installed last has overwritten the other: after `pip install onnxruntime onnxruntime-gpu`
that is the build for CPUs, without a word.  Uninstalling either takes the files of both; what remains can still be
imported, as a namespace package without any function, and pip goes on to call the other one installed.  So only
uninstalling all of them and installing one mends it; scripts/check_install does that.

The metadata is read without importlib.metadata, whose import takes longer (16 ms) than all that is done here.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import DependencyError

PACKAGE = "onnxruntime"
OLDEST = (1, 23)  # the first that knows the operators of opset 23, which our graphs are written in
GPU_BUILD = "onnxruntime-gpu"
EXTRAS = {None: "gpu-cu12", 12: "gpu-cu12", 13: "gpu"}  # by the CUDA that a GPU build is made for; old ones do not say
# The extra `cuda` of a GPU build: "Requires-Dist: nvidia-cuda-runtime-cu12~=12.0; …" → 12
CUDA_REQUIREMENT = re.compile(r"^Requires-Dist: nvidia-cuda-runtime\S*? *\(?~= *(\d+)", re.MULTILINE)
OLDEST_DRIVERS = {12: 525, 13: 580}  # NVIDIA's for Linux, by CUDA's major version; CUDA Toolkit's release notes


@dataclass(frozen=True)
class Installation:
    """One distribution of which there is metadata and that brings the package `onnxruntime`."""

    name: str  # as pip takes it: onnxruntime, onnxruntime-gpu, …
    version: str
    folder: Path  # the site-packages that it was installed to
    cuda: int | None  # the major version of CUDA that it is built for; None: it does not say, or needs none

    def __str__(self) -> str:
        return f"{self.name} {self.version}"

    @property
    def is_too_old(self) -> bool:
        return tuple(int(number) for number in re.findall(r"\d+", self.version)[:2]) < OLDEST

    @property
    def extra(self) -> str | None:
        """Our extra that installs this build; None: it is one that we do not know."""
        if self.name == GPU_BUILD:
            return EXTRAS.get(self.cuda)
        return "cpu" if self.name == PACKAGE else None


def installations(search: Sequence[str] | None = None) -> tuple[Installation, ...]:
    """All in the folders of `search` (default: sys.path), in its order, whether or not their files are still there."""
    found = []
    for folder in dict.fromkeys(Path(entry) for entry in (sys.path if search is None else search)):
        for metadata in sorted(folder.glob("o[nr]*.dist-info")):  # onnxruntime, onnxruntime_gpu, ort_nightly, …
            # onnxruntime-genai, onnxruntime-extensions and the like bring packages of their own
            if PACKAGE in _text(metadata / "top_level.txt").split():
                name, _, version = metadata.stem.partition("-")
                cuda = CUDA_REQUIREMENT.search(_text(metadata / "METADATA"))
                found.append(Installation(name.replace("_", "-"), version, folder, int(cuda[1]) if cuda else None))
    return tuple(found)


def _text(file: Path) -> str:
    """Of a file that may be missing; "" then."""
    try:
        return file.read_text("utf-8", "replace")
    except OSError:
        return ""


def imported(search: Sequence[str] | None = None) -> tuple[Installation, ...]:
    """Those whose files `import onnxruntime` finds: more than one where they share a folder, none where the files are
    gone, or where pip has no metadata of them."""
    folders = [Path(entry) for entry in (sys.path if search is None else search)]
    first = next((folder for folder in folders if _has_files(folder)), None)
    return tuple(found for found in installations(search) if found.folder == first)


def _has_files(folder: Path) -> bool:
    return (folder / PACKAGE / "__init__.py").is_file()


def check_loadable(search: Sequence[str] | None = None) -> None:
    """DependencyError: there is no ONNX Runtime, or what is left of one, or one that is too old for our graphs."""
    folders = sys.path if search is None else search
    if not any(_has_files(Path(folder)) for folder in folders):
        remains = installations(search)
        if remains:
            raise DependencyError(
                f"{_listed(remains)} is listed as installed, but its files are gone",
                got="what is left after another build of ONNX Runtime was uninstalled",
                remedy=_start_again(remains),
            )
        raise DependencyError(
            "no engine library is installed",
            accepted="onnxruntime or onnxruntime-gpu",
            remedy='pip install "sd-lean[cpu]" (or "sd-lean[gpu]" for CUDA)',
        )
    present = imported(search)
    if any(found.is_too_old for found in present):
        raise DependencyError(
            "ONNX Runtime is too old for a bundle's graphs",
            got=_listed(present),
            accepted=f"{'.'.join(map(str, OLDEST))} or newer",
            remedy=_start_again(present) if len(present) > 1 else _upgrade(present[0]),
        )


def check_only_one(search: Sequence[str] | None = None) -> None:
    """DependencyError: several builds of ONNX Runtime lie in one folder, so that one hides what the other can do."""
    present = imported(search)
    if len(present) > 1:
        raise DependencyError(
            "several builds of ONNX Runtime overwrite each other",
            got=_listed(present),
            accepted="one of them in an environment",
            remedy=_start_again(present),
        )


def check_cuda_major(driver: int, search: Sequence[str] | None = None) -> None:
    """DependencyError: the GPU build that is imported needs a newer CUDA than the NVIDIA driver offers.

    driver: what cuDriverGetVersion returns, 1000 × major + 10 × minor: 12080 for CUDA 12.8.  A driver serves builds for
    every older CUDA as well (NVIDIA's "CUDA Compatibility"), so that those are no fault."""
    for found in imported(search):
        if found.cuda in OLDEST_DRIVERS and found.cuda > driver // 1000:
            newer = f"update the driver to {OLDEST_DRIVERS[found.cuda]} or newer"
            fits_cuda_12 = found.name == GPU_BUILD and driver // 1000 >= 12
            raise DependencyError(
                f"{found} is built for CUDA {found.cuda}",
                got=f"an NVIDIA driver for CUDA {driver // 1000}.{driver % 1000 // 10}",
                remedy=f'pip install "sd-lean[{EXTRAS[12]}]", or {newer}' if fits_cuda_12 else newer,
            )


def _listed(found: Sequence[Installation]) -> str:
    return " and ".join(map(str, found))


def _start_again(found: Sequence[Installation]) -> str:
    """Uninstall all of them, then install one: a build for GPUs where there was one."""
    wanted = next((one for one in found if one.name == GPU_BUILD), found[0])
    return f"pip uninstall -y {' '.join(one.name for one in found)}, then {_upgrade(wanted)}"


def _upgrade(found: Installation) -> str:
    if found.extra is not None:
        return f'pip install "sd-lean[{found.extra}]"'
    return f'pip install "{found.name}>={".".join(map(str, OLDEST))}"'
