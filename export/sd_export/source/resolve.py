"""MODEL as the user typed it → Checkpoint: `demo`, a folder, a .safetensors file or, last, an id on the hub."""

from __future__ import annotations

import re
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from sd_runtime.errors import UsageError

from ..choices import PredictionType
from . import hub, single_file, tokenizer
from .checkpoint import NETWORKS, Checkpoint, dangling, explain_read_errors, hash_files
from .families import recognise
from .families.check import check_networks
from .folder import PipelineFiles, list_names, read_configs, weight_names
from .header import check_size, tensor_shapes
from .pickles import PICKLES, Converted, is_pickle, refuse_pickle
from .prediction import find_prediction

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
    prediction_type: PredictionType | None = None,
    allow_pickle: bool = False,
    quiet: bool = False,
) -> Checkpoint:
    """Find `model`, fetch it if it is on the hub, check it and hash it.

    `revision` (a branch, tag or commit) is for hub ids only; `safety_checker`: use one if the model has it; without
    `own_vae` a single file need hold no VAE, and `with_vae` must follow.  `prediction_type`: what the UNet predicts,
    whatever the checkpoint says; `allow_pickle`: convert pickles, see `pickles`.  Downloads draw progress bars on a
    terminal, unless `quiet`; notices go to this package's logger.  UsageError if `model` cannot be any kind of model;
    ExportError if it is missing, damaged, a pickle, or of a kind that is not supported.
    """
    path = DEMO_FOLDER if model == DEMO else existing_path("model", model, ACCEPTED)
    if path is None:
        if revision == "":
            raise UsageError("revision", got=revision, accepted="a branch, tag or commit")
        snapshot = fetch(model, revision, PipelineFiles(safety_checker, allow_pickle), quiet=quiet)
        found = _from_folder(model, snapshot.folder, safety_checker, allow_pickle, snapshot)
        return _predicting(found, prediction_type)
    if revision is not None:
        raise UsageError("revision", got=revision, accepted="only together with a hub id")
    if path.is_dir():
        return _predicting(_from_folder(model, path, safety_checker, allow_pickle), prediction_type)
    return _from_file(model, path, own_vae, prediction_type, allow_pickle)


def _predicting(checkpoint: Checkpoint, prediction_type: PredictionType | None) -> Checkpoint:
    """`checkpoint` with the prediction type that the user says."""
    if prediction_type is None:
        return checkpoint
    scheduler = {**checkpoint.configs["scheduler"], "prediction_type": prediction_type}
    return replace(checkpoint, configs={**checkpoint.configs, "scheduler": scheduler})


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
    why: str | None = None
    with suppress(OSError, ValueError, RuntimeError):
        why = dangling(Path(model).expanduser())
    raise UsageError(field, got=model, accepted=accepted, remedy=why or "there is no such file or folder")


def fetch(model: str, revision: str | None, selection: hub.Selection, *, quiet: bool) -> hub.Snapshot:
    """The files of a hub id; progress bars only on a terminal."""
    if quiet or not sys.stderr.isatty():
        hub.hide_progress_bars()
    return hub.snapshot(model, revision, selection)


def _from_folder(
    model: str, folder: Path, safety_checker: bool, allow_pickle: bool, snapshot: hub.Snapshot | None = None
) -> Checkpoint:
    """A checkpoint in diffusers layout, the user's own folder or a `snapshot` in the hub's cache."""
    found, names = read_configs(model, folder, safety_checker=safety_checker), list_names(folder)
    weights = weight_names(model, folder, names, found.networks, allow_pickle=allow_pickle)
    of_weights = [name for files in weights.values() for name in files]
    for name in of_weights:
        check_size(folder / name)
        if not is_pickle(name):
            tensor_shapes(folder / name)
    files = hash_files(folder, [*found.names, *of_weights])
    if snapshot is not None:
        files = hub.repair(snapshot, files)
    converted = Converted() if any(map(is_pickle, of_weights)) else None
    name = model.split("/")[-1] if snapshot or model == DEMO else folder.name or "model"
    return Checkpoint(
        id=model,
        name=name,
        revision=snapshot.commit if snapshot else None,
        family=recognise(name, found.configs),
        model_index=found.model_index,
        configs=found.configs,
        weights={n: tuple(_as_safetensors(folder / name, converted) for name in files) for n, files in weights.items()},
        tokenizer=found.tokenizer,
        files=files,
        converted=converted,
    )


def _as_safetensors(path: Path, converted: Converted | None) -> Path:
    """A weights file, converted if it is a pickle, with its header checked."""
    if converted is None or not is_pickle(path):
        return path
    made = converted.convert(path)
    tensor_shapes(made)
    return made


def _from_file(
    model: str, path: Path, own_vae: bool, prediction_type: PredictionType | None, allow_pickle: bool
) -> Checkpoint:
    """A single-file checkpoint with the keys of Stable Diffusion 1.x or 2.x."""
    check_size(path)
    converted = Converted() if is_pickle(path) and allow_pickle else None
    if is_pickle(path) and converted is None:
        raise refuse_pickle(path.name, model)
    if not is_pickle(path) and path.suffix.lower() != ".safetensors":
        raise UsageError("model", got=model, accepted=ACCEPTED)
    weights = _as_safetensors(path, converted)
    shapes = tensor_shapes(weights)
    prediction = find_prediction(path, shapes, prediction_type)
    prefixes = single_file.prefixes(shapes)
    configs = single_file.infer_configs(model, shapes, prediction, own_vae=own_vae)
    networks = [part for part in NETWORKS if any(name.startswith(prefixes[part]) for name in shapes)]
    check_networks(model, configs)
    return Checkpoint(
        id=model,
        name=path.stem,
        revision=None,
        family=recognise(path.stem, configs),
        model_index=single_file.model_index(configs),
        configs=configs,
        weights=dict.fromkeys(networks, (weights,)),
        tokenizer=tokenizer.clip(pad="!") if single_file.is_open_clip(shapes) else tokenizer.clip(),
        files=hash_files(path.parent, [path.name, *prediction.files]),
        prefixes=prefixes,
        converted=converted,
    )
