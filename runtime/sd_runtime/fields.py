"""The fields of a request: name, type, range, default and help of each, in one table.

The request itself, the flags of a command line, the lines of a prompts file and what a picture says about itself derive
from this table.  A new field is one entry in `FIELDS`, one line in `request.Options`, one in `request.Request`, and
its use.
"""

from __future__ import annotations

import math
import numbers
import operator
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from .errors import UsageError

RNG = Literal["cpu", "cuda"]
Resize = Literal["crop", "fit", "stretch"]
Kind = Literal["text", "integer", "number", "choice", "switch"]

MAX_PICTURES = 1000
DECIMAL = r"\d{1,20}(\.\d{1,20})?(e[-+]?\d{1,2})?"
SEED_MIN, SEED_MAX = -(1 << 63), (1 << 64) - 1  # what torch.manual_seed takes


@dataclass(frozen=True)
class Field:
    """One field that may be left out.

    kind       "text", "integer", "number" (from `low` to `high`, both included), "choice" (one of `choices`), "switch"
    default    its value where nothing is said; None: `usually` says in words what then counts
    help       one line for people, without range and default
    label      under which a picture's metadata tells it, where it is not the default; "": told in another way
    value      of a switch that was turned: its text in the metadata
    """

    name: str
    kind: Kind
    help: str
    default: Any = None
    usually: str = ""
    low: float = -math.inf
    high: float = math.inf
    choices: tuple[str, ...] = ()
    label: str = ""
    value: str = ""

    def check(self, value: object) -> None:
        """UsageError, under this field's name, unless `value` is of its kind and in its range."""
        if not self.fits(value):
            raise UsageError(self.name, got=value if value is not None else "None", accepted=self.accepted)

    @property
    def accepted(self) -> str:
        """The kind and range in words."""
        if self.name == "seed":
            return "an integer from -2^63 to 2^64 - 1"
        if self.name == "scheduler":
            return "a sampler's name, such as euler_a"
        return {
            "text": "text",
            "integer": f"whole numbers from {self.low} to {self.high}",
            "number": f"numbers from {self.low:g} to {self.high:g}",
            "choice": ", ".join(self.choices),
            "switch": "True, False",
        }[self.kind]

    def to_metadata(self, value: Any) -> str | None:
        """What a picture's metadata tells of `value` under `label`; None where it is the default."""
        if value == self.default or not self.label:
            return None
        return self.value if self.kind == "switch" else shortest(value) if self.kind == "number" else str(value)

    def from_metadata(self, text: str) -> Any:
        """The value that `to_metadata` tells so; None: it is none."""
        if self.kind == "switch":
            return (not self.default) if text == self.value else None
        if self.kind == "number":
            value: Any = float(text) if re.fullmatch(DECIMAL, text) else None
        else:
            value = text
        return value if self.fits(value) else None

    def fits(self, value: object) -> bool:
        """Whether `value` is of this kind and in its range."""
        if self.kind == "choice":
            return isinstance(value, str) and value in self.choices
        if self.kind == "switch":
            return isinstance(value, bool)
        if self.kind == "text":
            return isinstance(value, str)
        if self.kind == "integer":
            return is_integer(value) and self.low <= operator.index(value) <= self.high  # type: ignore[arg-type]
        real = isinstance(value, numbers.Real) and not isinstance(value, bool)
        return real and abs(value) < math.inf and self.low <= value <= self.high  # type: ignore[arg-type,operator]


