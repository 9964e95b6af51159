"""What a verification found: rows that each hold or break a limit, as a table for terminals and as JSON."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from sd_runtime.bundle.manifest import Precision
from sd_runtime.bundle.schema import to_json
from sd_runtime.errors import ParityError
from sd_runtime.tensor import Array

from .limits import Limit
from .measures import Measure
from .probe import Probe


@dataclass(frozen=True)
class Row:
    """One comparison.  `component` is a network, or "tokenizer", "noise", "loop", "picture"; `name` tells which."""

    component: str
    name: str
    measure: Measure
    limit: Limit

    @property
    def passed(self) -> bool:
        return self.limit.holds(self.measure)

    @property
    def title(self) -> str:
        return f"{self.component}, {self.name}" if self.name else self.component


@dataclass(frozen=True)
class LayerError:
    """How far the output of one layer is from torch's; `layer` is its module's path, `error` relative."""

    layer: str
    error: float


@dataclass(frozen=True)
class Drift:
    """Where in a network the drift starts: the first layer beyond the limit, and the errors of all, in their order.

    starts: None where no single layer is beyond the limit."""

    component: str
    case: str
    limit: float
    layers: tuple[LayerError, ...]

    @property
    def starts(self) -> str | None:
        return next((layer.layer for layer in self.layers if not layer.error <= self.limit), None)

    def __str__(self) -> str:
        """The layers around the one where it starts."""
        at = next((i for i, layer in enumerate(self.layers) if layer.layer == self.starts), None)
        if at is None:
            worst = max((layer.error for layer in self.layers), default=0.0)
            what = f"none of {len(self.layers)} layers is beyond {self.limit:.1e}; the worst is at {worst:.1e}"
            return f"{self.component}, {self.case}: {what}"
        lines = [f"{self.component}, {self.case}: the drift starts at {self.starts}"]
        for layer in self.layers[max(at - 2, 0) : at + 2]:
            mark = "→" if layer.layer == self.starts else " "
            lines.append(f"  {mark} {layer.error:9.1e}  {layer.layer}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Report:
    """A bundle against a reference.

    device     where the bundle's networks ran
    reference  where the reference is from, with the versions of its libraries
    seconds    stage → (ours, reference's or None), the fastest call of each
    pictures   the reference's and ours, (H, W, 3) float32 in [0, 1]; None where none was drawn
    """

    bundle: str
    source: str
    precision: Precision
    device: str
    reference: str
    probe: Probe
    rows: tuple[Row, ...]
    seconds: dict[str, tuple[float, float | None]] = field(default_factory=dict)
    pictures: tuple[Array, Array] | None = field(default=None, repr=False)
    drift: Drift | None = None

    @property
    def broken(self) -> tuple[Row, ...]:
        """The rows that are beyond their limits, in the order of the flow: the first is where to look."""
        return tuple(row for row in self.rows if not row.passed)

    @property
    def passed(self) -> bool:
        return not self.broken

    def raise_if_broken(self) -> None:
        """ParityError names the first comparison that failed, how many others did, and the layer if it is known."""
        if self.passed:
            return
        row, others = self.broken[0], len(self.broken) - 1
        more = f" (and {others} more comparison{'s' if others > 1 else ''})" if others else ""
        layer = f", from layer {self.drift.starts}" if self.drift is not None and self.drift.starts else ""
        got = "NaN or infinity" if not row.measure.finite else _got(row)
        raise ParityError(f"{row.title}{layer} differs from the reference{more}", got=got, accepted=str(row.limit))

    def table(self) -> str:
        """For a terminal, at most 100 columns wide."""
        head = f"{self.bundle} ({self.precision}, {self.device}) against {self.reference}"
        probe = self.probe
        what = (
            f"'{probe.prompt}', seed {probe.seed}, {probe.width} × {probe.height}, {probe.num_inference_steps} steps, "
            f"guidance {probe.guidance_scale:g}, {probe.scheduler or 'the model’s own sampler'}"
        )
        width = max(len(row.title) for row in self.rows)
        lines = [head, what, "", f"{'':{width}}  {'max abs':>9}{'relative':>10}{'cosine':>11}{'PSNR':>9}  limit"]
        for row in self.rows:
            m = row.measure
            numbers = f"{m.max_abs:>9.1e}{m.relative:>10.1e}{m.cosine:>11.7f}{_decibel(m.psnr):>9}"
            lines.append(f"{row.title:<{width}}  {numbers}  {row.limit}{'' if row.passed else '  BROKEN'}")
        lines += ["", self.summary]
        return "\n".join([*lines, *([] if self.drift is None else ["", str(self.drift)])])

    @property
    def summary(self) -> str:
        """One sentence."""
        if self.passed:
            return f"All {len(self.rows)} comparisons are within their limits."
        return (
            f"{len(self.broken)} of {len(self.rows)} comparisons are beyond their limits, first {self.broken[0].title}."
        )

    def to_json(self) -> dict[str, Any]:
        """All but the pictures; infinite numbers are null."""
        rows = [
            {
                "component": row.component,
                "name": row.name,
                **{key: finite(value) for key, value in dataclasses.asdict(row.measure).items()},
                "limit": {"kind": row.limit.kind, "value": row.limit.value},
                "passed": row.passed,
            }
            for row in self.rows
        ]
        drift = None if self.drift is None else to_json(self.drift) | {"starts": self.drift.starts}
        return {
            "bundle": self.bundle,
            "source": self.source,
            "precision": self.precision,
            "device": self.device,
            "reference": self.reference,
            "probe": to_json(self.probe),
            "passed": self.passed,
            "rows": rows,
            "seconds": {name: {"ours": ours, "reference": theirs} for name, (ours, theirs) in self.seconds.items()},
            "drift": drift,
        }


def finite(value: float) -> float | None:
    """JSON has no infinity: the PSNR of equal tensors is null."""
    return value if math.isfinite(value) else None


def _decibel(value: float) -> str:
    return "equal" if value == math.inf else f"{value:.1f} dB"


def _got(row: Row) -> str:
    value: float = getattr(row.measure, row.limit.kind)
    return _decibel(value) if row.limit.kind == "psnr" else f"{row.limit.kind} {value:.1e}"
