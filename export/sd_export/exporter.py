"""export(): checkpoint → networks → ONNX graphs and weights → a bundle, published as a whole.

The settings that the checkpoint's authors recommend are `_defaults` in its model_index.json, an object like
{"num_inference_steps": 25, "guidance_scale": 2.5, "height": 128, "width": 128}; diffusers ignores names that start with
an underscore.  Without `_defaults`, steps and guidance are those of the checkpoint's family, and the size is that of
its training.
`_preview` likewise is the matrix that guesses colours from latents (see `sd_runtime.images.preview`;
scripts/fit_preview.py makes one), for latents that are not Stable Diffusion's.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from sd_runtime.bundle.locations import bundle_home
from sd_runtime.bundle.manifest import (
    MANIFEST,
    Component,
    Latent,
    Manifest,
    Source,
    Verification,
    record_file,
)
from sd_runtime.bundle.schema import from_json
from sd_runtime.engines.onnxruntime_.installation import check_loadable, installations
from sd_runtime.errors import BundleError, DependencyError, ExportError, UsageError, one_line
from sd_runtime.request import Defaults, make_request
from sd_runtime.sampling import SchedulerConfig, make_plan

from . import pack
from .card import CARD, make_card, read_license
from .layout import SCHEDULER, json_bytes, write_configs
from .networks.registry import REGISTRY
from .options import ExportOptions
from .progress import Progress
from .signature import MAX_CELLS, MIN_CELLS, Sizes
from .source import Checkpoint, resolve_checkpoint, with_taesd, with_vae
from .source.checkpoint import SAFETY_CHECKER
from .verify.reference import TENSORS, Reference

LIBRARIES = ("torch", "diffusers", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors", "filelock")
VERSIONS = ("sd-lean", "torch", "diffusers", "transformers", "onnx", "onnxscript", "onnx-ir")  # they shape the graphs
STAGES_PER_COMPONENT = 4


def export(options: ExportOptions, *, quiet: bool = True) -> Path:
    """Export a checkpoint and return the bundle's folder.  The whole flow:

        model → Checkpoint → for each component: module → traced graph (→ float16) → .onnx + .safetensors → checked
              → configs, tokenizer, manifest → compared with torch → synced and renamed into place

    A complete bundle of the same checkpoint, precision and components is left as it is.  ExportError, UsageError and
    DependencyError say what is in the way; then nothing has changed at the target."""
    _require_libraries()
    with Progress(1, quiet=quiet) as progress:
        with progress.stage("checkpoint"):
            checkpoint = _resolve(options, quiet=quiet)
            latent, defaults = _latent(checkpoint), _defaults(checkpoint)
        progress.say(f"{checkpoint.name} is {checkpoint.family.phrase}")
        names = _components(options, checkpoint)
        progress.expect(1 + 2 * options.verify + STAGES_PER_COMPONENT * len(names))
        target = (options.output or bundle_home() / checkpoint.name).expanduser().resolve()
        with pack.locked(target, progress.note):
            if _is_current(target, options, names, checkpoint):
                progress.note(f"{target} is up to date")
                return target
            _refuse_to_overwrite(target, force=options.force)
            with pack.staged(target) as folder:
                components = _export_components(names, options, checkpoint, folder, progress)
                reference = _store_reference(names, checkpoint, defaults, folder, progress) if options.verify else None
                with progress.stage("pack"):
                    write_configs(checkpoint, names, folder)
                    manifest = _manifest(options, checkpoint, latent, defaults, components, folder)
                    (folder / MANIFEST).write_bytes(manifest.to_bytes())
                if reference is not None:
                    manifest = replace(manifest, verification=_verify(folder, reference, progress))
                    (folder / MANIFEST).write_bytes(manifest.to_bytes())
                (folder / CARD).write_text(make_card(manifest, checkpoint, _license(checkpoint)), encoding="utf-8")
    return target


def _resolve(options: ExportOptions, *, quiet: bool) -> Checkpoint:
    """The checkpoint, with the parts from elsewhere that were asked for."""
    wanted = options.components is None or SAFETY_CHECKER in options.components
    checkpoint = resolve_checkpoint(
        options.model,
        revision=options.revision,
        safety_checker=wanted,
        own_vae=options.vae is None,
        prediction_type=options.prediction_type,
        allow_pickle=options.allow_pickle,
        quiet=quiet,
    )
    if options.vae is not None:
        checkpoint = with_vae(checkpoint, options.vae, quiet=quiet)
    if options.taesd is not None:
        checkpoint = with_taesd(checkpoint, options.taesd, quiet=quiet)
    return checkpoint


def _license(checkpoint: Checkpoint) -> str | None:
    """As the card beside the checkpoint's configs gives it."""
    first = checkpoint.weights["unet"][0]
    return read_license(first.parent.parent if "unet" not in checkpoint.prefixes else first.parent)


