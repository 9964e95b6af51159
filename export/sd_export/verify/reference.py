"""A reference: the inputs of a probe and what torch makes of them, and how it is stored in a bundle.

reference/reference.json          the probe, the cases, the versions of the libraries
reference/reference.safetensors   the tensors
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sd_runtime.bundle.bundle import Bundle
from sd_runtime.bundle.schema import from_json, parse_json, to_json
from sd_runtime.errors import BundleError
from sd_runtime.tensor import Array

from .probe import Probe

FOLDER = "reference"
JSON, TENSORS = f"{FOLDER}/reference.json", f"{FOLDER}/reference.safetensors"

# Tensors that belong to no network:
TOKENS = "input_ids"  # (texts, 77) int64
NOISE = "noise"  # (1, C, h, w) float32, the seed's first
LATENTS = "latents"  # (E, 1, C, h, w) float32, the UNet's next input after each evaluation; the last are the picture's
PICTURE = "picture"  # (1, H, W, 3) float32 in [0, 1]


@dataclass(frozen=True)
class Case:
    """One call of one network; the values of `feeds`, and `expected`, name tensors of the reference.

    name    for people: which of the network's calls
    output  the output that is compared
    """

    component: str
    name: str
    feeds: dict[str, str]
    output: str
    expected: str


@dataclass(frozen=True)
class _Document:
    """reference.json."""

    probe: Probe
    texts: tuple[str, ...]
    cases: tuple[Case, ...]
    libraries: dict[str, str]


@dataclass(frozen=True)
class Reference:
    """What torch computes for a probe.

    texts      whose token ids are compared
    cases      the calls of single networks, in the order of the flow
    tensors    by name
    libraries  what computed them, name → version
    origin     for people: where this reference is from
    seconds    of the fastest call of each network and of the picture; empty where it was read from a bundle
    """

    probe: Probe
    texts: tuple[str, ...]
    cases: tuple[Case, ...]
    tensors: Mapping[str, Array]
    libraries: dict[str, str]
    origin: str
    seconds: dict[str, float] = field(default_factory=dict)

    def feeds(self, case: Case) -> dict[str, Array]:
        """The inputs of a call."""
        return {name: self.tensors[tensor] for name, tensor in case.feeds.items()}

    def save(self, bundle: Path) -> None:
        """Write both files below `bundle`, a folder that is being exported to."""
        from safetensors.numpy import save  # save_file would make a file that nobody else may read

        (bundle / FOLDER).mkdir()
        document = to_json(_Document(self.probe, self.texts, self.cases, self.libraries))
        (bundle / JSON).write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        (bundle / TENSORS).write_bytes(save(dict(self.tensors)))

    @classmethod
    def load(cls, bundle: Bundle) -> Reference:
        """What the export stored.  BundleError: it stored none, or what lies there is damaged."""
        if JSON not in bundle.manifest.files:
            raise BundleError(
                f"bundle {bundle.root.name} holds no reference tensors",
                remedy="name the checkpoint with --against MODEL, or export the bundle again",
            )
        document = from_json(_Document, parse_json(bundle.read(JSON), JSON), JSON)
        tensors = bundle.tensors(TENSORS)
        named = {name for case in document.cases for name in (*case.feeds.values(), case.expected)}
        if missing := sorted(named - set(tensors)):
            raise BundleError(f"{TENSORS}: missing", got=", ".join(missing))
        origin = "tensors that the export stored in the bundle"
        return cls(document.probe, document.texts, document.cases, tensors, document.libraries, origin)
