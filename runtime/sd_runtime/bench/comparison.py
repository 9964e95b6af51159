"""A bundle beside diffusers on the same machine, settings and seed, in turns, so that a slow minute hits both."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BundleError, DependencyError, SDError
from .distribution import Distribution
from .machine import physical_cores
from .processes import Cost, run

if TYPE_CHECKING:
    from ..bundle.manifest import Manifest
    from ..request import Request

PEER = [sys.executable, "-m", "sd_runtime.bench.peer"]
LIBRARIES = ("torch", "diffusers", "transformers")


@dataclass(frozen=True)
class Compared:
    """One quantity on both sides, medians; `ratio` is the peer's by ours: above 1 ours is the better."""

    name: str
    unit: str
    ours: float
    peer: float

    @property
    def ratio(self) -> float:
        return self.peer / self.ours


def require_peer() -> None:
    """DependencyError if the peer's libraries are not in this environment; it imports none of them."""
    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise DependencyError(f"--against diffusers needs {', '.join(missing)}", remedy='pip install "sd-lean[export]"')


def find_checkpoint(named: str | None, manifest: Manifest) -> str:
    """What the peer loads: what was named, or what the bundle was made from if that can be told.

    BundleError: it was a folder or a file, whose place a bundle does not keep."""
    source = manifest.source
    if named is not None or source.revision is not None:
        return named or source.id
    package = importlib.util.find_spec("sd_export")
    if source.id == "demo" and package is not None and package.submodule_search_locations:
        return str(Path(package.submodule_search_locations[0], "demo_checkpoint"))
    raise BundleError("where the bundle's checkpoint lies is not known", remedy="name it with --checkpoint MODEL")


def peer_settings(request: Request, checkpoint: str, manifest: Manifest, device: str) -> dict[str, Any]:
    """What the peer is told: `request` in diffusers' words."""
    from ..sampling import resolve

    scheduler = None if request.scheduler is None else resolve(request.scheduler)
    return {
        "model": checkpoint,
        "device": device,
        "precision": manifest.precision,
        "threads": physical_cores(),
        "prompt": request.prompts[0],
        "negative_prompt": request.negative_prompts[0] or None,
        "seed": request.seeds[0],
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "height": request.height,
        "width": request.width,
        "scheduler": scheduler and {"class_name": scheduler.reference_class(), "overrides": scheduler.overrides},
    }


def environment(settings: dict[str, Any]) -> dict[str, str]:
    """Of the peer's process: as many threads as ours has, the hub's files from the cache if they are there."""
    return os.environ | {"OMP_NUM_THREADS": str(settings["threads"]), "PYTHONWARNINGS": "ignore"}


def cold_peer(settings: dict[str, Any], picture: Path) -> Cost:
    """A new process from its start to its picture on disk."""
    return run([*PEER, json.dumps(settings), picture], environment(settings))


@contextmanager
def warm_peer(settings: dict[str, Any]) -> Iterator[Callable[[str, int], dict[str, Any]]]:
    """A process that keeps its model loaded; draw(prompt, seed) → seconds of the picture and of its steps."""
    with subprocess.Popen(
        [*PEER, json.dumps(settings)], env=environment(settings), text=True, bufsize=1,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        to_peer, from_peer = process.stdin, process.stdout

        def draw(prompt: str, seed: int) -> dict[str, Any]:
            to_peer.write(json.dumps({"prompt": prompt, "seed": seed}) + "\n")
            answer = from_peer.readline()
            if not answer:
                raise SDError("diffusers' process ended before it had drawn")
            times: dict[str, Any] = json.loads(answer)
            return times

        try:
            yield draw
        finally:
            to_peer.close()


def compared(name: str, unit: str, ours: Sequence[float], peer: Sequence[float]) -> Compared:
    """Medians of both sides."""
    return Compared(name, unit, Distribution.of(ours).p50, Distribution.of(peer).p50)
