"""The export's own verification: the short form, on what is about to be published."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from sd_runtime.bundle.bundle import Bundle
from sd_runtime.bundle.manifest import Check, Verification
from sd_runtime.errors import ExportError, ParityError
from sd_runtime.request import Defaults

from ..signature import Sizes
from ..source import Checkpoint
from .compare import compare, open_pipeline
from .probe import short_probe
from .reference import Reference
from .torch_reference import make_reference


def free_memory() -> None:
    """Return freed memory to the system: glibc keeps gigabytes of what torch and ONNX graphs freed in pieces."""
    gc.collect()
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def store_reference(checkpoint: Checkpoint, components: Collection[str], defaults: Defaults, folder: Path) -> Reference:
    """Compute the short form's reference and write it into the bundle that is being made in `folder`.

    With one thread, so that the same checkpoint gives the same bytes whatever the number of cores."""
    steps = checkpoint.configs["scheduler"].get("num_train_timesteps", 1000)
    probe = short_probe(defaults, steps, Sizes.of(checkpoint.configs).pixels)
    free_memory()
    reference = make_reference(checkpoint, probe, components, threads=1)
    free_memory()
    reference.save(folder)
    return reference


def verify_bundle(folder: Path, reference: Reference) -> Verification:
    """Compare a finished bundle on the CPU.  ExportError names the first output that is beyond its limit."""
    with open_pipeline(Bundle.open(folder), "cpu") as pipeline:
        report = compare(pipeline, reference)
    try:
        report.raise_if_broken()
    except ParityError as error:
        remedy = "--no-verify exports it nevertheless; then sd-verify --bisect shows the layer"
        raise ExportError(error.what, got=error.got, accepted=error.accepted, remedy=remedy) from error
    return Verification(
        skipped=False,
        checks=tuple(Check(row.component, row.name, row.limit.kind, row.limit.value) for row in report.rows),
    )
