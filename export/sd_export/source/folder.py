"""A checkpoint in diffusers layout: which of its files matter, and what its configs say.

Works on a list of names first, so that the same choice is made for a folder on disk and for a listing of the hub.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from sd_runtime.errors import BundleError, ExportError, one_line
from sd_runtime.schema import parse_json

from . import tokenizer
from .architecture import check_networks, check_pipeline
from .checkpoint import NETWORKS, Config

MODEL_INDEX = "model_index.json"
CONFIGS = {network: f"{network}/config.json" for network in NETWORKS} | {"scheduler": "scheduler/scheduler_config.json"}
TOKENIZER = tuple(f"tokenizer/{name}" for name in tokenizer.FILES)
WEIGHTS = {"text_encoder": "model", "unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
VARIANTS = (".safetensors", ".fp16.safetensors")  # full precision first, as the export decides on precision itself
PARTS = (*NETWORKS, "scheduler", "tokenizer")
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
CONFIG_LIMIT, TOKENIZER_LIMIT = 1 << 20, 64 << 20  # bytes


@dataclass(frozen=True)
class FolderConfigs:
    """Everything in a diffusers folder but the weights: parsed JSON, the tokenizer's bytes, and the names read."""

    model_index: Config
    configs: Mapping[str, Config]
    tokenizer: Mapping[str, bytes]
    architecture: str
    names: tuple[str, ...]


def list_names(folder: Path) -> set[str]:
    """The names (relative, POSIX) of the files in `folder` where a checkpoint has its own."""
    paths = [folder / MODEL_INDEX, *(path for part in PARTS for path in folder.glob(f"{part}/*"))]
    return {path.relative_to(folder).as_posix() for path in paths if path.is_file()}


def config_names(names: Collection[str]) -> list[str]:
    """The files other than weights that are read, of those in `names`."""
    return [name for name in (MODEL_INDEX, *CONFIGS.values(), *TOKENIZER) if name in names]


def weight_names(model: str, names: Collection[str]) -> dict[str, str]:
    """Network → its weights file among `names`: safetensors, full precision before fp16; pickles are refused."""
    chosen = {}
    for network, stem in WEIGHTS.items():
        candidates = [f"{network}/{stem}{variant}" for variant in VARIANTS]
        found = next((name for name in candidates if name in names), None)
        if found is None:
            for name in sorted(names):
                if name.startswith(f"{network}/") and name.endswith(PICKLES):
                    raise refuse_pickle(name)
            raise ExportError(
                f"model '{one_line(model)}' has no weights for {network}", accepted=" or ".join(candidates)
            )
        chosen[network] = found
    return chosen


def refuse_pickle(name: str) -> ExportError:
    return ExportError(
        f"{one_line(name)} is a pickle, which can run code when it is opened",
        accepted=".safetensors",
        remedy="convert it to safetensors where you trust it, or choose a checkpoint that has them",
    )


def read_configs(model: str, folder: Path) -> FolderConfigs:
    """Read and check everything but the weights; ExportError for what is missing, malformed or not supported."""
    names = config_names(list_names(folder))
    if MODEL_INDEX not in names:
        raise ExportError(f"{folder} is not a checkpoint in diffusers layout", accepted=f"a folder with {MODEL_INDEX}")
    model_index = _read_json(folder / MODEL_INDEX)
    check_pipeline(model, model_index)
    if missing := [name for name in CONFIGS.values() if name not in names]:
        raise ExportError(f"model '{one_line(model)}' is incomplete: {', '.join(missing)} missing in {folder}")
    configs = {part: _read_json(folder / name) for part, name in CONFIGS.items()}
    architecture = check_networks(model, configs)
    files = {name: _read(folder / name, TOKENIZER_LIMIT) for name in TOKENIZER if name in names}
    vocabulary = tokenizer.complete({name.split("/")[1]: text for name, text in files.items()}, str(folder))
    return FolderConfigs(model_index, configs, vocabulary, architecture, tuple(names))


def _read_json(path: Path) -> Config:
    try:
        value = parse_json(_read(path, CONFIG_LIMIT), str(path))
    except BundleError as error:
        raise ExportError(str(error)) from error
    if not isinstance(value, dict):
        raise ExportError(f"{path}", got=json.dumps(value), accepted="a JSON object")
    return value


def _read(path: Path, limit: int) -> bytes:
    """The bytes of a file of at most `limit` bytes."""
    try:
        with path.open("rb") as file:
            text = file.read(limit + 1)
    except OSError as error:
        raise ExportError(f"{path} cannot be read ({error.strerror})") from error
    if len(text) > limit:
        raise ExportError(f"{path} is too large", accepted=f"at most {limit} bytes")
    return text
