"""The command that builds a bundle's engines again, and what it needs to know of those that are there."""

from __future__ import annotations

import shlex

from ...bundle.bundle import Bundle
from ...bundle.manifest import EngineLibrary, EngineRecord, Manifest

BUILT_SIDES = 64  # pixels: a side that engines are built for is a multiple
ALWAYS_INCLUDED = 512  # pixels: every dynamic engine takes this side and what lies between it and the sides asked for


def rebuild(
    bundle: Bundle,
    library: EngineLibrary = "tensorrt",
    *,
    size: tuple[int, int] | None = None,
    fallback: bool = False,
) -> str:
    """The command that builds a library's engines of a bundle again, on the machine at hand.

    size: (width, height) of pictures that are to have one, too; fallback: the dynamic ones as well."""
    manifest = bundle.manifest
    built = [record for record in manifest.engines if record.target.library == library]
    records = [record for record in built if record.component == "unet"]
    exact = [record.profile["sample"].max for record in records if one_size(record)]  # each (rows, C, h, w)
    pixels, usual = manifest.latent.pixels, (manifest.defaults.width, manifest.defaults.height)
    sizes = dict.fromkeys((width * pixels, height * pixels) for *_, height, width in exact) or {usual: None}
    if size is not None:
        sizes[(buildable(size[0]), buildable(size[1]))] = None
    portable = library == "tensorrt_rtx"
    a_picture = 2 if portable and not takes_guidance(manifest) else rows_a_picture(manifest)
    batches = sorted({max(rows // a_picture, 1) for rows, *_ in exact})
    parts = ["sd-export build", shlex.quote(str(bundle.root))]
    parts += ["--for rtx"] if portable else []
    parts += ["--turing"] if any("7.5" in record.target.serves for record in built) else []
    if list(sizes) != [usual]:
        parts += [f"--size {width}x{height}" for width, height in sizes]
    if batches not in ([], [1]):
        parts += [f"--batch {','.join(map(str, batches))}"]
    precisions = {record.precision for record in records} - {manifest.precision}
    parts += [f"--precision {precision}" for precision in sorted(precisions)[:1]]
    parts += ["--refittable"] if any(record.refittable for record in records) else []
    only_exact = bool(records) and len(exact) == len(records)
    if portable:  # whose default is to have none
        parts += ["--fallback"] if records and (fallback or not only_exact) else []
    else:
        parts += ["--no-fallback"] if only_exact and not fallback else []
    return " ".join(parts)


def one_size(record: EngineRecord) -> bool:
    """Whether an engine of the UNet is for pictures of one size, of however many rows."""
    allowed = record.profile["sample"]
    return allowed.min[1:] == allowed.max[1:]


def buildable(side: int) -> int:
    """The nearest side in pixels that engines are built for whose dynamic engine also takes `side`."""
    down = side - side % BUILT_SIDES
    return down if side == down or side < ALWAYS_INCLUDED else down + BUILT_SIDES


def rows_a_picture(manifest: Manifest) -> int:
    """Rows of the UNet's batch for a picture, where the model is used as recommended: two with guidance; one without,
    or where the network takes the guidance scale as an input."""
    return 1 if takes_guidance(manifest) or manifest.defaults.guidance_scale <= 1 else 2


def takes_guidance(manifest: Manifest) -> bool:
    """Whether the UNet takes the guidance scale as an input, so that a picture never has two rows."""
    known = manifest.components.get("unet")
    return known is not None and any(spec.name == "timestep_cond" for spec in known.graph().inputs)
