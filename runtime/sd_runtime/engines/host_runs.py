"""What every engine on the CPU asks before and after a run, whatever library it is of."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from ..bundle.bundle import GraphFiles
from ..errors import EngineError
from ..tensor import Array, FeedCheck, TensorSpec, check_outputs
from .protocol import Feed


class HostRuns:
    """The runs of one graph, on weights that the library maps."""

    def __init__(self, files: GraphFiles, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
        self._files: GraphFiles | None = files
        self._inputs, self._outputs = inputs, outputs
        self._check, self._process = FeedCheck(inputs), os.getpid()

    def __call__(self, feeds: Mapping[str, Feed], run: Callable[[], dict[str, Array]]) -> dict[str, Array]:
        """What `run` returns.  EngineError: closed, of another process, or not the tensors that the manifest says;
        BundleError: the weights are not those that were verified."""
        files = self._files  # kept, with the weights, while this runs, also if it is closed meanwhile
        if files is None:
            raise EngineError("the pipeline was closed")
        if os.getpid() != self._process:  # where none of the library's threads is
            what = f"{files.name} was loaded before this process forked"
            raise EngineError(what, remedy="load the pipeline after fork")
        self._check(feeds)
        if files.weights is not None:
            files.weights.check()
        found = run()
        if files.weights is not None:
            files.weights.check()
        check_outputs(files.name, self._inputs, feeds, self._outputs, found)
        return found

    def close(self) -> None:
        self._files = None
