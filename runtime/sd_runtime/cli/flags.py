"""The flags that say what to draw, made from the table of a request's fields; and errors in words of flags."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..errors import SDError
from ..fields import FIELDS, Field

SPELLING = {  # of flags that are not their field's name with dashes
    "num_inference_steps": "--steps",
    "num_images_per_prompt": "--num-images",
    "prompt_weighting": "--no-weighting",
    "bundle": "--model",
    "backends": "--backend",
    "safety_checker": "--no-safety-checker",
}
OTHERS = ("image", "device", "grid", "output", "overwrite", "embedding", "preview")  # arguments that are no fields
METAVARS = {"text": "TEXT", "integer": "N", "number": "X"}
TYPES = {"text": str, "integer": int, "number": float}
TURNED_OFF = {"prompt_weighting": "take ( ) [ ] and BREAK in prompts literally"}  # a switch that is on by default


def flag(name: str) -> str:
    """--guidance-scale for guidance_scale."""
    return SPELLING.get(name, "--" + name.replace("_", "-"))


def add_fields(add: Callable[..., object], names: Iterable[str]) -> None:
    """A flag for each of these fields; None where it is not given."""
    for name in names:
        field = FIELDS[name]
        if field.kind == "switch":
            turned = not field.default
            add(flag(name), dest=name, action="store_const", const=turned, help=TURNED_OFF.get(name, field.help))
        elif field.kind == "choice":
            add(flag(name), dest=name, choices=field.choices, help=_help(field))
        else:
            add(flag(name), dest=name, type=TYPES[field.kind], metavar=METAVARS[field.kind], help=_help(field))


def given(args: argparse.Namespace) -> dict[str, Any]:
    """The fields that flags were given for."""
    values = {name: getattr(args, name) for name in FIELDS}
    return {name: value for name, value in values.items() if value is not None}


def _help(field: Field) -> str:
    limited = field.kind == "number" or (field.kind == "integer" and field.high < 1 << 16)
    scope = f", {field.low:g} to {field.high:g}" if limited else ""
    usual = field.usually or (field.default if field.default != "" else "none")
    return f"{field.help}{scope} (default: {usual})"


def in_flags(error: SDError, names: Mapping[str, str] | None = None) -> str:
    """The error's message with Python's names of arguments, where it is about one or has it in `backquotes`, as flags.

    names: how this command calls arguments that are not flags of these names."""
    words = re.split(r"(: )", str(error), maxsplit=1)
    words[0] = _flags(names).get(words[0], words[0])
    return with_flags("".join(words), names)


def with_flags(text: str, names: Mapping[str, str] | None = None) -> str:
    """A notice of the library with the arguments that it has in `backquotes` as flags; `names` as above."""
    return re.sub(r"`(\w+)`", lambda match: _flags(names).get(match[1], match[0]), text)


def _flags(names: Mapping[str, str] | None) -> dict[str, str]:
    return {name: flag(name) for name in (*FIELDS, *SPELLING, *OTHERS)} | dict(names or {})
