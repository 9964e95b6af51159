"""Where engines are made: what building takes, whichever library does it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from sd_runtime.bundle.bundle import Bundle
from sd_runtime.bundle.manifest import EngineRecord, Manifest, Target

from .engine import Report
from .plan import BuildOptions, EngineBuild


@dataclass(frozen=True)
class Checked:
    """What was found out about an engine before it was accepted.

    how                as `EngineRecord.checked` has it
    activation_memory  bytes that a run takes at the largest shapes
    summary, remarks   for people
    """

    how: Literal["structure", "run", "compared"]
    activation_memory: int
    summary: str
    remarks: tuple[str, ...]


class Workshop(Protocol):
    """A library that builds engines, opened.

    title    its name for people
    version  "10.13.3.9"
    targets  what it builds for: for each of them every engine
    """

    title: str
    version: str

    @property
    def targets(self) -> Sequence[Target]: ...

    def needs(self, manifest: Manifest, builds: tuple[EngineBuild, ...]) -> str:
        """What building will take, to be said before it starts."""
        ...

    def make(self, bundle: Bundle, planned: EngineBuild, target: Target, report: Report) -> tuple[bytes, Checked]:
        """Build one engine and check it: its bytes, and what was found.  ExportError: it cannot be, or it is wrong."""
        ...

    def close(self) -> None: ...


def engine_record(manifest: Manifest, planned: EngineBuild, target: Target, options: BuildOptions) -> EngineRecord:
    """The engine's, but for what only building it tells: its path, the memory that it takes, how it was checked."""
    weights = manifest.components[planned.component].weights
    return EngineRecord(
        component=planned.component,
        form=planned.form,
        path="",
        precision=planned.precision,
        profile=planned.profile,
        target=target,
        graph=manifest.files[planned.graph.path].digest,
        weights=manifest.files[weights].digest if weights is not None else None,
        refittable=options.refittable,
        activation_memory=0,
    )
