"""An autoencoder from elsewhere: another VAE in the place of a checkpoint's own, or a TAESD beside it.

The user names it as a checkpoint: a folder or a hub id that holds the network alone (config.json and weights) or a
whole pipeline (whose vae/ is used) or, for a VAE, a .safetensors file with CompVis' keys.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from sd_runtime.bundle.manifest import Source
from sd_runtime.errors import ExportError, one_line

from . import hub, single_file
from .checkpoint import TAESD, Checkpoint, Config, explain_read_errors, hash_files
from .folder import INDEX, read_json, weights_name
from .header import check_size, tensor_shapes
from .pickles import is_pickle, refuse_pickle
from .resolve import existing_path, fetch
from .usable import check_sizes

VAE_CLASS, TAESD_CLASS = "AutoencoderKL", "AutoencoderTiny"
CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model"
FOLDER_OR_ID = "a folder in diffusers layout, or a hub id such as owner/name"


@dataclass(frozen=True)
class AutoencoderFiles:
    """Which files of a repository make an autoencoder of a class, alone in it or part of a pipeline."""

    class_name: str
    index_files = (f"vae/{CONFIG}", CONFIG)

    def place(self, model: str, names: Collection[str]) -> str:
        """The autoencoder's folder, "" or "vae/"."""
        found = next((name for name in self.index_files if name in names), None)
        if found is None:
            raise ExportError(f"'{one_line(model)}' has no {self.class_name}", accepted=" or ".join(self.index_files))
        return found.removesuffix(CONFIG)

    def small_files(self, model: str, names: Collection[str]) -> list[str]:
        place = self.place(model, names)
        return [place + CONFIG, *(name for name in names if name.startswith(place + WEIGHTS) and name.endswith(INDEX))]

    def weight_files(self, model: str, folder: Path, names: Collection[str]) -> list[str]:
        place = self.place(model, names)
        if (found := read_json(folder / place / CONFIG).get("_class_name")) != self.class_name:
            raise ExportError(f"'{one_line(model)}'", got=one_line(found), accepted=self.class_name)
        return [*weights_name(f"'{one_line(model)}' has no weights", model, folder, place + WEIGHTS, names)]


@dataclass(frozen=True)
class _Autoencoder:
    """An autoencoder that was found; `prefix`: the start of its keys, where these are CompVis'."""

    config: Config
    weights: tuple[Path, ...]
    source: Source
    prefix: str | None = None


@explain_read_errors()
def with_vae(checkpoint: Checkpoint, model: str, *, quiet: bool = False) -> Checkpoint:
    """`checkpoint` with the VAE named by `model` instead of its own.  UsageError, ExportError: as resolve_checkpoint;
    or if the two do not share a latent space's shape."""
    accepted = f"{FOLDER_OR_ID}, or a .safetensors file"
    path = existing_path("vae", model, accepted)
    found = _from_file(model, path) if path is not None and path.is_file() else _find(model, path, VAE_CLASS, quiet)
    _check_fit(checkpoint, model, _levels(found.config, "block_out_channels"), found.config)
    return _with_part(checkpoint, "vae", found)


@explain_read_errors()
def with_taesd(checkpoint: Checkpoint, model: str, *, quiet: bool = False) -> Checkpoint:
    """`checkpoint` with the tiny autoencoder named by `model` beside its own VAE; errors as `with_vae`."""
    path = existing_path(TAESD, model, FOLDER_OR_ID)
    if path is not None and path.is_file():
        raise ExportError(f"'{one_line(model)}' is a file", accepted=FOLDER_OR_ID)
    found = _find(model, path, TAESD_CLASS, quiet)
    _check_fit(checkpoint, model, _levels(found.config, "decoder_block_out_channels"), found.config)
    return _with_part(checkpoint, TAESD, found)


def _find(model: str, folder: Path | None, class_name: str, quiet: bool) -> _Autoencoder:
    """Find it in a folder of the user's or, for None, on the hub."""
    selection = AutoencoderFiles(class_name)
    snapshot = fetch(model, None, selection, quiet=quiet) if folder is None else None
    root = snapshot.folder if snapshot is not None else folder
    assert root is not None
    names = {path.relative_to(root).as_posix() for path in (*root.glob("*"), *root.glob("vae/*")) if path.is_file()}
    config, *_ = selection.small_files(model, names)
    weights = [root / name for name in selection.weight_files(model, root, names)]
    for path in weights:
        check_size(path)
        tensor_shapes(path)
    files = hash_files(root, [config, *(path.relative_to(root).as_posix() for path in weights)])
    if snapshot is not None:
        files = hub.repair(snapshot, files)
    source = Source(model if snapshot else root.name, snapshot.commit if snapshot else None, files)
    found = read_json(root / config)
    check_sizes(model, {"vae": found})
    return _Autoencoder(found, tuple(weights), source)


def _from_file(model: str, path: Path) -> _Autoencoder:
    check_size(path)
    if is_pickle(path):
        raise refuse_pickle(path.name, model, "give the VAE as .safetensors")
    config, prefix = single_file.infer_vae(model, tensor_shapes(path))
    return _Autoencoder(config, (path,), Source(path.name, None, hash_files(path.parent, [path.name])), prefix)


def _levels(config: Config, field: str) -> int:
    widths = config.get(field, ())
    return len(widths) if isinstance(widths, (list, tuple)) else 0


def _check_fit(checkpoint: Checkpoint, model: str, levels: int, config: Config) -> None:
    """Refuse an autoencoder whose latents have other channels, or other pixels a cell, than the checkpoint's."""
    own = checkpoint.configs["vae"]
    wanted = own.get("latent_channels", 4), 2 ** (_levels(own, "block_out_channels") - 1)
    got = config.get("latent_channels", 4), 2 ** (levels - 1)
    if got != wanted:
        raise ExportError(
            f"'{one_line(model)}' does not fit model '{one_line(checkpoint.id)}'",
            got=f"{one_line(got[0])} latent channels, {got[1]} pixels a cell",
            accepted=f"{wanted[0]} and {wanted[1]}",
        )


def _with_part(checkpoint: Checkpoint, name: str, found: _Autoencoder) -> Checkpoint:
    prefixes: Mapping[str, str] = {key: value for key, value in checkpoint.prefixes.items() if key != name}
    return replace(
        checkpoint,
        configs={**checkpoint.configs, name: found.config},
        weights={**checkpoint.weights, name: found.weights},
        prefixes=prefixes if found.prefix is None else {**prefixes, name: found.prefix},
        parts={**checkpoint.parts, name: found.source},
    )
