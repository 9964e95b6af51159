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
from .checkpoint import FEATURE_EXTRACTOR, NETWORKS, SAFETY_CHECKER, Config, dangling
from .families.check import check_networks, check_pipeline, class_of, has_safety_checker
from .pickles import is_pickle, refuse_pickle
from .usable import check_sizes, check_usable

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
INDEX = ".index.json"  # after the name that the weights would have in one file
VARIANTS = (".safetensors", ".fp16.safetensors")  # full precision first, as the export decides on precision itself
PARTS = (*NETWORKS, "scheduler", "tokenizer", SAFETY_CHECKER, FEATURE_EXTRACTOR)
WITHOUT_CHECKER = "to export without it: --components text_encoder,unet,vae_decoder,vae_encoder"
PICKLED = {"text_encoder": "pytorch_model", SAFETY_CHECKER: "pytorch_model"}  # stems of pickles, where they differ
MOST_SHARDS = 64
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
    allow_pickle: bool = False
    index_files = (MODEL_INDEX,)

    def small_files(self, model: str, names: Collection[str]) -> list[str]:
        """What to read before the weights, of the files that there are."""
        if MODEL_INDEX not in names:
            single = any("/" not in name and name.endswith(".safetensors") for name in names)
            remedy = "download its single-file checkpoint and give the path" if single else None
            raise ExportError(f"hub model '{model}' is not in diffusers layout (no {MODEL_INDEX})", remedy=remedy)
        return [*config_names(names), *index_names(names)]

    def weight_files(self, model: str, folder: Path, names: Collection[str]) -> list[str]:
        """The weight files, after those of `small_files` were read and checked in `folder`."""
        networks = read_configs(model, folder, safety_checker=self.safety_checker).networks
        found = weight_names(model, folder, names, networks, allow_pickle=self.allow_pickle)
        return [name for files in found.values() for name in files]


def list_names(folder: Path) -> set[str]:
    """The names (relative, POSIX) of the files in the places of `folder` that a checkpoint uses."""
    paths = [folder / MODEL_INDEX, *(path for part in PARTS for path in folder.glob(f"{part}/*"))]
    return {path.relative_to(folder).as_posix() for path in paths if path.is_file()}


def config_names(names: Collection[str]) -> list[str]:
    """The files other than weights that are read, of those in `names`."""
    known = (MODEL_INDEX, *CONFIGS.values(), *SAFETY_CONFIGS.values(), *TOKENIZER)
    return [name for name in known if name in names]


def index_names(names: Collection[str]) -> list[str]:
    """The indices of weights in shards, of those in `names`."""
    return [name for name in names if name.endswith(INDEX) and name.partition("/")[0] in WEIGHTS]


def weight_names(
    model: str, folder: Path, names: Collection[str], networks: Iterable[str] = NETWORKS, *, allow_pickle: bool = False
) -> dict[str, tuple[str, ...]]:
    """Network → its weights among `names`, relative to `folder`, where the indices of shards lie already."""
    problem = f"model '{one_line(model)}' has no weights for"
    return {
        name: weights_name(
            f"{problem} {name}", model, folder, f"{name}/{WEIGHTS[name]}", names, allow_pickle=allow_pickle
        )
        for name in networks
    }


def weights_name(
    problem: str, model: str, folder: Path, stem: str, names: Collection[str], *, allow_pickle: bool = False
) -> tuple[str, ...]:
    """The weights among `names`: safetensors, full precision before fp16, whole before in shards; last, where the user
    allows them, pickles.  ExportError: there are pickles only, or `problem`."""
    candidates = [stem + variant for variant in VARIANTS]
    if (found := next((name for name in candidates if name in names), None)) is not None:
        return (found,)
    if (index := next((name + INDEX for name in candidates if name + INDEX in names), None)) is not None:
        return _shards(folder / index, index, names)
    optional = WITHOUT_CHECKER if stem.startswith(SAFETY_CHECKER) else None
    place = stem.rpartition("/")[0]
    pickles = sorted(name for name in names if name.rpartition("/")[0] == place and is_pickle(name))
    if not pickles:
        _refuse_dangling(folder, candidates)
        raise ExportError(problem, accepted=" or ".join(candidates), remedy=optional)
    old = f"{place}/{PICKLED[place]}" if place in PICKLED else stem
    whole = [name for name in (f"{old}.bin", f"{old}.fp16.bin") if name in pickles]
    if not allow_pickle:
        raise refuse_pickle(pickles[0], model, optional)
    if not whole:
        raise ExportError(f"{pickles[0]} is a pickle of another name", accepted=f"{old}.bin", remedy=optional)
    return (whole[0],)


def _refuse_dangling(folder: Path, names: Iterable[str]) -> None:
    """ExportError: one of these files is there as a link that leads nowhere."""
    for name in names:
        if (why := dangling(folder / name)) is not None:
            raise ExportError(why, remedy="fetch the checkpoint again")


def _shards(path: Path, index: str, names: Collection[str]) -> tuple[str, ...]:
    """The files that an index names.  ExportError: it is malformed, names files elsewhere, or one is missing."""
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise ExportError(f"{path}: weight_map", got=type(places).__name__, accepted="an object of file names")
    shards = sorted(set(places.values()))
    inside = [f"{index.rpartition('/')[0]}/{shard}".lstrip("/") for shard in shards]
    if len(shards) > MOST_SHARDS:
        raise ExportError(f"{path}: shards", got=len(shards), accepted=f"at most {MOST_SHARDS}")
    for shard in shards:
        if "/" in shard or "\\" in shard or not shard.endswith(".safetensors"):
            raise ExportError(f"{path}: shard", got=shard, accepted="a .safetensors file beside it")
    if missing := [name for name in inside if name not in names]:
        _refuse_dangling(path.parent, (name.rpartition("/")[2] for name in missing))
        raise ExportError(f"{path} names shards that are missing", got=", ".join(missing[:3]), remedy="fetch them")
    return tuple(inside)


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
        _refuse_dangling(folder, missing)
        remedy = WITHOUT_CHECKER if not set(missing) & set(CONFIGS.values()) else None
        what = f"model '{one_line(model)}' is incomplete: {', '.join(missing)} missing in {folder}"
        raise ExportError(what, remedy=remedy)
    readers = {"scheduler": _read_scheduler}
    configs = {part: readers.get(part, read_json)(folder / name) for part, name in wanted.items()}
    configs["scheduler"] = _as_pipeline(configs["scheduler"], model_index)
    check_sizes(model, configs)
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
