#!/usr/bin/env python3
"""One side of scripts/compare_peers.py, run by the Python of its own environment: what a user of each would write.

scripts/peer_worker.py PEER SETTINGS

PEER is a key of LOADERS, SETTINGS a JSON object.  Draws one picture and saves it, says so, then times a short and a
long run; answers are lines of JSON on stdout.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

Draw = Callable[[int], Any]  # number of steps → a PIL picture


def load_ours(settings: dict[str, Any], backend: str = "onnxruntime") -> Draw:
    from sd_runtime import Pipeline

    pipe = Pipeline.load(settings["bundle"], device="cpu", safety_checker=False, backends=[backend])
    return drawing(pipe, settings)


def drawing(pipe: Any, settings: dict[str, Any]) -> Draw:
    """A pipeline of ours, whatever its engines."""
    return lambda steps: pipe(**request(settings), seed=settings["seed"], num_inference_steps=steps).images[0]


def load_diffusers(settings: dict[str, Any]) -> Draw:
    import torch
    from diffusers import StableDiffusionPipeline

    torch.set_num_threads(settings["threads"])
    pipe = StableDiffusionPipeline.from_pretrained(settings["checkpoint"], torch_dtype=torch.float32)
    return drawing_with_torch(pipe, settings)


def load_optimum(settings: dict[str, Any]) -> Draw:
    """optimum's pipeline on our bundle: ONNX Runtime as it comes, the loop in torch and diffusers."""
    from optimum.onnxruntime import ORTStableDiffusionPipeline

    pipe = ORTStableDiffusionPipeline.from_pretrained(settings["bundle"], provider="CPUExecutionProvider")
    return drawing_with_torch(pipe, settings)


def drawing_with_torch(pipe: Any, settings: dict[str, Any]) -> Draw:
    import torch

    pipe.set_progress_bar_config(disable=True)

    def draw(steps: int) -> Any:
        generator = torch.Generator().manual_seed(settings["seed"])
        return pipe(**request(settings), generator=generator, num_inference_steps=steps).images[0]

    return draw


def load_openvino(settings: dict[str, Any], precision: str = "f32") -> Draw:
    """OpenVINO as it comes runs the bundle's plain graphs under our loop, whose own cost is within 1 ms a step."""
    from pathlib import Path

    import openvino
    from sd_runtime.bundle.bundle import Bundle
    from sd_runtime.engines.engines import Engines
    from sd_runtime.pipeline import Pipeline
    from sd_runtime.tensor import Array, TensorSpec

    core = openvino.Core()
    options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": settings["threads"]}

    class OpenVINOEngine:
        """One graph, compiled."""

        def __init__(self, path: Path, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
            self.inputs, self.outputs = inputs, outputs
            self._request = core.compile_model(str(path), "CPU", options).create_infer_request()

        def place(self, name: str, array: Array) -> Array:
            return array

        def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
            results = self._request.infer(dict(feeds))
            return {spec.name: results[spec.name].copy() for spec in self.outputs}

        def close(self) -> None: ...

    class PlainBackend:
        name = "OpenVINO"

        def engine(self, component: str, form: str, fallback: Callable[[], Any]) -> Any:
            graph = bundle.component(component).graph(form)
            bundle.open_graph(component, form)  # verified; OpenVINO reads it by its path
            return OpenVINOEngine(bundle.path(graph.path), graph.inputs, graph.outputs)

        def batch_sizes(self, most: int, rows: int, latent: tuple[int, ...]) -> tuple[int, ...]:
            return (1,)

        def precision(self, component: str) -> None:
            return None

        def close(self) -> None: ...

    bundle = Bundle.open(Path(settings["bundle"]))
    return drawing(Pipeline.assemble(bundle, Engines(bundle, [PlainBackend()])), settings)


LOADERS: dict[str, Callable[[dict[str, Any]], Draw]] = {
    "ours": load_ours,
    "ours-openvino": lambda settings: load_ours(settings, "openvino"),
    "ours-openvino-bf16": lambda settings: load_ours(settings, "openvino-bf16"),
    "diffusers": load_diffusers,
    "optimum": load_optimum,
    "openvino": load_openvino,
    "openvino-bf16": lambda settings: load_openvino(settings, "bf16"),
}


def request(settings: dict[str, Any]) -> dict[str, Any]:
    """What all pipelines call by the same names."""
    return {name: settings[name] for name in ("prompt", "guidance_scale", "height", "width")}


def main() -> None:
    settings = json.loads(sys.argv[2])
    out, sys.stdout = sys.stdout, sys.stderr  # what the libraries print must not get between the answers
    draw = LOADERS[sys.argv[1]](settings)
    draw(settings["long"]).save(settings["picture"])
    print(json.dumps("drawn"), file=out, flush=True)
    for _ in range(settings["repeats"]):
        seconds = []
        for steps in (settings["short"], settings["long"]):
            started = time.perf_counter()
            draw(steps)
            seconds.append(time.perf_counter() - started)
        print(json.dumps(seconds), file=out, flush=True)


if __name__ == "__main__":
    main()
