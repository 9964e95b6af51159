"""What a network's file says of it.  Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd_runtime.tensor import Array

from ..signature import Signature

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import nn

    from ..source import Checkpoint
    from ..verify.torch_reference import TorchReference

Configs = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class LoadedNetwork:
    """A module ready to be traced: float32, evaluation mode, no gradients.  `root`: see `Network`."""

    module: nn.Module
    signature: Signature
    root: str


def _no_probes(_: Configs) -> list[Array]:
    return []


def _no_values(_: ir.Model) -> frozenset[str]:
    return frozenset()


def _no_graphs(_: Path, __: Configs) -> dict[str, tuple[ir.Model, Signature]]:
    return {}


@dataclass(frozen=True)
class Network:
    """One network of a checkpoint.

    model         checkpoint → the library's model with the checkpoint's weights
    module        that model → the module that is traced: tensors in, tensors out, nothing that a picture does not need.
                  Submodules sit under the names that they have in a checkpoint, so that the exported weights keep the
                  checkpoint's keys; the parameters' names at the edge are those of the signature
    signature     the checkpoint's configs → the module's tensors
    reference     adds to a reference what the libraries compute with this network
    root          the attribute of the module whose name is left out of the weights' keys
    probes        the checkpoint's configs → inputs on which values are measured before they become float16; none for a
                  network that never outgrows it
    float32       the traced graph → names of values that stay float32 whatever their size
    extra_graphs  the plain graph's file, and the checkpoint's configs → further graphs over the same weights by name,
                  each with its tensors
    """

    model: Callable[[Checkpoint], Any]
    module: Callable[[Any], nn.Module]
    signature: Callable[[Configs], Signature]
    reference: Callable[[TorchReference], None]
    root: str = ""
    probes: Callable[[Configs], list[Array]] = _no_probes
    float32: Callable[[ir.Model], frozenset[str]] = _no_values
    extra_graphs: Callable[[Path, Configs], dict[str, tuple[ir.Model, Signature]]] = _no_graphs

    def load(self, checkpoint: Checkpoint) -> LoadedNetwork:
        """The module in float32 with the checkpoint's weights: what is traced, and the reference for its graph."""
        module = self.module(self.model(checkpoint))
        module.eval().float().requires_grad_(False)
        return LoadedNetwork(module, self.signature(checkpoint.configs), self.root)