def _components(options: ExportOptions, checkpoint: Checkpoint) -> tuple[str, ...]:
    """What to export, in the order of the flow: all that there is, or what was asked for."""
    present = [entry for entry in REGISTRY if entry.part in checkpoint.weights]
    if options.components is None:
        return tuple(entry.name for entry in present)
    for name in options.components:
        if name not in {entry.name for entry in present}:
            what = f"model '{checkpoint.id}' has no {name.replace('_', ' ')}"
            raise ExportError(what, got=f"components {','.join(options.components)}")
    return tuple(entry.name for entry in present if entry.name in options.components or not entry.selectable)


def _require_libraries() -> None:
    """Fail before anything is downloaded if the export extra, or an ONNX Runtime to check graphs with, is not there."""
    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        extras = "export" if installations() else "export,cpu"  # cpu would hide a build for GPUs
        raise DependencyError(f"sd-export needs {', '.join(missing)}", remedy=f'pip install "sd-lean[{extras}]"')
    check_loadable()


def _export_components(
    names: tuple[str, ...], options: ExportOptions, checkpoint: Checkpoint, folder: Path, progress: Progress
) -> dict[str, Component]:
    from .networks.export import export_loop, export_network  # imports torch: only once there is something to trace

    networks = {name: export_network(name, checkpoint, options.precision, folder, progress) for name in names}
    return networks | export_loop(checkpoint, names, folder)


def _store_reference(
    names: tuple[str, ...], checkpoint: Checkpoint, defaults: Defaults, folder: Path, progress: Progress
) -> Reference:
    from .verify.export_check import store_reference

    with progress.stage("reference", folder / TENSORS):
        return store_reference(checkpoint, names, defaults, folder)


def _verify(folder: Path, reference: Reference, progress: Progress) -> Verification:
    from .verify.export_check import verify_bundle

    with progress.stage("verify"):
        return verify_bundle(folder, reference)


def _is_current(target: Path, options: ExportOptions, names: tuple[str, ...], checkpoint: Checkpoint) -> bool:
    """Whether `target` is already what the options ask for, made by these versions, and no file of it is damaged."""
    try:
        manifest = Manifest.from_bytes((target / MANIFEST).read_bytes())
    except (OSError, BundleError):
        return False
    return (
        manifest.source.files == dict(checkpoint.files)
        and {name: part.files for name, part in manifest.parts.items()} == _part_files(checkpoint)
        and manifest.precision == options.precision
        and (target / SCHEDULER).is_file()
        and (target / SCHEDULER).read_bytes() == json_bytes(checkpoint.configs["scheduler"])
        and {n for n, c in manifest.components.items() if c.weights is not None} == set(names)
        and manifest.exporter == _exporter()
        and (not options.verify or (manifest.verification is not None and not manifest.verification.skipped))
        and all((target / n).is_file() and record_file(target / n) == f for n, f in manifest.files.items())
    )


def _part_files(checkpoint: Checkpoint) -> dict[str, dict[str, str]]:
    return {name: part.files for name, part in checkpoint.parts.items()}


