"""Whether the runtime can use a checkpoint's scheduler and tokenizer, checked before weights are fetched and traced."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from sd_runtime.bundle.schema import parse_json
from sd_runtime.errors import BundleError, ExportError, one_line
from sd_runtime.prompt import Tokenizer
from sd_runtime.sampling import SchedulerConfig

from .checkpoint import FEATURE_EXTRACTOR, Config

# Beyond every published model by far, and small enough that a library builds it without storage in seconds.
DEPTHS = {  # fields that say how many of something are built
    **dict.fromkeys(("num_hidden_layers", "layers_per_block", "transformer_layers_per_block"), 128),
    **dict.fromkeys(("num_decoder_blocks", "num_encoder_blocks"), 128),
}
MOST_LEVELS, LARGEST = 16, 1 << 20  # entries of a list; any other number
TOKENIZER_CONFIG = "tokenizer_config.json"
NO_NETWORKS = ("scheduler", FEATURE_EXTRACTOR)
MALFORMED = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)  # raised for odd values in JSON


def check_usable(model: str, configs: Mapping[str, Config], tokenizer: Mapping[str, bytes]) -> None:
    """ExportError: the runtime could not draw with this scheduler or this tokenizer."""
    with _as_export_error(model, "scheduler/scheduler_config.json, or the scheduler in model_index.json,"):
        SchedulerConfig.from_dict(configs["scheduler"])
    with _as_export_error(model, "the files in tokenizer/"):
        Tokenizer.from_bytes(tokenizer)
        length = parse_json(tokenizer.get(TOKENIZER_CONFIG, b"{}"), TOKENIZER_CONFIG).get("model_max_length")
    positions = configs["text_encoder"].get("max_position_embeddings", 77)  # transformers' default
    if type(length) is not int or length != positions:  # diffusers pads prompts to this length
        raise ExportError(
            f"model '{one_line(model)}': tokenizer/{TOKENIZER_CONFIG}: model_max_length",
            got="none" if length is None else length,
            accepted=f"{one_line(positions)}, as many as the text encoder takes",
        )


def check_sizes(model: str, configs: Mapping[str, Config]) -> None:
    """ExportError: the config of a network that nobody could build, found before any library tries."""
    for part in configs.keys() - set(NO_NETWORKS):
        for field, value in _fields(configs[part]):
            what = f"model '{one_line(model)}': {part}/config.json: {one_line(field)}"
            entries = value if isinstance(value, (list, tuple)) else [value]
            if len(entries) > MOST_LEVELS:
                raise ExportError(what, got=f"{len(entries)} entries", accepted=f"at most {MOST_LEVELS}")
            most = DEPTHS.get(field, LARGEST)
            for entry in entries:
                if isinstance(entry, (int, float)) and not abs(entry) <= most:
                    raise ExportError(what, got=entry, accepted=f"at most {most}")


def _fields(config: Config) -> Iterator[tuple[str, object]]:
    """Every field of a config and of the configs inside it."""
    for field, value in config.items():
        if isinstance(value, dict):
            yield from _fields(value)
        elif isinstance(value, (list, tuple)) and any(isinstance(entry, (list, tuple)) for entry in value):
            yield field, [number for entry in value if isinstance(entry, (list, tuple)) for number in entry]
        else:
            yield field, value


@contextmanager
def _as_export_error(model: str, files: str) -> Iterator[None]:
    """Turn the runtime's complaint about `files` into an ExportError about the model."""
    problem = f"model '{one_line(model)}'"
    try:
        yield
    except BundleError as error:
        remedy = f"change {files} in a copy of the checkpoint"
        raise ExportError(f"{problem}: {error.what}", got=error.got, accepted=error.accepted, remedy=remedy) from error
    except MALFORMED as error:
        why = f"{type(error).__name__}: {one_line(str(error))}"
        raise ExportError(f"{problem}: {files} cannot be understood ({why})") from error
