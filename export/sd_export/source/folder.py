"""A checkpoint in diffusers layout: which of its files matter, and what its configs say.

Works on a list of names first, so that the same choice is made for a folder on disk and for a listing of the hub.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd_runtime.bundle.schema import parse_json
from sd_runtime.errors import BundleError, ExportError, one_line

from . import tokenizer
from .checkpoint import FEATURE_EXTRACTOR, NETWORKS, SAFETY_CHECKER, Config
from .families.check import check_networks, check_pipeline, class_of, has_safety_checker
from .usable import check_usable

MODEL_INDEX = "model_index.json"
CONFIGS = {network: f"{network}/config.json" for network in NETWORKS} | {"scheduler": "scheduler/scheduler_config.json"}
SAFETY_CONFIGS = {
    SAFETY_CHECKER: f"{SAFETY_CHECKER}/config.json",
    FEATURE_EXTRACTOR: f"{FEATURE_EXTRACTOR}/preprocessor_config.json",
}
TOKENIZER = tuple(f"tokenizer/{name}" for name in tokenizer.FILES)
WEIGHTS = {
    "text_encoder": "model",
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    SAFETY_CHECKER: "model",
}
VARIANTS = (".safetensors", ".fp16.safetensors")  # full precision first, as the export decides on precision itself
PARTS = (*NETWORKS, "scheduler", "tokenizer", SAFETY_CHECKER, FEATURE_EXTRACTOR)
WITHOUT_CHECKER = "to export without it: --components text_encoder,unet,vae_decoder,vae_encoder"
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
CONFIG_LIMIT, TOKENIZER_LIMIT = 1 << 20, 64 << 20  # bytes


@dataclass(frozen=True)
class FolderConfigs:
    """Everything in a diffusers folder except the weights: parsed JSON, the tokenizer's bytes, file names."""

    model_index: Config
    configs: Mapping[str, Config]
    tokenizer: Mapping[str, bytes]
    names: tuple[str, ...]

    @property
    def networks(self) -> tuple[str, ...]:
        """The networks whose weights are needed."""
        return tuple(name for name in WEIGHTS if name in self.configs)


@dataclass(frozen=True)
class PipelineFiles:
    """Which files of a repository make a pipeline; `safety_checker`: its safety checker's, too."""

    safety_checker: bool = True
    index_files = (MODEL_INDEX,)

    def small_files(self, model: str, names: Collection[str]) -> list[str]:
        """What to read before the weights, of the files that there are."""
        if MODEL_INDEX not in names:
            single = any("/" not in name and name.endswith(".safetensors") for name in names)
            remedy = "download its single-file checkpoint and give the path" if single else None
            raise ExportError(f"hub model '{model}' is not in diffusers layout (no {MODEL_INDEX})", remedy=remedy)
        return config_names(names)

    def weight_files(self, model: str, folder: Path, names: Collection[str]) -> list[str]:
        """The weight files, after those of `small_files` were read and checked in `folder`."""
        networks = read_configs(model, folder, safety_checker=self.safety_checker).networks
        return list(weight_names(model, names, networks).values())


def list_names(folder: Path) -> set[str]:
    """The names (relative, POSIX) of the files in the places of `folder` that a checkpoint uses."""
    paths = [folder / MODEL_INDEX, *(path for part in PARTS for path in folder.glob(f"{part}/*"))]
    return {path.relative_to(folder).as_posix() for path in paths if path.is_file()}


def config_names(names: Collection[str]) -> list[str]:
    """The files other than weights that are read, of those in `names`."""
    known = (MODEL_INDEX, *CONFIGS.values(), *SAFETY_CONFIGS.values(), *TOKENIZER)
    return [name for name in known if name in names]


def weight_names(model: str, names: Collection[str], networks: Iterable[str] = NETWORKS) -> dict[str, str]:
    """Network → its weights file among `names`."""
    problem = f"model '{one_line(model)}' has no weights for"
    return {name: weights_name(f"{problem} {name}", f"{name}/{WEIGHTS[name]}", names) for name in networks}