def _refuse_to_overwrite(target: Path, *, force: bool) -> None:
    """Only a bundle is ever replaced, and only on request; an empty folder is taken."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    try:
        found = json.loads((target / MANIFEST).read_bytes())
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict) or "schema_version" not in found:
        raise ExportError(
            f"{target} exists and is not a bundle", remedy="remove it or choose another place with --output"
        )
    if not force:
        source = found.get("source")
        got = f"a {found.get('precision')} bundle of {source.get('id') if isinstance(source, dict) else None}"
        remedy = "replace it with --force, or choose another place with --output"
        raise ExportError(f"{target} exists", got=got, remedy=remedy)


def _manifest(
    options: ExportOptions,
    checkpoint: Checkpoint,
    latent: Latent,
    defaults: Defaults,
    components: dict[str, Component],
    folder: Path,
) -> Manifest:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    origin = checkpoint.id if checkpoint.revision is not None else checkpoint.name  # not where it lies on this machine
    return Manifest(
        name=checkpoint.name,
        source=Source(origin, checkpoint.revision, dict(sorted(checkpoint.files.items()))),
        parts=dict(sorted(checkpoint.parts.items())),
        precision=options.precision,
        latent=latent,
        defaults=defaults,
        components=components,
        files={path.relative_to(folder).as_posix(): record_file(path) for path in files},
        exporter=_exporter(),
        verification=None if options.verify else Verification(skipped=True),
    )


def _latent(checkpoint: Checkpoint) -> Latent:
    """The latent space; ExportError if the VAE's scaling factor or the matrix for previews cannot be."""
    sizes, factor = Sizes.of(checkpoint.configs), checkpoint.configs["vae"].get("scaling_factor", 0.18215)
    if type(factor) not in (int, float) or not 0 < factor < math.inf:
        raise ExportError("vae/config.json: scaling_factor", got=repr(factor), accepted="a positive number")
    with _as_export_error(checkpoint):
        return Latent(sizes.channels, sizes.pixels, factor, _preview(checkpoint.model_index.get("_preview")))


def _defaults(checkpoint: Checkpoint) -> Defaults:
    """The recommended settings; see the top of this module.  ExportError if nothing could be drawn with them."""
    sizes, recommended = Sizes.of(checkpoint.configs), checkpoint.model_index.get("_defaults")
    side, family = sizes.cells * sizes.pixels, checkpoint.family
    usual = {
        "num_inference_steps": family.steps,
        "guidance_scale": family.guidance_scale,
        "height": side,
        "width": side,
    }
    with _as_export_error(checkpoint):
        defaults = from_json(Defaults, usual if recommended is None else recommended, "defaults")
        make_request(defaults, "")
        make_plan(SchedulerConfig.from_dict(checkpoint.configs["scheduler"]), defaults.num_inference_steps)
        low, high = MIN_CELLS * sizes.pixels, MAX_CELLS * sizes.pixels
        for name, length in (("height", defaults.height), ("width", defaults.width)):
            if length % sizes.pixels or not low <= length <= high:
                accepted = f"multiples of {sizes.pixels} from {low} to {high}"
                raise UsageError(f"defaults.{name}", got=length, accepted=accepted)
    return defaults


@contextmanager
def _as_export_error(checkpoint: Checkpoint) -> Iterator[None]:
    """Turn the runtime's complaint about the bundle into an ExportError about the checkpoint."""
    try:
        yield
    except (BundleError, UsageError) as error:
        what = f"model '{one_line(checkpoint.id)}': {error.what.removeprefix(f'{MANIFEST}: ')}"
        raise ExportError(what, got=error.got, accepted=error.accepted) from error


def _preview(rows: Any) -> tuple[tuple[float, ...], ...] | None:
    """The matrix for previews; see the top of this module."""
    if rows is None:
        return None
    try:
        matrix = tuple(tuple(float(number) for number in row) for row in rows)
    except (TypeError, ValueError):
        matrix = ()
    if {len(row) for row in matrix} != {3}:
        raise ExportError("model_index.json: _preview", got=rows, accepted="a list of rows of three numbers")
    return matrix


def _exporter() -> dict[str, str]:
    """The versions of what makes the graphs; another set may give other bytes."""
    return {name: _version(name) for name in VERSIONS}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
