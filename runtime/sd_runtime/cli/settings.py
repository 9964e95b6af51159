"""Settings: what was asked for, wherever it came from: flags, a line of a prompts file, a picture's own metadata.

Each of these says some of it.  `over` lays one on another; what remains unsaid is up to the model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..bundle.schema import parse_json
from ..errors import BundleError, UsageError
from ..fields import FIELDS
from ..images.files import why_unreadable
from ..request import DEFAULT_STRENGTH, Defaults, Request, make_request

MAX_FILE = 64 << 20  # bytes of a prompts file
OWN = ("prompt", "image", "grid")  # what a line may say beside a request's fields, each a text


@dataclass(frozen=True)
class Settings:
    """None, or no entry in `options`, where nothing is said.

    image    path of a picture to change
    grid     "ROWSxCOLS": all pictures on one sheet
    options  the fields of a request by name, see `fields.FIELDS`
    """

    prompt: str | None = None
    image: str | None = None
    grid: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def over(self, base: Settings) -> Settings:
        """These settings and, where they say nothing, those of `base`."""
        own = {name: getattr(self, name) for name in OWN if getattr(self, name) is not None}
        return replace(base, options={**base.options, **self.options}, **own)

    def request(self, defaults: Defaults) -> Request:
        """The request for a model with these defaults.  UsageError: no prompt, out of range, or contradictory."""
        if self.prompt is None:
            raise UsageError("prompt", got="none", accepted="what to draw, in words")
        options = dict(self.options)
        if self.image is not None:
            options.setdefault("strength", DEFAULT_STRENGTH)
        for name in ("strength", "resize"):
            if self.image is None and name in options:
                remedy = f"give the picture as `image`, or leave `{name}` out"
                raise UsageError(f"`{name}` without a picture to change", got=options[name], remedy=remedy)
        if self.grid is not None:
            rows, columns = self.cells(self.grid)
            if options.setdefault("num_images_per_prompt", rows * columns) > rows * columns:
                got = options["num_images_per_prompt"]
                accepted = f"at most {rows * columns} on a {self.grid} grid"
                raise UsageError("num_images_per_prompt", got=got, accepted=accepted)
        return make_request(defaults, self.prompt, **options)

    @staticmethod
    def cells(grid: str) -> tuple[int, int]:
        """The rows and columns that "2x3" names."""
        match = re.fullmatch(r"([1-9]\d?)x([1-9]\d?)", grid)
        if match is None:
            raise UsageError("grid", got=grid, accepted="ROWSxCOLS, such as 2x3, each from 1 to 99")
        return int(match[1]), int(match[2])


def read_prompts_file(path: Path) -> list[tuple[str, Settings]]:
    """("prompts.txt line 3", its settings) for every line that is not blank.

    A line is a prompt or, if it starts with {, a JSON object with `prompt`, `image`, `grid` and fields of a request.
    UsageError names the line, and the field, that cannot be."""
    if reason := why_unreadable(path, streams=True):
        raise UsageError("prompts file", got=str(path), accepted="a text file", remedy=reason)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE + 1)
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise UsageError("prompts file", got=str(path), accepted="a text file", remedy=error.strerror) from error
    except UnicodeDecodeError as error:
        raise UsageError("prompts file", got=str(path), accepted="text in UTF-8") from error
    if len(data) > MAX_FILE:
        raise UsageError("prompts file", got=f"{path}, which is larger", accepted=f"at most {MAX_FILE} bytes")
    lines = [(f"{path.name} line {n}", line.strip()) for n, line in enumerate(text.split("\n"), 1)]
    settings = [(where, _read_line(line, where)) for where, line in lines if line]
    if not settings:
        raise UsageError("prompts file", got=f"{path.name} without a prompt", accepted="one prompt a line")
    return settings


def _read_line(line: str, where: str) -> Settings:
    if not line.startswith("{"):
        return Settings(prompt=line)
    try:
        said = parse_json(line.encode(), where)
    except BundleError as error:  # the schema's own
        raise UsageError(error.what, got=error.got, accepted=error.accepted) from error
    unknown = sorted(set(said) - {*OWN, *FIELDS})
    if unknown:
        raise UsageError(f"{where}: unknown {', '.join(unknown)}", accepted=", ".join((*OWN, *FIELDS)))
    said = {name: value for name, value in said.items() if value is not None}
    for name, value in said.items():
        if name in OWN and not isinstance(value, str):
            raise UsageError(f"{where}: {name}", got=value, accepted="text")
        if name in FIELDS and not FIELDS[name].fits(value):
            raise UsageError(f"{where}: {name}", got=value, accepted=FIELDS[name].accepted)
    own = {name: said.pop(name) for name in OWN if name in said}
    return Settings(**own, options=said)
