"""Whether a finished engine is as fast as it should be: next to earlier builds of the same, and to its siblings.

Engines differ from build to build, and one that was timed while something else used the GPU can be much slower.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from sd_runtime.bundle.manifest import EngineRecord
from sd_runtime.bundle.schema import to_json

if TYPE_CHECKING:
    from .plan import EngineBuild

SLOWER = 1.15  # times what was expected: beyond what one build differs from the next
FAR = 2.0  # times what was expected of another size, or of a dynamic engine
NOTICEABLE = 1.0  # milliseconds: shorter runs are starting, not computing
ANEW = "build it anew with --force, with the GPU to itself"


@dataclass(frozen=True)
class Timing:
    """How long an engine runs at the shapes that it is tuned for; `cells`: numbers in its first input, of all rows."""

    label: str
    cells: int
    exact: bool
    milliseconds: float

    @classmethod
    def of(cls, planned: EngineBuild, took: float) -> Timing:
        exact = all(allowed.min == allowed.max for allowed in planned.profile.values())
        return cls(planned.label, prod(planned.shapes[planned.graph.inputs[0].name]), exact, took)


def slower_than_before(record: EngineRecord, label: str, took: float, history: Path) -> str | None:
    """A remark if earlier builds from the same graph and weights, for the same shapes, were much faster; `history` is a
    JSON file that remembers the fastest, in milliseconds, on one GPU model and version of TensorRT."""
    try:
        known = json.loads(history.read_text())
    except (OSError, ValueError):
        known = {}
    known = known if isinstance(known, dict) else {}
    key = f"{label} {_identity(record)}"
    best = known.get(key)
    if not isinstance(best, float) or took < best:
        history.parent.mkdir(parents=True, exist_ok=True)
        history.write_text(json.dumps({**known, key: took}, indent=1))
    if isinstance(best, float) and took > max(SLOWER * best, NOTICEABLE):
        return f"{took:.1f} ms a run, where an earlier build took {best:.1f} ms: {ANEW}"
    return None


def _identity(record: EngineRecord) -> str:
    """A digest of what an engine's speed may depend on: the graph, the weights, the shapes, the options."""
    what = to_json(replace(record, path="", activation_memory=0))
    return hashlib.sha256(json.dumps({**what, "target": None}, sort_keys=True).encode()).hexdigest()[:16]


def slower_than_siblings(new: Timing, others: Iterable[Timing]) -> list[str]:
    """Remarks on engines of the same network, built just now, that take longer than one another makes one expect."""
    pairs = [pair for other in others for pair in ((new, other), (other, new))]
    slow = {one.label: (one, other) for one, other in pairs if one.milliseconds > max(allowed(one, other), NOTICEABLE)}
    return [
        f"{one.label} takes {one.milliseconds:.1f} ms a run, and {other.label} {other.milliseconds:.1f} ms for "
        f"{other.cells / one.cells:.2g} times the work: {ANEW}"
        for one, other in slow.values()
    ]


def allowed(one: Timing, other: Timing) -> float:
    """Milliseconds that `one` may take, going by `other`: an engine for exact shapes takes no longer than one that does
    as much or more; for a larger one, time grows somewhat faster than size, since attention's is quadratic."""
    scale = max(one.cells / other.cells, 1)
    return other.milliseconds * scale * (SLOWER if one.exact and scale == 1 else FAR)
