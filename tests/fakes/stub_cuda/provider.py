"""Builds the stub libraries that ONNX Runtime's CUDA provider links to, beside the driver's; see runtime.c."""

from __future__ import annotations

from pathlib import Path

import build

SOURCES = {
    "libcudart.so.13": ("runtime.c",),
    "libcublas.so.13": ("libraries.c", "-DCUBLAS"),
    "libcublasLt.so.13": ("libraries.c", "-DCUBLASLT"),
    "libcudnn.so.9": ("libraries.c", "-DCUDNN"),
    "libcurand.so.10": ("libraries.c",),  # linked, but not called
}


def libraries(folder: Path) -> None:
    """All of them in `folder`.  RuntimeError, in one line: what it needs is not here."""
    needed = [str(build.driver(folder))]
    script = folder / "symbols.map"
    for name, (source, *options) in SOURCES.items():
        script.write_text(f"{name} {{ global: *; }};\n")
        linked = [*needed, f"-Wl,--version-script={script}", "-Wno-builtin-declaration-mismatch"]
        library = build.compiled(source, folder / name, *options, *linked)
        if name == "libcudart.so.13":
            needed.append(str(library))
    script.unlink()
    opened_by = folder / "libcudnn.so"  # the name that the provider asks the loader for
    opened_by.unlink(missing_ok=True)
    opened_by.symlink_to("libcudnn.so.9")
