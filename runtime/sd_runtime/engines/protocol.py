"""What an engine is: a named function from numpy arrays to numpy arrays, with its tensors declared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from ..tensor import Array, TensorSpec


class Engine(Protocol):
    """One component (text encoder, UNet, VAE half) ready to run.

    `run` checks dtype, shape and completeness of `feeds` against `inputs` (EngineError), runs the graph, and returns
    every output by name as a numpy array that the caller owns.  Not reentrant: one call at a time per engine.
    """

    @property
    def inputs(self) -> tuple[TensorSpec, ...]: ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]: ...

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]: ...

    def close(self) -> None: ...
