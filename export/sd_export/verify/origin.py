"""Finds the checkpoint that a bundle was made from, and says how another differs from it."""

from __future__ import annotations

from pathlib import Path

from sd_runtime.bundle.manifest import Manifest, Source
from sd_runtime.errors import ExportError, SDError

from ..choices import PredictionType
from ..source import Checkpoint, resolve_checkpoint, with_taesd, with_vae
from ..source.checkpoint import SAFETY_CHECKER, TAESD
from ..source.resolve import DEMO

INDEX_FILES = ("model_index.json", "vae/config.json", "config.json")  # every repository has one of these


def open_checkpoint(model: str, manifest: Manifest, prediction_type: PredictionType | None = None) -> Checkpoint:
    """`model`, as sd-export takes it, with the parts that the bundle has from elsewhere.

    prediction_type: the bundle's, which a single file need not tell.

    ExportError: one of those is not on this machine."""
    wanted = SAFETY_CHECKER in manifest.components
    single = Path(model).is_file()
    checkpoint = resolve_checkpoint(
        model,
        safety_checker=wanted,
        own_vae="vae" not in manifest.parts,
        prediction_type=prediction_type if single else None,
        quiet=True,
    )
    for part, add in (("vae", with_vae), (TAESD, with_taesd)):
        if (source := manifest.parts.get(part)) is not None:
            place = find(source)
            if place is None:
                raise ExportError(f"the bundle's {part} is from '{source.id}', which is not here")
            checkpoint = add(checkpoint, place, quiet=True)
    return checkpoint


def find_source(manifest: Manifest) -> Checkpoint | None:
    """The very files that a bundle was made from, if they are where the package keeps the demo or in the hub's cache.

    Nothing is downloaded; where a folder or a file lay, the manifest does not say."""
    place = find(manifest.source)
    if place is None:
        return None
    try:
        checkpoint = open_checkpoint(place, manifest)
    except SDError:
        return None
    return None if difference(checkpoint, manifest) else checkpoint


def find(source: Source) -> str | None:
    """A name under which `resolve_checkpoint` and its like find a source without asking the network."""
    if source.id == DEMO:
        return DEMO
    if source.revision is None:
        return None
    from huggingface_hub import try_to_load_from_cache

    for name in INDEX_FILES:
        path = try_to_load_from_cache(source.id, name, revision=source.revision)
        if isinstance(path, str):
            return str(Path(path).parents[name.count("/")])
    return None


def difference(checkpoint: Checkpoint, manifest: Manifest) -> str | None:
    """Which files of a checkpoint are not those that a bundle was made from, for people; None if all are."""
    other = [name for name, digest in manifest.source.files.items() if checkpoint.files.get(name) != digest]
    if not other:
        return None
    more = f" and {len(other) - 3} more" if len(other) > 3 else ""
    return f"{checkpoint.id} is not what the bundle was made from: {', '.join(sorted(other)[:3])}{more}"
