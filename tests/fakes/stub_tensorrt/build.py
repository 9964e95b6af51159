"""Builds `network` from network.cpp: `python tests/fakes/stub_tensorrt/build.py FOLDER TENSORRT HEADERS`.

TENSORRT is the folder of the installed package `tensorrt` 8.5; HEADERS one with NvInfer.h and its companions of that
version, NvOnnxParser.h and CUDA's headers: the repositories of TensorRT and its ONNX parser have them (release/8.5).
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

HERE = Path(__file__).parent
ABSENT = """
[[noreturn]] inline void absent(char const* what)
{
    std::fprintf(stderr, "network.cpp lacks %s\\n", what);
    std::abort();
}
"""


def build(folder: Path, tensorrt: Path, *headers: Path) -> Path:
    """The program in `folder`, and empty libraries in the place of cuBLAS and cuDNN.  RuntimeError: what it lacks."""
    folder.mkdir(parents=True, exist_ok=True)
    for library in ("libcublas.so.11", "libcublasLt.so.11", "libcudnn.so.8"):
        stand_in(folder, tensorrt, library)
    libraries = [f"-L{tensorrt}", "-l:libnvonnxparser.so.8", "-l:libnvinfer.so.8"]
    search = [f"-Wl,-rpath-link,{folder}", f"-Wl,--disable-new-dtags,-rpath,{folder}:{tensorrt}"]
    return compiled(folder, headers, [*libraries, *search])


def build_newer(folder: Path, parser: Path, *headers: Path) -> Path:
    """The same over a libnvonnxparser.so of version 10 or later, compiled from the parser's sources."""
    folder.mkdir(parents=True, exist_ok=True)
    return compiled(folder, headers, [str(parser), f"-Wl,-rpath,{parser.parent}"])


def compiled(folder: Path, headers: Sequence[Path], linked: list[str]) -> Path:
    implementation = next((place / "NvInferImpl.h" for place in headers if (place / "NvInferImpl.h").is_file()), None)
    if implementation is None:
        raise RuntimeError(f"no NvInferImpl.h in {', '.join(map(str, headers))}")
    (folder / "defaults.h").write_text(defaults(implementation.read_text()))
    includes = [f"-I{place}" for place in (folder, *headers)]
    program = folder / "network"
    run(["g++", "-std=c++17", "-w", "-O1", *includes, str(HERE / "network.cpp"), "-o", str(program), *linked])
    return program


def defaults(header: str) -> str:
    """Every class of an implementation, with functions that say that they are not there."""
    lines = ['#include "NvInfer.h"', '#include "NvOnnxParser.h"', "#include <cstdio>", "#include <cstdlib>"]
    lines += ["namespace mock", "{", "using namespace nvinfer1;", "using namespace nvinfer1::apiv;", ABSENT]
    for name, body in re.findall(r"^class (V\w+) : public VRoot\n\{(.*?)^\};", header, re.DOTALL | re.MULTILINE):
        if name in ("VTensor", "VNetworkDefinition", "VAttention") or name.endswith("Layer"):
            lines += [f"struct D{name} : {name}", "{", *functions(name, body), "};"]
    return "\n".join([*lines, "}", ""])


def functions(name: str, body: str) -> Iterator[str]:
    for declaration in re.findall(r"virtual\s+([^;]*?)\s*=\s*0;", body, re.DOTALL):
        flat = " ".join(declaration.split())
        function = re.search(r"(\w+)\(", flat)
        assert function is not None
        body_of = "" if flat.startswith("void set") else f'absent("{name}::{function[1]}"); '
        yield f"    {flat} override {{ {body_of}}}"


def stand_in(folder: Path, tensorrt: Path, library: str) -> None:
    """A library with the functions that TensorRT's plugins link to; parsing calls none of them."""
    plugins = str(tensorrt / "libnvinfer_plugin.so.8")
    wanted = subprocess.run(
        ["nm", "-D", "--undefined-only", plugins], capture_output=True, text=True, check=True
    ).stdout
    names = re.findall(rf"\bU (\w+)@+{re.escape(library)}$", wanted, re.MULTILINE)
    (folder / "stand_in.c").write_text(
        "\n".join(["int unused;", *(f"int {name}(void) {{ return 1; }}" for name in names)])
    )
    (folder / "stand_in.map").write_text(f"{library} {{ global: *; }};\n")
    options = ["-shared", "-fPIC", f"-Wl,-soname,{library}", f"-Wl,--version-script={folder / 'stand_in.map'}"]
    run(["g++", "-x", "c", str(folder / "stand_in.c"), "-o", str(folder / library), *options])


def run(command: list[str]) -> None:
    if shutil.which(command[0]) is None:
        raise RuntimeError("no C++ compiler: install g++")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]} fails: {done.stderr}")


if __name__ == "__main__":
    print(build(Path(sys.argv[1]), *map(Path, sys.argv[2:])))