FIELDS: dict[str, Field] = {
    field.name: field
    for field in (
        Field("negative_prompt", "text", "what to keep out of the picture", default=""),
        Field("num_images_per_prompt", "integer", "pictures a prompt", default=1, low=1, high=MAX_PICTURES),
        Field(
            "seed",
            "integer",
            "picture i uses seed + i",
            usually="random",
            low=SEED_MIN,
            high=SEED_MAX,
        ),
        Field("num_inference_steps", "integer", "steps of the sampler", usually="the model's", low=1, high=1000),
        Field(
            "guidance_scale",
            "number",
            "how strictly the prompt is followed; at most 1 is off",
            usually="the model's",
            low=0,
            high=100,
        ),
        Field(
            "guidance_rescale",
            "number",
            "against washed-out colours",
            default=0.0,
            low=0,
            high=1,
            label="Guidance rescale",
        ),
        Field(
            "eta",
            "number",
            "fresh noise in ddim and tcd steps",
            usually="the sampler's",
            low=0,
            high=1,
            label="Eta",
        ),
        Field("height", "integer", "pixels, a multiple of 8", usually="the model's", low=1, high=1 << 16),
        Field("width", "integer", "pixels, a multiple of 8", usually="the model's", low=1, high=1 << 16),
        Field("scheduler", "text", "a sampler by name", usually="the model's"),
        Field("rng", "choice", "whose noise a seed stands for", default="cpu", choices=("cpu", "cuda")),
        Field(
            "strength",
            "number",
            "how much of the picture to change",
            usually="0.8 with a picture",
            low=0,
            high=1,
            label="Denoising strength",
        ),
        Field(
            "resize",
            "choice",
            "how the picture is brought to size",
            default="crop",
            choices=("crop", "fit", "stretch"),
            label="Resize mode",
        ),
        Field(
            "prompt_weighting",
            "switch",
            "read (word:1.3), [word] and BREAK as AUTOMATIC1111 does",
            default=True,
            label="Emphasis",
            value="None",
        ),
        Field(
            "truncate",
            "switch",
            "cut prompts at 77 tokens, as diffusers does",
            default=False,
            label="Truncate",
            value="77",
        ),
        Field(
            "fast_decoder",
            "switch",
            "draw with the bundle's tiny decoder (TAESD)",
            default=False,
            label="VAE Decoder",
            value="TAESD",
        ),
    )
}


def shortest(number: float) -> str:
    """The shortest decimal that reads back as the same float, without a trailing .0."""
    return repr(float(number)).removesuffix(".0")


def check(name: str, value: object) -> None:
    """UsageError, under the field's name, unless `value` is in its range."""
    FIELDS[name].check(value)


def check_count(what: str, value: object) -> None:
    """UsageError unless `value` is a number of pictures or prompts that a request may have."""
    Field(what, "integer", "", low=1, high=MAX_PICTURES).check(value)


def check_seed(seed: object) -> int:
    """`seed` as an integer that torch.manual_seed takes, -2^63 to 2^64 - 1; UsageError for others, bool, float."""
    check("seed", seed)
    return operator.index(seed)  # type: ignore[arg-type]


def check_text(text: object, what: str = "prompt") -> None:
    """UsageError unless `text` is a str of Unicode characters: lone surrogates have no UTF-8 form."""
    if not isinstance(text, str):
        raise UsageError(what, got=type(text).__name__, accepted="text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        got = f"U+{ord(text[error.start]):04X} at character {error.start}"
        raise UsageError(what, got=got, accepted="Unicode text without lone surrogates") from None


def is_integer(value: object) -> bool:
    """Whether `value` is a whole number, numpy's included, and no bool."""
    if type(value).__name__ in ("bool", "bool_", "ndarray"):
        return False
    try:
        operator.index(value)  # type: ignore[arg-type]
    except TypeError:  # also of what has the method and not the kind of value for it
        return False
    return True


def listed(value: object) -> object:
    """Arrays and tensors of one axis, or none, as Python's lists and numbers; all else as it is."""
    tolist = getattr(value, "tolist", None)
    return tolist() if callable(tolist) and getattr(value, "ndim", 2) < 2 else value


def check_known(names: Iterable[str]) -> None:
    """UsageError for the first of `names` that is no field."""
    import difflib

    for name in names:
        if name not in FIELDS:
            near = difflib.get_close_matches(name, FIELDS, n=1)
            remedy = f"nearest: {near[0]}" if near else None
            raise UsageError("argument", got=name, accepted=", ".join(FIELDS), remedy=remedy)