def weights_name(problem: str, stem: str, names: Collection[str]) -> str:
    """The weights among `names`: safetensors, full precision before fp16.  ExportError: pickles, or `problem`."""
    candidates = [stem + variant for variant in VARIANTS]
    if (found := next((name for name in candidates if name in names), None)) is not None:
        return found
    optional = WITHOUT_CHECKER if stem.startswith(SAFETY_CHECKER) else None
    place = stem.rpartition("/")[0]
    for name in sorted(names):
        if name.rpartition("/")[0] == place and name.endswith(PICKLES):
            raise refuse_pickle(name, optional)
    raise ExportError(problem, accepted=" or ".join(candidates), remedy=optional)


def refuse_pickle(name: str, remedy: str | None = None) -> ExportError:
    return ExportError(
        f"{one_line(name)} is a pickle, which can run code when it is opened",
        accepted=".safetensors",
        remedy=remedy or "convert it to safetensors where you trust it, or choose a checkpoint that has them",
    )


def read_configs(model: str, folder: Path, *, safety_checker: bool = True) -> FolderConfigs:
    """Read and check everything but the weights; ExportError for what is missing, malformed or not supported."""
    names = config_names(list_names(folder))
    if MODEL_INDEX not in names:
        raise _not_a_pipeline(folder)
    model_index = read_json(folder / MODEL_INDEX)
    check_pipeline(model, model_index)
    checked = has_safety_checker(model, model_index) and safety_checker
    wanted = CONFIGS | (SAFETY_CONFIGS if checked else {})
    if missing := [name for name in wanted.values() if name not in names]:
        remedy = WITHOUT_CHECKER if not set(missing) & set(CONFIGS.values()) else None
        what = f"model '{one_line(model)}' is incomplete: {', '.join(missing)} missing in {folder}"
        raise ExportError(what, remedy=remedy)
    readers = {"scheduler": _read_scheduler}
    configs = {part: readers.get(part, read_json)(folder / name) for part, name in wanted.items()}
    configs["scheduler"] = _as_pipeline(configs["scheduler"], model_index)
    check_networks(model, configs)
    files = {name: _read(folder / name, TOKENIZER_LIMIT) for name in TOKENIZER if name in names}
    vocabulary = tokenizer.complete({name.split("/")[1]: text for name, text in files.items()}, str(folder))
    check_usable(model, configs, vocabulary)
    read = (MODEL_INDEX, *wanted.values(), *files)
    return FolderConfigs(model_index, configs, vocabulary, read)


def _as_pipeline(scheduler: Config, model_index: Config) -> Config:
    """A scheduler's config as diffusers' pipeline reads it: model_index.json names the class, whatever class wrote the
    config, which is then read as by `Class.from_config`.  So people switch a checkpoint's sampler in one line."""
    named = class_of(model_index, "scheduler")
    return scheduler if named is None else {**scheduler, "_class_name": named}


def _not_a_pipeline(folder: Path) -> ExportError:
    """What a folder without model_index.json is; it may hold a single network."""
    single = folder / "config.json"
    kind = read_json(single).get("_class_name") if single.is_file() else None
    what = (
        f"{folder} is one network ({one_line(kind)})" if kind else f"{folder} is not a checkpoint in diffusers layout"
    )
    flags = {"AutoencoderKL": "--vae", "AutoencoderTiny": "--taesd"}
    remedy = f"add it to a checkpoint with {flags[kind]}" if kind in flags else None
    return ExportError(what, accepted=f"a folder with {MODEL_INDEX}", remedy=remedy)


def read_json(path: Path) -> Config:
    try:
        value = parse_json(_read(path, CONFIG_LIMIT), str(path))
    except BundleError as error:
        raise ExportError(str(error)) from error
    return _object(path, value)


def _read_scheduler(path: Path) -> Config:
    """A scheduler's config, into which diffusers writes -Infinity (`lambda_min_clipped`), which JSON lacks."""
    try:
        value = json.loads(_read(path, CONFIG_LIMIT))
    except (ValueError, RecursionError) as error:
        raise ExportError(f"{path} is not valid JSON ({one_line(str(error))})") from error
    return _object(path, value)


def _object(path: Path, value: Any) -> Config:
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
