"""A part of a checkpoint as a library's model: float32, evaluation mode, no gradients.

A model is built without storage and takes over the file's memory-mapped tensors, so float32 weights cost no private
memory.  Load one network at a time and drop it before the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sd_runtime.errors import ExportError, one_line

from ..source import Checkpoint, single_file

if TYPE_CHECKING:
    from torch import Tensor


def build(checkpoint: Checkpoint, part: str, make: Callable[[dict[str, Any]], Any], device: str = "meta") -> Any:
    """make(config) on `device`; a config that the library rejects is an ExportError, whatever it raises."""
    import torch

    try:
        with torch.device(device):
            return make(dict(checkpoint.configs[part]))
    except Exception as error:
        reason = one_line(f"{type(error).__name__}: {error}", 160)
        raise ExportError(f"model '{checkpoint.id}': no {part} can be built from its config ({reason})") from error


def state_dict(checkpoint: Checkpoint, part: str) -> dict[str, Tensor]:
    """The part's tensors in diffusers' naming, memory-mapped, in the file's dtype."""
    from safetensors import safe_open

    prefix = checkpoint.prefixes.get(part)
    state: dict[str, Tensor] = {}
    for path in checkpoint.weights[part]:
        with safe_open(str(path), framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix or "")]  # noqa: SIM118 - not a dict
            state |= {name: file.get_tensor(name) for name in names}
    if prefix is None:
        return state
    return single_file.to_diffusers(checkpoint.weights[part][0].name, part, state, checkpoint.configs[part])


def fill(checkpoint: Checkpoint, part: str, model: Any, state: dict[str, Tensor]) -> Any:
    """`model` with exactly the tensors of `state`; ExportError names those that are missing, extra or misshapen."""
    expected = model.state_dict()
    problems = [f"missing {name}" for name in expected if name not in state]
    problems += [f"unexpected {name}" for name in state if name not in expected]
    problems += [
        f"{name} is {tuple(state[name].shape)}, its config says {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ExportError(
            f"{checkpoint.place(part)} does not hold the {part} that its config describes: "
            f"{one_line('; '.join(problems[:3]), 300)}{more}"
        )
    _check_finite(checkpoint, part, state)
    model.load_state_dict(state, assign=True)
    return model.float().eval().requires_grad_(False)


def _check_finite(checkpoint: Checkpoint, part: str, state: dict[str, Tensor]) -> None:
    """ExportError names the first tensor with a NaN or an infinity, which no probe need meet and every picture may."""
    import torch

    for name, tensor in state.items():
        if tensor.is_floating_point() and tensor.numel():
            low, high = (float(extreme) for extreme in torch.aminmax(tensor))  # NaN if one number is
            if not (math.isfinite(low) and math.isfinite(high)):
                raise ExportError(
                    f"{checkpoint.place(part)}: tensor {one_line(name)} of the {part} holds NaN or infinity",
                    remedy="fetch the checkpoint again; where it was made so, nothing can be drawn with it",
                )
