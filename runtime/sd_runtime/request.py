"""Request: one validated call of the pipeline.  Every field has its unit and range here and nowhere else."""

from __future__ import annotations

import math
import numbers
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

from .bundle.manifest import Defaults
from .errors import UsageError
from .images.convert import Resize
from .noise import RNG, check_seed
from .prompt.tokenizer import check_text

MAX_STEPS = 1000
MAX_PICTURES = 1000
MAX_GUIDANCE = 100.0
DEFAULT_STRENGTH = 0.8  # of image to image, as in diffusers


@dataclass(frozen=True)
class Request:
    """What to draw.  Picture p·num_images_per_prompt + i has prompts[p], negative_prompts[p] and its own seed.

    num_inference_steps    1 … 1000
    guidance_scale         0 … 100; at most 1 means no classifier-free guidance, hence one UNet row a picture, not two;
                           latent consistency models are told it instead, and know no negative prompt
    guidance_rescale       0 … 1, share of the variance correction of arXiv 2305.08891, section 3.4
    eta                    0 … 1, share of fresh noise in DDIM and TCD steps; None leaves the sampler's own
    height, width          pixels, multiples of 8; the bundle limits them further
    scheduler              a name that `sd-run --list-schedulers` shows; None is the checkpoint's own
    rng                    whose noise a seed stands for: torch's CPU or CUDA generator
    strength               0 … 1, image-to-image only: share of the steps that are run; None is text to image
    resize                 how a picture is brought to height and width: "crop", "fit" or "stretch"
    prompt_weighting       read (word:1.3), [word] and BREAK as AUTOMATIC1111 does
    truncate               drop what exceeds 77 tokens, as diffusers does, rather than adding chunks
    fast_decoder           draw with the bundle's tiny decoder (TAESD): quicker, less exact
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
        _integer("num_images_per_prompt", self.num_images_per_prompt, 1, MAX_PICTURES)
        _integer("number of prompts", len(self.prompts), 1, MAX_PICTURES)
        _integer("number of pictures", self.num_images, 1, MAX_PICTURES)
        for prompt in self.prompts:
            check_text(prompt)
        for prompt in self.negative_prompts:
            check_text(prompt, "negative_prompt")
        _same_length("negative_prompt", len(self.negative_prompts), len(self.prompts))
        _same_length("seed", len(self.seeds), self.num_images)
        for seed in self.seeds:
            check_seed(seed)
        _integer("num_inference_steps", self.num_inference_steps, 1, MAX_STEPS)
        _number("guidance_scale", self.guidance_scale, 0.0, MAX_GUIDANCE)
        _number("guidance_rescale", self.guidance_rescale, 0.0, 1.0)
        if self.strength is not None:
            _number("strength", self.strength, 0.0, 1.0)
        if self.eta is not None:
            _number("eta", self.eta, 0.0, 1.0)
        _integer("height", self.height, 1, 1 << 16)
        _integer("width", self.width, 1, 1 << 16)
        _choice("rng", self.rng, get_args(RNG))
        _choice("resize", self.resize, get_args(Resize))

    @property
    def num_images(self) -> int:
        return len(self.prompts) * self.num_images_per_prompt

    def prompt_of(self, image: int) -> str:
        return self.prompts[image // self.num_images_per_prompt]

    def negative_prompt_of(self, image: int) -> str:
        return self.negative_prompts[image // self.num_images_per_prompt]


def make_request(
    defaults: Defaults,
    prompt: str | Sequence[str],
    *,
    negative_prompt: str | Sequence[str] | None = None,
    num_images_per_prompt: int = 1,
    seed: int | Sequence[int] | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    guidance_rescale: float = 0.0,
    eta: float | None = None,
    height: int | None = None,
    width: int | None = None,
    scheduler: str | None = None,
    rng: RNG = "cpu",
    strength: float | None = None,
    resize: Resize = "crop",
    prompt_weighting: bool = True,
    truncate: bool = False,
    fast_decoder: bool = False,
) -> Request:
    """A Request from the arguments of a call; what is None comes from the bundle's `defaults`.  UsageError otherwise.

    One negative prompt serves all prompts.  One seed makes picture i from seed + i; None draws a seed at random.
    """
    prompts = (prompt,) if isinstance(prompt, str) else _sequence("prompt", prompt)
    negatives = "" if negative_prompt is None else negative_prompt
    _integer("num_images_per_prompt", num_images_per_prompt, 1, MAX_PICTURES)
    return Request(
        prompts=prompts,
        negative_prompts=(negatives,) * len(prompts)
        if isinstance(negatives, str)
        else _sequence("negative_prompt", negatives),
        seeds=_seeds(seed, len(prompts) * num_images_per_prompt),
        num_images_per_prompt=num_images_per_prompt,
        num_inference_steps=defaults.num_inference_steps if num_inference_steps is None else num_inference_steps,
        guidance_scale=defaults.guidance_scale if guidance_scale is None else guidance_scale,
        height=defaults.height if height is None else height,
        width=defaults.width if width is None else width,
        guidance_rescale=guidance_rescale,
        eta=eta,
        scheduler=scheduler,
        rng=rng,
        strength=strength,
        resize=resize,
        prompt_weighting=prompt_weighting,
        truncate=truncate,
        fast_decoder=fast_decoder,
    )


def _seeds(seed: int | Sequence[int] | None, count: int) -> tuple[int, ...]:
    if seed is None:
        seed = secrets.randbelow(2**32)
    if isinstance(seed, numbers.Integral):
        first = check_seed(seed)
        return tuple(range(first, first + count))
    return _sequence("seed", seed)


def _sequence(name: str, value: object) -> tuple[Any, ...]:
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise UsageError(name, got=value, accepted="one value, or a list with one for each")
    return tuple(value)


def _same_length(name: str, got: int, wanted: int) -> None:
    if got != wanted:
        raise UsageError(f"number of {name}s", got=got, accepted=f"1 or {wanted}, one for each")


def _choice(name: str, value: object, accepted: Sequence[str]) -> None:
    if value not in accepted:
        raise UsageError(name, got=value, accepted=", ".join(accepted))


def _integer(name: str, value: object, low: int, high: int) -> None:
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or not low <= int(value) <= high:  # type: ignore[call-overload]
        raise UsageError(name, got=value, accepted=f"whole numbers from {low} to {high}")


def _number(name: str, value: object, low: float, high: float) -> None:
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real or not math.isfinite(value) or not low <= value <= high:  # type: ignore[arg-type,operator]
        raise UsageError(name, got=value, accepted=f"numbers from {low:g} to {high:g}")
