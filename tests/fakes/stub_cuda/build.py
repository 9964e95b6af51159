"""Builds the stub CUDA libraries of this folder: `python tests/fakes/stub_cuda/build.py FOLDER`.

Needs a C compiler and CUDA's headers, which the package nvidia-cuda-runtime has, and a CUDA toolkit.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def driver(folder: Path) -> Path:
    """libcuda.so.1 in `folder`.  RuntimeError, in one line: what it needs is not here."""
    return compiled("driver.c", folder / "libcuda.so.1")


def compiled(source: str, library: Path, *options: str) -> Path:
    compiler = shutil.which(os.environ.get("CC", "gcc"))
    if compiler is None:
        raise RuntimeError("no C compiler: install gcc, or name one in CC")
    library.parent.mkdir(parents=True, exist_ok=True)
    command = [compiler, "-std=gnu11", "-Wall", "-Wextra", "-O1", "-g", "-fPIC", "-shared", f"-I{headers()}"]
    command += [str(HERE / source), "-o", str(library), f"-Wl,-soname,{library.name}", "-ldl", "-lpthread", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{source} does not compile: {done.stderr}")
    return library


def headers() -> Path:
    """The folder with cuda.h of CUDA 13."""
    candidates = [Path(home) / "include" for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    spec = importlib.util.find_spec("nvidia")
    for place in (spec.submodule_search_locations or []) if spec is not None else []:
        candidates += Path(place).glob("*/include")
    for folder in candidates:
        if (folder / "cuda.h").is_file():
            return folder
    raise RuntimeError("no cuda.h: install nvidia-cuda-runtime, or name a CUDA toolkit in CUDA_HOME")


if __name__ == "__main__":
    print(driver(Path(sys.argv[1])))
