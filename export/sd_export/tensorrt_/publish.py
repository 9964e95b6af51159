"""Putting a finished engine into a bundle so that, whenever this is interrupted, the bundle is whole.

No file that a manifest names is ever written over: every engine has a file name of its own, with a digest of its
content.  First the engine is on the disk, then the manifest that names it, then what no record names any more goes.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from pathlib import Path, PurePosixPath

from sd_runtime.bundle.manifest import MANIFEST, EngineRecord, Manifest, Target, record_file

from ..pack import write_synced


def engine_path(target: Target, label: str, plan: bytes) -> str:
    """Where an engine goes in a bundle: "engines/nvidia-h200-trt10.13.3/unet-512x512-batch-1.0123456789ab.plan", or
    "engines/sm80-rtx1.7.1/…" where it is not for one GPU model."""
    digest = hashlib.sha256(plan).hexdigest()[:12]
    place = f"sm{target.compute_capability.replace('.', '')} rtx" if target.serves else f"{target.gpu} trt"
    return f"engines/{slug(place + target.tensorrt)}/{slug(label)}.{digest}.plan"


def publish(root: Path, record: EngineRecord, plan: bytes) -> None:
    """Put an engine into the bundle in `root`, in place of those that it supersedes."""
    manifest = Manifest.from_bytes((root / MANIFEST).read_bytes())
    write_synced(root / record.path, plan)
    kept = tuple(known for known in manifest.engines if not supersedes(record, known, manifest))
    gone = {known.path for known in manifest.engines} - {known.path for known in kept}
    files = {name: file for name, file in manifest.files.items() if name not in gone}
    files[record.path] = record_file(root / record.path)
    manifest = replace(manifest, files=dict(sorted(files.items())), engines=(*kept, record))
    write_synced(root / MANIFEST, manifest.to_bytes())
    remove_unnamed(root, manifest)


def supersedes(new: EngineRecord, old: EngineRecord, manifest: Manifest) -> bool:
    """Whether an engine takes another's place: it is for the same shapes; or for the same component on the same
    machine, where the other has another precision, or was made from weights or a graph that the bundle has no more."""
    if slot(new.path) == slot(old.path):
        return True
    if (new.component, new.target) != (old.component, old.target) or new.weights is None:
        return False
    graph = manifest.components[old.component].graphs.get(old.form)
    gone = graph is None or manifest.files[graph.path].digest != old.graph
    return gone or (new.precision, new.weights) != (old.precision, old.weights)


def slot(path: str) -> tuple[PurePosixPath, str]:
    """What an engine's path says of its purpose: the machine's folder, and the label without the digest."""
    pure = PurePosixPath(path)
    return pure.parent, pure.name.partition(".")[0]


def remove_unnamed(root: Path, manifest: Manifest) -> None:
    """Delete engines that the manifest does not name: superseded, or left by a build that was killed."""
    for path in (*root.glob("engines/*/*.plan"), *root.glob("engines/*/.*.partial")):
        if path.relative_to(root).as_posix() not in manifest.files:
            path.unlink(missing_ok=True)


def slug(text: str) -> str:
    """`text` as part of a file name: "NVIDIA H200 trt10.13.3" → "nvidia-h200-trt10.13.3"."""
    return re.sub(r"[^a-z0-9._]+", "-", text.lower()).strip("-")
