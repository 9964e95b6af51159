"""Stand-ins for engines: numpy functions with the interface of a real one."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from sd_runtime.engines.protocol import Feed
from sd_runtime.tensor import Array, Dim, TensorSpec, check_feeds

Model = Callable[[Array, float, Array], Array]  # (sample, timestep, encoder_hidden_states) → out_sample

BATCH, HEIGHT, WIDTH = Dim("batch", 1, 2, 8), Dim("latent_height", 1, 8, 64), Dim("latent_width", 1, 8, 64)
SAMPLE = (BATCH, 4, HEIGHT, WIDTH)


class FakeUNet:
    """A UNet that is a numpy function; it checks its inputs like a real engine and counts its runs."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.timesteps: list[float] = []
        self.inputs = (
            TensorSpec("sample", "float32", SAMPLE),
            TensorSpec("timestep", "float32", (Dim("timesteps", 1, 2, 8),)),
            TensorSpec("encoder_hidden_states", "float32", (BATCH, Dim("sequence_length", 1, 77, 770), 8)),
        )
        self.outputs = (TensorSpec("out_sample", "float32", SAMPLE),)

    def place(self, name: str, array: Array) -> Array:
        return array

    def run(self, feeds: Mapping[str, Feed]) -> dict[str, Array]:
        check_feeds(self.inputs, feeds)
        sample, timestep, hidden = (feeds[spec.name] for spec in self.inputs)
        assert isinstance(sample, np.ndarray) and isinstance(timestep, np.ndarray) and isinstance(hidden, np.ndarray)
        self.timesteps.append(float(timestep[0]))
        return {"out_sample": self._model(sample, float(timestep[0]), hidden)}

    def close(self) -> None: ...
