"""Settings: what was asked for, wherever it came from: flags, a line of a prompts file, a picture's own metadata.

Each of these says some of it.  `over` lays one on another; what remains unsaid is up to the model.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..bundle.manifest import Defaults
from ..bundle.schema import from_json, parse_json
from ..errors import BundleError, UsageError
from ..images.convert import Resize
from ..noise import RNG
from ..request import DEFAULT_STRENGTH, Request, make_request

MAX_FILE = 64 << 20  # bytes of a prompts file


@dataclass(frozen=True)
class Settings:
    """The arguments of `make_request`, then those of a command line alone; None where nothing is said.

    image  path of a picture to change
    grid   "ROWSxCOLS": all pictures on one sheet
    """

    prompt: str | None = None
    negative_prompt: str | None = None
    num_images_per_prompt: int | None = None
    seed: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    guidance_rescale: float | None = None
    eta: float | None = None
    height: int | None = None
    width: int | None = None
    scheduler: str | None = None
    rng: RNG | None = None
    strength: float | None = None
    resize: Resize | None = None
    prompt_weighting: bool | None = None
    truncate: bool | None = None
    fast_decoder: bool | None = None
    image: str | None = None
    grid: str | None = None

    @classmethod
    def from_flags(cls, args: argparse.Namespace) -> Settings:
        """The flags that bear these fields' names."""
        return cls(**{f.name: getattr(args, f.name) for f in fields(cls)})

    def over(self, base: Settings) -> Settings:
        """These settings and, where they say nothing, those of `base`."""
        return replace(base, **self._said())

    def request(self, defaults: Defaults) -> Request:
        """The request for a model with these defaults.  UsageError: no prompt, out of range, or contradictory."""
        if self.prompt is None:
            raise UsageError("no prompt given", remedy='try: sd-run "a large red star on a blue background"')
        said = self._said()
        said.pop("grid", None)
        if said.pop("image", None) is not None:
            said.setdefault("strength", DEFAULT_STRENGTH)
        elif "strength" in said or "resize" in said:
            name = "strength" if "strength" in said else "resize"
            remedy = "give the picture with --image"
            raise UsageError(name, got=said[name], accepted="nothing without a picture to change", remedy=remedy)
        if self.grid is not None:
            rows, columns = self.cells(self.grid)
            if said.setdefault("num_images_per_prompt", rows * columns) > rows * columns:
                got = said["num_images_per_prompt"]
                raise UsageError(
                    "number of images", got=got, accepted=f"at most {rows * columns} on a {self.grid} grid"
                )
        return make_request(defaults, **said)

    @staticmethod
    def cells(grid: str) -> tuple[int, int]:
        """The rows and columns that "2x3" names."""
        match = re.fullmatch(r"([1-9]\d?)x([1-9]\d?)", grid)
        if match is None:
            raise UsageError("grid", got=grid, accepted="ROWSxCOLS, such as 2x3, each from 1 to 99")
        return int(match[1]), int(match[2])

    def _said(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


def read_prompts_file(path: Path) -> list[tuple[str, Settings]]:
    """("prompts.txt line 3", its settings) for every line that is not blank.

    A line is a prompt or, if it starts with {, a JSON object with fields of `Settings`.  UsageError names the line, and
    the field, that cannot be."""
    try:
        size = path.stat().st_size
        if size > MAX_FILE:
            raise UsageError("prompts file", got=f"{size} bytes", accepted=f"at most {MAX_FILE}")
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UsageError("prompts file", got=str(path), accepted="a text file", remedy=error.strerror) from error
    except (UnicodeDecodeError, ValueError) as error:  # ValueError: NUL in the name
        if isinstance(error, UsageError):
            raise
        raise UsageError("prompts file", got=str(path), accepted="text in UTF-8") from error
    lines = [(f"{path.name} line {n}", line.strip()) for n, line in enumerate(text.split("\n"), 1)]
    settings = [(where, _read_line(line, where)) for where, line in lines if line]
    if not settings:
        raise UsageError("prompts file", got=f"{path.name} without a prompt", accepted="one prompt a line")
    return settings


def _read_line(line: str, where: str) -> Settings:
    if not line.startswith("{"):
        return Settings(prompt=line)
    try:
        return from_json(Settings, parse_json(line.encode(), where), where)
    except BundleError as error:  # the schema's own
        raise UsageError(error.what, got=error.got, accepted=error.accepted) from error
