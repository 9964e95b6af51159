"""Run as a program by `pickles`: python -m sd_export.source.unpickle PICKLE SAFETENSORS.

Exit code 3: the pickle asks for more than weights; 1: anything else.  The last line on stderr says why.
"""

from __future__ import annotations

import pickle
import re
import sys
import zipfile
from typing import Any

HOLDS_CODE = 3
MOST = 32 << 30  # bytes of what a zip file holds
ASKED_FOR = re.compile(r"(?:GLOBAL|global:?|function|class) ['`\"]?([\w.]+\.[\w.]+)")  # in torch's words


class UnreadableError(Exception):
    """Why a pickle cannot be converted, in our words: torch's would tell the user to open it all the same."""


def main(source: str, target: str) -> int:
    import torch
    from safetensors.torch import save_file

    try:
        _check_zip(source)
        loaded: Any = torch.load(source, map_location="cpu", weights_only=True)
        tensors = _tensors(loaded)
    except pickle.UnpicklingError as error:
        asked = ASKED_FOR.search(str(error))
        if asked is None:
            print("it is damaged, or not written as torch writes weights", file=sys.stderr)
            return 1
        print(f"it asks for {asked[1]}", file=sys.stderr)
        return HOLDS_CODE
    except UnreadableError as error:
        print(error, file=sys.stderr)
        return 1
    except Exception as error:
        print(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", file=sys.stderr)
        return 1
    # safetensors takes no two names for one memory
    save_file({name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}, target)
    return 0


def _check_zip(source: str) -> None:
    """torch saves uncompressed; what is compressed may be of any size."""
    if zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:
            entries = archive.infolist()
        if sum(entry.file_size for entry in entries) > MOST:
            raise UnreadableError("its entries are too large")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise UnreadableError("its entries are compressed, which torch never writes")


def _tensors(loaded: Any) -> dict[str, Any]:
    import torch

    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    found = {str(n): t for n, t in state.items() if isinstance(t, torch.Tensor)} if isinstance(state, dict) else {}
    if not found:
        raise UnreadableError("it holds no tensors by name")
    return found


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
