"""How far two tensors are apart, in the four measures that people ask for."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from sd_runtime.tensor import Array


@dataclass(frozen=True)
class Measure:
    """The distance of a tensor from its reference, all computed in float64.

    max_abs   the largest difference of two elements, in the tensor's own unit
    relative  ‖ours − reference‖₂ / ‖reference‖₂
    cosine    of the angle between the two as vectors; 1 is the same direction
    psnr      10 log₁₀(range² / mean squared difference) in dB; infinite where they are equal
    """

    max_abs: float
    relative: float
    cosine: float
    psnr: float

    @property
    def finite(self) -> bool:
        """Whether there was no NaN and no infinity in either tensor."""
        return math.isfinite(self.max_abs)


NOT_FINITE = Measure(math.nan, math.nan, math.nan, math.nan)


def measure(ours: Array, reference: Array, span: float | None = None) -> Measure:
    """Compare two tensors of one shape; `span` is the range that PSNR refers to, by default the reference's own.

    A NaN or infinity anywhere makes every measure NaN, which is within no limit."""
    if ours.shape != reference.shape or not (np.isfinite(ours).all() and np.isfinite(reference).all()):
        return NOT_FINITE
    a, b = ours.astype(np.float64).ravel(), reference.astype(np.float64).ravel()
    difference = a - b
    error, length, own = (float(np.linalg.norm(x)) for x in (difference, b, a))
    span = float(np.ptp(b)) if span is None else span
    return Measure(
        max_abs=float(np.abs(difference).max(initial=0.0)),
        relative=_ratio(error, length),
        cosine=min(float(a @ b) / (own * length), 1.0) if own and length else float(own == length),
        psnr=20 * math.log10(_ratio(span * math.sqrt(a.size), error)) if span and error else _at_limit(error),
    )


def _ratio(a: float, b: float) -> float:
    """a / b with 0 / 0 = 0."""
    return a / b if b else (0.0 if a == 0 else math.inf)


def _at_limit(error: float) -> float:
    """The PSNR of equal tensors, and of ones that differ from a constant."""
    return math.inf if error == 0 else -math.inf
