"""One network of a checkpoint → its graphs and weights in a folder.  This module, unlike `stages`, imports torch."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
from sd_runtime.bundle.manifest import Component, Graph, Precision
from sd_runtime.tensor import Array
from torch import nn

from ..graphs import overflow, step_graph
from ..graphs.forms import text_embeds, write_forms
from ..graphs.precision import to_float16
from ..graphs.trace import trace
from ..graphs.weights import save, save_graph
from ..progress import Progress
from ..source import Checkpoint, load_safety_checker, load_taesd, load_text_encoder, load_unet, load_vae
from . import modules, signature
from .probes import latent_probes, picture_probes
from .signature import Signature, Sizes

GRAPH, WEIGHTS = "model.onnx", "model.safetensors"


@dataclass(frozen=True)
class Network:
    """A module ready to be traced; `root` is the attribute that its weights' keys do without."""

    module: nn.Module
    signature: Signature
    root: str = ""


def load(name: str, checkpoint: Checkpoint) -> Network:
    """The component `name` of the checkpoint, in float32: what is traced, and the reference for its graph."""
    network = _LOADERS[name](checkpoint, Sizes.of(checkpoint.configs))
    modules.freeze(network.module)
    return network


def export_component(
    name: str, checkpoint: Checkpoint, precision: Precision, folder: Path, progress: Progress
) -> Component:
    """Trace, convert, write and check one component in `folder`/`name`; its entry in the manifest."""
    place = folder / name
    place.mkdir()
    sizes = Sizes.of(checkpoint.configs)
    with progress.stage(f"{name}: load"):
        network = load(name, checkpoint)
    probes = _probes(name, sizes, checkpoint) if precision == "fp16" else []
    with progress.stage(f"{name}: trace"):
        model = trace(network.module, network.signature, root=network.root, pixels=sizes.pixels)
        keep = overflow.float32_values(model, probes)
        if precision == "fp16":
            to_float16(model, keep | _verdict(name, model))
    if keep:
        progress.note(f"{name}: {len(keep)} values are too large for float16 and stay float32")
    with progress.stage(f"{name}: write", place / WEIGHTS):
        save(model, place / GRAPH, place / WEIGHTS)
        graphs = {"plain": _graph(f"{name}/{GRAPH}", network.signature)}
        if name == "text_encoder":
            embeds = signature.text_embeds_signature(sizes)
            save_graph(text_embeds(place / GRAPH, embeds), place / "model_embeds.onnx")
            graphs["embeds"] = _graph(f"{name}/model_embeds.onnx", embeds)
        graphs |= write_forms(folder, graphs["plain"], precision)
    with progress.stage(f"{name}: check"):
        for graph in graphs.values():
            onnx.checker.check_model(str(folder / graph.path), full_check=True)
        overflow.require_finite(place / GRAPH, probes)
    return Component(f"{name}/{WEIGHTS}", graphs)


def _verdict(name: str, model: ir.Model) -> frozenset[str]:
    """What the safety checker computes beyond its networks: cosines, whose third digit decides, stay float32."""
    if name != "safety_checker":
        return frozenset()
    own = (node for node in model.graph if "/" not in str(node.name))
    return frozenset(str(value.name) for node in own for value in node.outputs)


def _probes(name: str, sizes: Sizes, checkpoint: Checkpoint) -> list[Array]:
    """Inputs on which a network's values are measured: the VAE's, which is the one that outgrows float16."""
    if name == "vae_decoder":
        return latent_probes(sizes.channels, checkpoint.configs["vae"].get("scaling_factor", 0.18215))
    return picture_probes(sizes.pixels) if name == "vae_encoder" else []


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


def _text_encoder(checkpoint: Checkpoint, sizes: Sizes) -> Network:
    return Network(modules.TextEncoder(load_text_encoder(checkpoint)), signature.text_encoder_signature(sizes))


def _unet(checkpoint: Checkpoint, sizes: Sizes) -> Network:
    return Network(modules.UNet(load_unet(checkpoint)), signature.unet_signature(sizes), root="unet")


def _vae_decoder(checkpoint: Checkpoint, sizes: Sizes) -> Network:
    return Network(modules.VAEDecoder(load_vae(checkpoint)), signature.vae_decoder_signature(sizes))


def _vae_encoder(checkpoint: Checkpoint, sizes: Sizes) -> Network:
    return Network(modules.VAEEncoder(load_vae(checkpoint)), signature.vae_encoder_signature(sizes))


def _safety_checker(checkpoint: Checkpoint, _: Sizes) -> Network:
    config = checkpoint.configs["safety_checker"]
    return Network(modules.SafetyChecker(load_safety_checker(checkpoint)), signature.safety_checker_signature(config))


def _taesd(checkpoint: Checkpoint, sizes: Sizes) -> Network:
    return Network(modules.TAESDDecoder(load_taesd(checkpoint)), signature.vae_decoder_signature(sizes))


_LOADERS: dict[str, Callable[[Checkpoint, Sizes], Network]] = {
    "text_encoder": _text_encoder,
    "unet": _unet,
    "vae_decoder": _vae_decoder,
    "vae_encoder": _vae_encoder,
    "safety_checker": _safety_checker,
    "taesd": _taesd,
}


def _graph(path: str, tensors: Signature) -> Graph:
    return Graph(path, tensors.inputs, tensors.outputs)
