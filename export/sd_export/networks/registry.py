"""The networks that can be exported, in the order of the flow.  Imports nothing heavy: a network's own file, which
imports torch, is opened by `Entry.network`."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .base import Network


@dataclass(frozen=True)
class Entry:
    """What is known of a network before its file is opened.

    name        of the component in a bundle
    module      of this package, with the constant in it: "vae:DECODER"
    part        the part of a checkpoint that holds its config and weights
    required    every checkpoint has it
    selectable  --components can name it; another network is exported wherever the checkpoint has its part
    """

    name: str
    module: str
    part: str
    required: bool = True
    selectable: bool = True

    def network(self) -> Network:
        """What the network's file says of it."""
        module, _, constant = self.module.partition(":")
        network: Network = getattr(importlib.import_module(f".{module}", __package__), constant)
        return network


REGISTRY = (
    Entry("text_encoder", "text_encoder:TEXT_ENCODER", part="text_encoder"),
    Entry("unet", "unet:UNET", part="unet"),
    Entry("vae_decoder", "vae:DECODER", part="vae"),
    Entry("vae_encoder", "vae:ENCODER", part="vae"),
    Entry("safety_checker", "safety_checker:SAFETY_CHECKER", part="safety_checker", required=False),
    Entry("taesd", "taesd:TAESD", part="taesd", required=False, selectable=False),
)

REQUIRED = tuple(entry.name for entry in REGISTRY if entry.required)
SELECTABLE = tuple(entry.name for entry in REGISTRY if entry.selectable)
PART = {entry.name: entry.part for entry in REGISTRY}


def find(name: str) -> Network:
    """The network of the component `name`.  KeyError: there is none."""
    return {entry.name: entry for entry in REGISTRY}[name].network()
