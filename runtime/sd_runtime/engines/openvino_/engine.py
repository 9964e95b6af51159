"""OpenVINO as an engine on the CPU, in float32 or bfloat16, weights memory-mapped from the bundle.

A graph is compiled once, for all shapes.  Compiled for one shape, Stable Diffusion's UNet is at most 3 % faster, and
each further size would take seconds and a second copy of its weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...bundle.bundle import GraphFiles
from ...bundle.verified_file import VerifiedFile
from ...errors import EngineError
from ...tensor import Array, TensorSpec
from ..host_runs import HostRuns
from ..protocol import Feed
from .library import translate

CPU = "CPU"


class OpenVINOEngine:
    """One compiled graph; see `Engine` for the contract."""

    def __init__(
        self,
        core: Any,
        files: GraphFiles,
        graph: VerifiedFile,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        options: Mapping[str, Any],
    ) -> None:
        """`core`: an openvino.Core; `graph`: the .onnx of `files`, which OpenVINO reads by its name.

        EngineError: it cannot be loaded, or its inputs and outputs are not those of the manifest; BundleError: it or
        its weights are not those that were verified."""
        self.inputs, self.outputs = inputs, outputs
        self._name, self._runs = files.name, HostRuns(files, inputs, outputs)
        try:
            model = core.read_model(str(graph.folder / graph.path.name))
            _compare(f"{files.name}: inputs", inputs, model.inputs)
            _compare(f"{files.name}: outputs", outputs, model.outputs)
            self._compiled = core.compile_model(model, CPU, dict(options))
        except Exception as error:  # OpenVINO's exceptions have no common base but Exception
            if isinstance(error, EngineError):
                raise
            raise translate(error, f"cannot load {files.name}") from error
        for opened in (graph, files.weights):
            if opened is not None:
                opened.check_opened()

    def place(self, name: str, array: Array) -> Feed:
        """`array` itself: it is where the graph reads it."""
        next(spec for spec in self.inputs if spec.name == name).check(array)
        return array

    def run(self, feeds: Mapping[str, Feed]) -> dict[str, Array]:
        """A request of its own for each run, which takes 0.04 ms: several threads may call this at once."""
        compiled = self._compiled

        def run() -> dict[str, Array]:
            try:
                results = compiled.create_infer_request().infer(dict(feeds), share_inputs=True)
                return {spec.name: results[spec.name] for spec in self.outputs}  # copies, which the request drops
            except Exception as error:  # OpenVINO's exceptions have no common base but Exception
                raise translate(error, f"{self._name} failed while running") from error

        return self._runs(feeds, run)

    def close(self) -> None:
        """Release the compiled graph and its memory, once nobody runs it."""
        self._runs.close()
        self._compiled = None


def _compare(what: str, specs: tuple[TensorSpec, ...], ports: list[Any]) -> None:
    declared, actual = {spec.name for spec in specs}, {name for port in ports for name in port.names}
    if declared - actual or (what.endswith("inputs") and declared != actual):
        raise EngineError(
            f"{what} differ from the manifest",
            got=", ".join(sorted(actual)),
            accepted=", ".join(sorted(declared)),
        )
