"""Names and shapes of the tensors in a .safetensors file, from its header, before any tensor is loaded."""

from __future__ import annotations

from pathlib import Path

from sd_runtime.errors import ExportError, one_line

FILE_LIMIT = 32 << 30  # bytes, as in a bundle; a whole Stable Diffusion in float32 takes 6e9
HEADER_LIMIT = 32 << 20  # bytes; Stable Diffusion's own headers stay below 0.5 MB


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor in a .safetensors file, in the file's order.

    ExportError names the file if it is truncated, declares an oversized header, or has tensors that overlap, leave
    holes or lie outside the file (the checks of the safetensors library, which raises before it allocates).
    """
    from safetensors import SafetensorError, safe_open

    _check_start(path)
    try:
        with safe_open(str(path), framework="numpy") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError, MemoryError) as error:
        raise _damaged(path, one_line(str(error))) from error


def check_size(path: Path) -> None:
    """ExportError before anything of a file is read that is larger than any weights of a supported model."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ExportError(f"{path} cannot be read ({error.strerror})") from error
    if size > FILE_LIMIT:
        raise ExportError(f"{path} is too large", got=f"{size} bytes", accepted=f"at most {FILE_LIMIT}")


def _check_start(path: Path) -> None:
    """Refuse what cannot be a safetensors file by its size and first bytes."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise ExportError(f"{path} cannot be read ({error.strerror})") from error
    if start.startswith(b"version https://git-lfs"):
        raise ExportError(
            f"{path} is a Git LFS pointer, not the weights", remedy="run `git lfs pull` in that repository"
        )
    header = int.from_bytes(start[:8], "little")
    if len(start) < 8 or header > HEADER_LIMIT:
        raise _damaged(path, f"its header would have {header} bytes, at most {HEADER_LIMIT} are read")
    if 8 + header > size:
        raise _damaged(path, f"it ends inside its header, after {size} of at least {8 + header} bytes")


def _damaged(path: Path, why: str) -> ExportError:
    return ExportError(f"{path} is not an intact safetensors file ({why})", remedy="fetch it again")
