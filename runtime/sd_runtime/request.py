"""Request: one validated call of the pipeline, and how it is made of the arguments of a call.

The fields' types, ranges, defaults and help stand in `fields`."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypedDict

from .errors import UsageError
from .fields import FIELDS, RNG, Resize, check, check_count, check_known, check_seed, check_text, is_integer, listed

if TYPE_CHECKING:
    from typing_extensions import Unpack


DEFAULT_STRENGTH = 0.8  # of image to image, as in diffusers


@dataclass(frozen=True)
class Defaults:
    """What a checkpoint's authors recommend, for what a request leaves out.  UsageError: out of the fields' ranges."""

    num_inference_steps: int
    guidance_scale: float
    height: int
    width: int

    def __post_init__(self) -> None:
        for name in ("num_inference_steps", "guidance_scale", "height", "width"):
            check(name, getattr(self, name))


class Options(TypedDict, total=False):
    """The arguments of a call beside its prompt, all of which may be left out or None; see `fields.FIELDS`.

    One negative prompt serves all prompts.  One seed makes picture i from seed + i, a list has one for each."""

    negative_prompt: str | Sequence[str] | None
    num_images_per_prompt: int | None
    seed: int | Sequence[int] | None
    num_inference_steps: int | None
    guidance_scale: float | None
    guidance_rescale: float | None
    eta: float | None
    height: int | None
    width: int | None
    scheduler: str | None
    rng: RNG | None
    strength: float | None
    resize: Resize | None
    prompt_weighting: bool | None
    truncate: bool | None
    fast_decoder: bool | None


@dataclass(frozen=True)
class Request:
    """What to draw.  Picture p·num_images_per_prompt + i has prompts[p], negative_prompts[p] and its own seed.

    num_inference_steps    1 … 1000
    guidance_scale         0 … 100; at most 1 means no classifier-free guidance, hence one UNet row a picture, not two;
                           latent consistency models are told it instead, and know no negative prompt
    guidance_rescale       0 … 1, share of the variance correction of arXiv 2305.08891, section 3.4
    eta                    0 … 1, share of fresh noise in DDIM and TCD steps; None leaves the sampler's own
    height, width          pixels, multiples of 8; the bundle limits them further
    scheduler              a sampler's name, see `sampling.describe`; None is the checkpoint's own
    rng                    whose noise a seed stands for: torch's CPU or CUDA generator
    strength               0 … 1, image-to-image only: share of the steps that are run; None is text to image
    resize                 how a picture is brought to height and width: "crop", "fit" or "stretch"
    prompt_weighting       read (word:1.3), [word] and BREAK as AUTOMATIC1111 does
    truncate               drop what exceeds 77 tokens, as diffusers does, rather than adding chunks
    fast_decoder           draw with the bundle's tiny decoder (TAESD): quicker, less exact

    UsageError: a field out of its range, or lists of different lengths.
    """

    prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    num_images_per_prompt: int
    num_inference_steps: int
    guidance_scale: float
    height: int
    width: int
    guidance_rescale: float = 0.0
    eta: float | None = None
    scheduler: str | None = None
    rng: RNG = "cpu"
    strength: float | None = None
    resize: Resize = "crop"
    prompt_weighting: bool = True
    truncate: bool = False
    fast_decoder: bool = False

    def __post_init__(self) -> None:
        check("num_images_per_prompt", self.num_images_per_prompt)
        check_count("number of prompts", len(self.prompts))
        check_count("number of pictures", self.num_images)
        for name, texts in (("prompt", self.prompts), ("negative_prompt", self.negative_prompts)):
            for text in texts:
                check_text(text, name)
        _same_length("negative_prompt", len(self.negative_prompts), len(self.prompts))
        _same_length("seed", len(self.seeds), self.num_images)
        for seed in self.seeds:
            check_seed(seed)
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in FIELDS and not (value is None and field.default is None):
                check(field.name, value)

    @property
    def num_images(self) -> int:
        return len(self.prompts) * self.num_images_per_prompt

    def prompt_of(self, image: int) -> str:
        return self.prompts[image // self.num_images_per_prompt]

    def negative_prompt_of(self, image: int) -> str:
        return self.negative_prompts[image // self.num_images_per_prompt]


def make_request(defaults: Defaults, prompt: str | Sequence[str], **options: Unpack[Options]) -> Request:
    """A Request from the arguments of a call; what is None or left out comes from `defaults`, then from `FIELDS`.

    UsageError: an argument that is out of range, or that there is none of."""
    check_known(options)
    said: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    prompts = (prompt,) if isinstance(prompt, str) else _sequence("prompt", prompt)
    negatives, seed = said.pop("negative_prompt", ""), said.pop("seed", None)
    usual = {name: getattr(defaults, name, field.default) for name, field in FIELDS.items()}
    count = said.get("num_images_per_prompt", usual["num_images_per_prompt"])
    check("num_images_per_prompt", count)
    return Request(
        prompts=prompts,
        negative_prompts=(negatives,) * len(prompts)
        if isinstance(negatives, str)
        else _sequence("negative_prompt", negatives),
        seeds=_seeds(seed, len(prompts) * count),
        **{name: said.get(name, value) for name, value in usual.items() if name not in ("negative_prompt", "seed")},
    )


def check_request(value: object) -> None:
    """UsageError unless `value` is a Request."""
    if not isinstance(value, Request):
        remedy = "call the pipeline with the prompt itself, or make a request of it with make_request"
        raise UsageError("request", got=repr(value), accepted="a Request", remedy=remedy)


def _seeds(seed: int | Sequence[int] | None, count: int) -> tuple[int, ...]:
    seed = listed(secrets.randbelow(2**32) if seed is None else seed)  # type: ignore[assignment]
    if is_integer(seed):
        first = check_seed(seed)
        return tuple(range(first, first + count))
    return _sequence("seed", seed)


def _sequence(name: str, value: object) -> tuple[Any, ...]:
    value = listed(value)
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        got = value if value is not None else "None"
        raise UsageError(name, got=got, accepted="one value, or a list with one for each")
    return tuple(value)


def _same_length(name: str, got: int, wanted: int) -> None:
    if got != wanted:
        raise UsageError(f"number of {name}s", got=got, accepted=f"1 or {wanted}, one for each")
