"""What each comparison is held to, by the bundle's precision.

A network's relative error is a property of its arithmetic: around 10⁻⁶ in float32, 10⁻⁵ for the autoencoder, and 10⁻³
in float16, whatever the weights.  The limits leave room, for what is wrong shows as 10⁻² and more.  In the loop those
errors feed on themselves, by how much depends on the model, so that drift and picture are held to what the eye cannot
see rather than to what is usual.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from sd_runtime.manifest import Precision

from .measures import Measure

AUTOENCODER = ("vae_encoder", "vae_decoder")
AUTOENCODER_CELLS = 64  # latent cells up to which it keeps to a network's limit


@dataclass(frozen=True)
class Limit:
    """The one number that a row is judged by: a relative error or an absolute one from above, a PSNR from below."""

    kind: Literal["relative", "max_abs", "psnr"]
    value: float

    def holds(self, measure: Measure) -> bool:
        """Whether `measure` is within it; NaN never is."""
        got: float = getattr(measure, self.kind)
        return got >= self.value if self.kind == "psnr" else got <= self.value

    def __str__(self) -> str:
        if self.kind == "psnr":
            return f"PSNR ≥ {self.value:g} dB"
        return "equal" if self.value == 0 else f"{self.kind} ≤ {self.value:.1e}"


EXACT = Limit("max_abs", 0.0)
NETWORK: dict[Precision, float] = {"fp32": 2e-5, "fp16": 3e-3}
DRIFT: dict[Precision, float] = {"fp32": 1e-3, "fp16": 1e-1}
PICTURE: dict[Precision, float] = {"fp32": 60.0, "fp16": 25.0}


def network_limit(component: str, precision: Precision, cells: int) -> Limit:
    """Of one call of a network on latents of so many cells.  In float32 the autoencoder's error grows with the side of
    the picture, for its normalisations add up ever more pixels."""
    value = NETWORK[precision]
    if component in AUTOENCODER and precision == "fp32":
        value *= math.sqrt(max(cells / AUTOENCODER_CELLS, 1))
    return Limit("relative", float(f"{value:.1e}"))


def drift_limit(precision: Precision) -> Limit:
    """Of the latents after a step of the loop."""
    return Limit("relative", DRIFT[precision])


def picture_limit(precision: Precision) -> Limit:
    """Of the finished picture."""
    return Limit("psnr", PICTURE[precision])
