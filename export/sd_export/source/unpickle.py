"""Run as a program by `pickles`: python -m sd_export.source.unpickle PICKLE SAFETENSORS.

Exit code 3: the pickle asks for more than weights; 1: anything else.  The last line on stderr says why.
"""

from __future__ import annotations

import pickle
import sys
from typing import Any

HOLDS_CODE = 3


def main(source: str, target: str) -> int:
    import torch
    from safetensors.torch import save_file

    try:
        loaded: Any = torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        print(" ".join(str(error).split())[:300], file=sys.stderr)
        return HOLDS_CODE
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    tensors = {str(n): t for n, t in state.items() if isinstance(t, torch.Tensor)} if isinstance(state, dict) else {}
    if not tensors:
        print("it holds no tensors by name", file=sys.stderr)
        return 1
    # safetensors takes no two names for one memory
    save_file({name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}, target)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
