"""One network of a checkpoint → its graphs and weights in a folder.  Unlike `exporter`, this module imports torch."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import onnx
from sd_runtime.bundle.manifest import Component, Graph, Precision
from sd_runtime.errors import ExportError, SDError, one_line

from ..graphs import overflow, step_graph
from ..graphs.forms import write_forms
from ..graphs.precision import to_float16
from ..graphs.trace import trace
from ..graphs.weights import save, save_graph
from ..progress import Progress
from ..signature import Signature, Sizes
from ..source import Checkpoint
from .registry import find

GRAPH, WEIGHTS = "model.onnx", "model.safetensors"


def export_network(
    name: str, checkpoint: Checkpoint, precision: Precision, folder: Path, progress: Progress
) -> Component:
    """Trace, convert, write and check one network in `folder`/`name`; its entry in the manifest.

    ExportError: also for whatever torch, onnx and their relatives raise, which have no exceptions in common."""
    try:
        return _export_network(name, checkpoint, precision, folder, progress)
    except (SDError, OSError, MemoryError):  # which say what they are
        raise
    except Exception as error:
        what = f"{name} of '{one_line(checkpoint.id)}' cannot be exported"
        reason = one_line(f"{type(error).__name__}: {error}", 300)
        raise ExportError(f"{what} ({reason})", remedy="SD_DEBUG=1 shows the traceback") from error


def _export_network(
    name: str, checkpoint: Checkpoint, precision: Precision, folder: Path, progress: Progress
) -> Component:
    place, configs = folder / name, checkpoint.configs
    place.mkdir()
    network = find(name)
    with progress.stage(f"{name}: load"):
        loaded = network.load(checkpoint)
    probes = network.probes(configs) if precision == "fp16" else []
    with progress.stage(f"{name}: trace"):
        model = trace(loaded.module, loaded.signature, root=loaded.root, pixels=Sizes.of(configs).pixels)
        large = overflow.float32_values(model, probes)
        if precision == "fp16":
            to_float16(model, large | network.float32(model))
    if large:
        progress.note(f"{name}: {len(large)} values are too large for float16 and stay float32")
    with progress.stage(f"{name}: write", place / WEIGHTS):
        save(model, place / GRAPH, place / WEIGHTS)
        graphs = {"plain": _graph(f"{name}/{GRAPH}", loaded.signature)}
        for form, (extra, tensors) in network.extra_graphs(place / GRAPH, configs).items():
            save_graph(extra, place / f"model_{form}.onnx")
            graphs[form] = _graph(f"{name}/model_{form}.onnx", tensors)
        graphs |= write_forms(folder, graphs["plain"], precision)
    with progress.stage(f"{name}: check"):
        for graph in graphs.values():
            onnx.checker.check_model(str(folder / graph.path), full_check=True)
        overflow.require_finite(place / GRAPH, probes)
    return Component(f"{name}/{WEIGHTS}", graphs)


def export_loop(checkpoint: Checkpoint, names: Collection[str], folder: Path) -> dict[str, Component]:
    """The graphs without weights that keep the loop on the GPU around the networks `names`; see `step_graph`."""
    sizes = Sizes.of(checkpoint.configs)
    graphs = {}
    if "unet" in names:
        for form, guided in (("plain", False), ("guided", True)):
            tensors = step_graph.step_signature(sizes, guided=guided)
            graphs["sampler_step", form] = step_graph.step_graph(sizes, guided=guided), tensors
    if "vae_decoder" in names:
        graphs["pixels", "plain"] = step_graph.pixels_graph(), step_graph.pixels_signature(sizes)
    components: dict[str, Component] = {}
    for (name, form), (model, tensors) in graphs.items():
        path = f"{name}/model.onnx" if form == "plain" else f"{name}/model_{form}.onnx"
        (folder / name).mkdir(exist_ok=True)
        (folder / path).write_bytes(model.SerializeToString(deterministic=True))
        components.setdefault(name, Component(None, {})).graphs[form] = _graph(path, tensors)
    return components


def _graph(path: str, tensors: Signature) -> Graph:
    return Graph(path, tensors.inputs, tensors.outputs)
