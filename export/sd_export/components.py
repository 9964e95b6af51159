"""One network of a checkpoint → its graphs and weights in a folder.  This module, unlike `stages`, imports torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx
from sd_runtime.manifest import Component, Graph, Precision
from torch import nn

from . import modules, signature
from .forms import text_embeds
from .precision import to_float16
from .progress import Progress
from .signature import Signature, Sizes
from .source import Checkpoint, load_text_encoder, load_unet, load_vae
from .trace import trace
from .weights import save, save_graph

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
    with progress.stage(f"{name}: trace"):
        model = trace(network.module, network.signature, root=network.root, pixels=sizes.pixels)
        if precision == "fp16":
            to_float16(model)
    with progress.stage(f"{name}: write", place / WEIGHTS):
        save(model, place / GRAPH, place / WEIGHTS)
        graphs = {"plain": _graph(f"{name}/{GRAPH}", network.signature)}
        if name == "text_encoder":
            embeds = signature.text_embeds_signature(sizes)
            save_graph(text_embeds(place / GRAPH, embeds), place / "model_embeds.onnx")
            graphs["embeds"] = _graph(f"{name}/model_embeds.onnx", embeds)
    with progress.stage(f"{name}: check"):
        for graph in graphs.values():
            onnx.checker.check_model(str(folder / graph.path), full_check=True)
    return Component(f"{name}/{WEIGHTS}", graphs)


def _text_encoder(checkpoint: Checkpoint, sizes: Sizes) -> Network:
    return Network(modules.TextEncoder(load_text_encoder(checkpoint)), signature.text_encoder_signature(sizes))


def _unet(checkpoint: Checkpoint, sizes: Sizes) -> Network:
    return Network(modules.UNet(load_unet(checkpoint)), signature.unet_signature(sizes), root="unet")


def _vae_decoder(checkpoint: Checkpoint, sizes: Sizes) -> Network:
    return Network(modules.VAEDecoder(load_vae(checkpoint)), signature.vae_decoder_signature(sizes))


def _vae_encoder(checkpoint: Checkpoint, sizes: Sizes) -> Network:
    return Network(modules.VAEEncoder(load_vae(checkpoint)), signature.vae_encoder_signature(sizes))


_LOADERS: dict[str, Callable[[Checkpoint, Sizes], Network]] = {
    "text_encoder": _text_encoder,
    "unet": _unet,
    "vae_decoder": _vae_decoder,
    "vae_encoder": _vae_encoder,
}


def _graph(path: str, tensors: Signature) -> Graph:
    return Graph(path, tensors.inputs, tensors.outputs)
