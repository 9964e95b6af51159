"""What to export: the flags of sd-export, validated.  Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sd_runtime.errors import UsageError

from .choices import PREDICTION_TYPES, PredictionType
from .networks.registry import SELECTABLE

if TYPE_CHECKING:
    from sd_runtime.bundle.manifest import Precision

PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16")


@dataclass(frozen=True)
class ExportOptions:
    """Export `model` to the folder `output`, or to the user's bundles under the model's name.

    model       "demo", a hub id, a folder in diffusers layout, or a single .safetensors file
    prediction_type  what the UNet predicts, where the checkpoint does not say it, or says it wrongly
    allow_pickle  convert checkpoints that are pickles, in a process that loads nothing but weights
    precision   of the weights and of the arithmetic in the graphs
    revision    hub branch, tag or commit; None is the default branch
    components  which networks, each once, in any order; None is all that the checkpoint has
    vae         another VAE in the place of the checkpoint's own: a hub id, a folder, or a .safetensors file
    taesd       a tiny autoencoder, whose decoder is added as a fast one: a hub id or a folder
    verify      compare the bundle with torch before it is published, and store reference tensors in it
    force       replace a bundle that is there but is something else, or damaged; one that is current is always kept
    """

    model: str
    output: Path | None = None
    precision: Precision = "fp32"
    revision: str | None = None
    components: tuple[str, ...] | None = None
    vae: str | None = None
    taesd: str | None = None
    verify: bool = True
    force: bool = False
    prediction_type: PredictionType | None = None
    allow_pickle: bool = False

    def __post_init__(self) -> None:
        if not self.model:
            raise UsageError("model", got=self.model, accepted="demo, a hub id, a folder or a .safetensors file")
        if self.precision not in PRECISIONS:
            raise UsageError("precision", got=self.precision, accepted=", ".join(PRECISIONS))
        if self.prediction_type not in (None, *PREDICTION_TYPES):
            accepted = ", ".join(PREDICTION_TYPES)
            raise UsageError("prediction_type", got=self.prediction_type, accepted=accepted)
        if self.components is None:
            return
        if not self.components or set(self.components) - set(SELECTABLE):
            raise UsageError("components", got=",".join(self.components), accepted=",".join(SELECTABLE))
        if len(set(self.components)) != len(self.components):
            raise UsageError("components named twice", got=",".join(self.components))
