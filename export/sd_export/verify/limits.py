"""The limit of each comparison, by the precision of the arithmetic.

A network's relative error is a property of its arithmetic: around 10⁻⁶ in float32, 10⁻⁵ for the autoencoder, and 10⁻³
in float16, whatever the weights.  The limits leave room, because a fault shows as 10⁻² and more.  In the loop those
errors feed on themselves, by how much depends on the model, so that the limits of drift and picture are what the eye
cannot see, not what is usual.  A GPU's libraries choose among algorithms and may take TF32 for float32: there a
network has the limit that `sd-export build` sets for an engine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from sd_runtime.bundle.manifest import EnginePrecision

from ..networks.registry import PART
from .measures import Measure

AUTOENCODER = tuple(name for name, part in PART.items() if part == "vae")
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
NOISE = Limit("max_abs", 1e-5)  # equal to the bit where torch computes with AVX2; elsewhere it rounds otherwise


@dataclass(frozen=True)
class Limits:
    """Of one precision: relative errors of a network's output and of the latents in the loop, PSNR of the picture."""

    network: float
    drift: float
    picture: float


CPU: dict[EnginePrecision, Limits] = {"fp32": Limits(2e-5, 1e-3, 60.0), "fp16": Limits(3e-3, 1e-1, 25.0)}
GPU: dict[EnginePrecision, Limits] = {
    "fp32": Limits(1e-3, 1e-1, 30.0),
    "fp16": Limits(2e-2, 3e-1, 20.0),
    "bf16": Limits(1e-1, 5e-1, 15.0),
}


def network_limit(component: str, precision: EnginePrecision, cells: int, *, on_cpu: bool = True) -> Limit:
    """Of one call of a network on latents of so many cells.  In float32 the autoencoder's error grows with the side of
    the picture, for its normalisations add up ever more pixels."""
    value = (CPU if on_cpu else GPU)[precision].network
    if component in AUTOENCODER and precision == "fp32" and on_cpu:
        value *= math.sqrt(max(cells / AUTOENCODER_CELLS, 1))
    return Limit("relative", float(f"{value:.1e}"))


def drift_limit(precision: EnginePrecision, *, on_cpu: bool = True) -> Limit:
    """Of the latents after a step of the loop."""
    return Limit("relative", (CPU if on_cpu else GPU)[precision].drift)


def picture_limit(precision: EnginePrecision, *, on_cpu: bool = True) -> Limit:
    """Of the finished picture."""
    return Limit("psnr", (CPU if on_cpu else GPU)[precision].picture)
