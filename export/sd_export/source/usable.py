"""Whether the runtime can use a checkpoint's scheduler and tokenizer, checked before weights are fetched and traced."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from sd_runtime.bundle.schema import parse_json
from sd_runtime.errors import BundleError, ExportError, one_line
from sd_runtime.prompt import Tokenizer
from sd_runtime.sampling import SchedulerConfig

from .checkpoint import Config

TOKENIZER_CONFIG = "tokenizer_config.json"
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
