"""MODEL as the user typed it → Checkpoint: `demo`, a folder, a .safetensors file or, last, an id on the hub."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from sd_runtime.errors import UsageError

from . import hub, single_file, tokenizer
from .checkpoint import NETWORKS, Checkpoint, explain_read_errors, hash_files
from .families import recognise, sd1
from .families.check import check_networks
from .folder import PICKLES, PipelineFiles, list_names, read_configs, refuse_pickle, weight_names
from .header import tensor_shapes

DEMO = "demo"
DEMO_FOLDER = Path(__file__).parent.parent / "demo_checkpoint"
# The hub's own rules: letters, digits, _ - . with no -- or .. and neither - nor . at an end.
HUB_ID = re.compile(r"(?!.*(--|\.\.|\.git$))\w([\w.-]*\w)?/\w([\w.-]{0,94}\w)?", re.ASCII)
ACCEPTED = "demo, a folder in diffusers layout, a .safetensors file, or a hub id such as owner/name"


@explain_read_errors()
def resolve_checkpoint(
    model: str,
    *,
    revision: str | None = None,
    safety_checker: bool = True,
    own_vae: bool = True,
    quiet: bool = False,
) -> Checkpoint:
    """Find `model`, fetch it if it is on the hub, check it and hash it.

    `revision` (a branch, tag or commit) is for hub ids only; `safety_checker`: use one if the model has it; without
    `own_vae` a single file need hold no VAE, and `with_vae` must follow.  Downloads draw progress bars on a terminal,
    unless `quiet`; notices go to this package's logger.  UsageError if `model` cannot be any kind of model;
    ExportError if it is missing, damaged, a pickle, or of a kind that is not supported.
    """
    path = DEMO_FOLDER if model == DEMO else existing_path("model", model, ACCEPTED)
    if path is None:
        if revision == "":
            raise UsageError("revision", got=revision, accepted="a branch, tag or commit")
        snapshot = fetch(model, revision, PipelineFiles(safety_checker), quiet=quiet)
        return _from_folder(model, snapshot.folder, safety_checker, snapshot)
    if revision is not None:
        raise UsageError("revision", got=revision, accepted="only together with a hub id")
    if path.is_dir():
        return _from_folder(model, path, safety_checker)
    return _from_file(model, path, own_vae)


def existing_path(field: str, model: str, accepted: str) -> Path | None:
    """The file or folder that `model`, the value of `field`, names, or None if it can only be a hub id."""
    try:
        path = Path(model).expanduser()
        if model and path.exists():
            return path.resolve()
        if HUB_ID.fullmatch(model) and path.suffix.lower() not in (".safetensors", *PICKLES):
            return None
    except PermissionError:  # a folder on the way, which is no reason to say that nothing is there
        raise
    except (OSError, ValueError, RuntimeError):  # too long, NUL or lone surrogates, unknown ~user
        pass
    raise UsageError(field, got=model, accepted=accepted, remedy="there is no such file or folder")


def fetch(model: str, revision: str | None, selection: hub.Selection, *, quiet: bool) -> hub.Snapshot:
    """The files of a hub id; progress bars only on a terminal."""
    if quiet or not sys.stderr.isatty():
        hub.hide_progress_bars()
    return hub.snapshot(model, revision, selection)


def _from_folder(model: str, folder: Path, safety_checker: bool, snapshot: hub.Snapshot | None = None) -> Checkpoint:
    """A checkpoint in diffusers layout, the user's own folder or a `snapshot` in the hub's cache."""
    found = read_configs(model, folder, safety_checker=safety_checker)
    weights = weight_names(model, list_names(folder), found.networks)
    files = hash_files(folder, [*found.names, *weights.values()])
    if snapshot is not None:
        files = hub.repair(snapshot, files)
    for name in weights.values():
        tensor_shapes(folder / name)
    name = model.split("/")[-1] if snapshot or model == DEMO else folder.name or "model"
    return Checkpoint(
        id=model,
        name=name,
        revision=snapshot.commit if snapshot else None,
        family=recognise(name, found.configs),
        model_index=found.model_index,
        configs=found.configs,
        weights={network: folder / name for network, name in weights.items()},
        tokenizer=found.tokenizer,
        files=files,
    )


def _from_file(model: str, path: Path, own_vae: bool) -> Checkpoint:
    """A single-file checkpoint with the keys of Stable Diffusion 1.x."""
    if path.suffix.lower() in PICKLES:
        raise refuse_pickle(path.name)
    if path.suffix.lower() != ".safetensors":
        raise UsageError("model", got=model, accepted=ACCEPTED)
    shapes = tensor_shapes(path)
    configs = single_file.infer_configs(model, shapes, own_vae=own_vae)
    networks = [part for part in NETWORKS if any(name.startswith(single_file.PREFIXES[part]) for name in shapes)]
    check_networks(model, configs)
    return Checkpoint(
        id=model,
        name=path.stem,
        revision=None,
        family=recognise(path.stem, configs),
        model_index=sd1.MODEL_INDEX,
        configs=configs,
        weights=dict.fromkeys(networks, path),
        tokenizer=tokenizer.clip(),
        files=hash_files(path.parent, [path.name]),
        prefixes=single_file.PREFIXES,
    )
