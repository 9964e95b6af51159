"""The command that builds a bundle's engines again, and what it needs to know of those that are there."""

from __future__ import annotations

import shlex

from ...bundle.bundle import Bundle
from ...bundle.manifest import Manifest
from .engine import breadth

BUILT_SIDES = 64  # pixels: a side that engines are built for is a multiple
ALWAYS_INCLUDED = 512  # pixels: every dynamic engine takes this side and what lies between it and the sides asked for


def rebuild(bundle: Bundle, *, size: tuple[int, int] | None = None, fallback: bool = False) -> str:
    """The command that builds the engines of a bundle again, on the machine at hand.

    size: (width, height) of pictures that are to have one, too; fallback: the dynamic ones as well."""
    manifest = bundle.manifest
    records = [record for record in manifest.engines if record.component == "unet"]
    exact = [record.profile["sample"].opt for record in records if not breadth(record)]  # each (rows, C, h, w)
    pixels, usual = manifest.latent.pixels, (manifest.defaults.width, manifest.defaults.height)
    sizes = dict.fromkeys((width * pixels, height * pixels) for *_, height, width in exact) or {usual: None}
    if size is not None:
        sizes[(buildable(size[0]), buildable(size[1]))] = None
    batches = sorted({max(rows // rows_a_picture(manifest), 1) for rows, *_ in exact})
    parts = ["sd-export build", shlex.quote(str(bundle.root))]
    if list(sizes) != [usual]:
        parts += [f"--size {width}x{height}" for width, height in sizes]
    if batches not in ([], [1]):
        parts += [f"--batch {','.join(map(str, batches))}"]
    precisions = {record.precision for record in records} - {manifest.precision}
    parts += [f"--precision {precision}" for precision in sorted(precisions)[:1]]
    parts += ["--refittable"] if any(record.refittable for record in records) else []
    parts += ["--no-fallback"] if records and len(exact) == len(records) and not fallback else []
    return " ".join(parts)


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
