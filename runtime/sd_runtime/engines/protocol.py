"""What an engine is: a named function from arrays to numpy arrays, with its tensors declared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..tensor import Array, TensorSpec


@dataclass(frozen=True)
class Placed:
    """An input that already lies where the engine reads it; `value` is the engine's own handle."""

    value: Any
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def close(self) -> None:
        self.value.close()


Feed = Array | Placed


class Engine(Protocol):
    """One component (text encoder, UNet, VAE half) ready to run.

    `run` checks dtype, shape and completeness of `feeds` against `inputs` (EngineError), runs the graph, and returns
    every output by name as a numpy array that the caller owns.  `place` puts an input that several runs share where the
    graph reads it, once; see `placing`.
    """

    @property
    def inputs(self) -> tuple[TensorSpec, ...]: ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]: ...

    def place(self, name: str, array: Array) -> Feed: ...

    def run(self, feeds: Mapping[str, Feed]) -> dict[str, Array]: ...

    def close(self) -> None: ...


@contextmanager
def placing(engine: Engine, inputs: Mapping[str, Array]) -> Iterator[dict[str, Feed]]:
    """`inputs` where the engine reads them, as long as the block lasts."""
    feeds: dict[str, Feed] = {}
    try:
        for name, array in inputs.items():
            feeds[name] = engine.place(name, array)
        yield feeds
    finally:
        for feed in feeds.values():
            if isinstance(feed, Placed):
                feed.close()
