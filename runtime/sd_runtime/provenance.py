"""From a request to what its pictures say about themselves (`describe`), and back to settings (`recall`).

What AUTOMATIC1111's text has no name for is told by names of our own, and only where it differs from what is usual, so
that ordinary pictures stay short to read:

    Scheduler             the sampler by the name it was asked for, where "Sampler" would not give the same one
    Guidance rescale, Eta, Denoising strength, Resize mode        as in `Request`
    Init image hash       of the picture that was changed, in the size that it was brought to
    Latents hash          of the noise that was given instead of the seed's
    Emphasis: None        prompts were taken literally;  Truncate: 77    cut at that many tokens
    TI hashes             textual inversions that the prompts speak of: word: hash, word: hash
    VAE                   where it is not the checkpoint's own;  VAE Decoder: TAESD    the fast one was used
    Safety checker        passed, or blacked out
    Grid                  the picture is a sheet of ROWSxCOLS, the first of which has these settings
    Grid pictures         how many pictures are on a sheet that is not full
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

from . import __version__
from .errors import SDError, UsageError
from .image import Resize
from .inputs import Inputs, digest
from .manifest import Manifest
from .metadata import Parameters, shortest
from .prompt.normalization import normalize
from .request import Request
from .sampling import SchedulerConfig, resolve
from .sampling.registry import BY_CLASS
from .settings import Settings
from .tensor import Array

PROGRAM = "sd-lean"
OWN_SCHEDULER = "the model's"
FAST_DECODER = "TAESD"  # as AUTOMATIC1111 says it
SAFETY_CHECKER = "Safety checker"  # what it found; nothing is said where none was asked
NO_EMPHASIS = "None"  # AUTOMATIC1111's value for prompts that are taken literally

# What only this program's pictures tell, that no setting brings back: if it differs, so does the picture.
WITNESSES = ("Init image hash", "Latents hash", "TI hashes", "VAE", SAFETY_CHECKER, "Stopped after")


def describe(
    request: Request,
    image: int,
    inputs: Inputs,
    *,
    manifest: Manifest,
    own_scheduler: SchedulerConfig,
    inversions: Mapping[str, Array],
) -> Parameters:
    """What picture `image` of a request should say about itself."""
    used = own_scheduler if request.scheduler is None else own_scheduler.switched(resolve(request.scheduler))
    prompts = request.prompt_of(image), request.negative_prompt_of(image)
    told = {
        "Scheduler": None if _named_by_label(used, own_scheduler) else request.scheduler or OWN_SCHEDULER,
        "Guidance rescale": shortest(request.guidance_rescale) if request.guidance_rescale else None,
        "Eta": None if request.eta is None else shortest(request.eta),
        "Denoising strength": None if request.strength is None else shortest(request.strength),
        "Resize mode": None if request.strength is None or request.resize == "crop" else request.resize,
        "Init image hash": None if inputs.pictures is None else digest(inputs.pictures[inputs.row_of(request, image)]),
        "Latents hash": None if inputs.latents is None else digest(inputs.latents[image]),
        "Emphasis": None if request.prompt_weighting else NO_EMPHASIS,
        "Truncate": "77" if request.truncate else None,
        "VAE": manifest.parts["vae"].id if "vae" in manifest.parts else None,
        "VAE Decoder": FAST_DECODER if request.fast_decoder else None,
        "TI hashes": _hashes(prompts, inversions),
    }
    return Parameters(
        prompt=prompts[0],
        negative_prompt=prompts[1],
        num_inference_steps=request.num_inference_steps,
        scheduler=used.label,
        guidance_scale=request.guidance_scale,
        seed=request.seeds[image],
        width=request.width,
        height=request.height,
        model=manifest.name,
        model_hash=manifest.model_hash,
        rng=request.rng,
        version=f"{PROGRAM} {__version__}",
        extra={key: value for key, value in told.items() if value is not None},
    )


def _named_by_label(used: SchedulerConfig, own: SchedulerConfig) -> bool:
    """Whether the label of `used`, taken as a name, leads from the model's own scheduler to the same settings."""
    try:
        named = own.switched(resolve(used.label))
    except SDError:
        return False
    return replace(named, original="") == replace(used, original="")


def _hashes(prompts: Sequence[str], inversions: Mapping[str, Array]) -> str | None:
    """`word: hash` of the textual inversions that the prompts speak of; None without any."""
    text = normalize(" ".join(prompts))
    return ", ".join(f"{word}: {digest(v)}" for word, v in inversions.items() if normalize(word) in text) or None


def recall(parameters: Parameters) -> tuple[Settings, list[str]]:
    """The settings that a picture tells, and what it tells beyond them, as "name: value".

    Of other programs' pictures, what is not understood is left out.  They are taken for AUTOMATIC1111's, which draws
    with the GPU's noise unless it says otherwise."""
    ours = is_ours(parameters)
    extra = dict(parameters.extra)
    if not ours and any(key.startswith("Hires") for key in extra):
        strength = None  # of a second pass over an enlarged picture
    else:
        strength = _take_number(extra, "Denoising strength")
    scheduler, eta = _recall_scheduler(parameters.scheduler, extra, ours=ours)
    return Settings(
        prompt=parameters.prompt,
        negative_prompt=parameters.negative_prompt,
        seed=parameters.seed,
        num_inference_steps=parameters.num_inference_steps,
        guidance_scale=parameters.guidance_scale,
        guidance_rescale=_take_number(extra, "Guidance rescale"),
        eta=eta,
        height=parameters.height,
        width=parameters.width,
        scheduler=scheduler,
        rng=parameters.rng or (None if ours else "cuda"),
        strength=strength,
        resize=_take(extra, "Resize mode", get_args(Resize)),
        prompt_weighting=_take(extra, "Emphasis", (NO_EMPHASIS,)) is None,
        truncate=_take(extra, "Truncate", ("77",)) is not None,
        fast_decoder=_take(extra, "VAE Decoder", (FAST_DECODER,)) is not None,
        grid=extra.pop("Grid", None),
    ), [f"{key}: {value}" for key, value in extra.items() if key not in WITNESSES]


def is_ours(parameters: Parameters) -> bool:
    """Whether this program, of whatever version, drew the picture."""
    return (parameters.version or "").startswith(f"{PROGRAM} ")


def _recall_scheduler(label: str | None, extra: dict[str, str], *, ours: bool) -> tuple[str | None, float | None]:
    """The sampler's name and eta; what cannot be had is put into `extra`."""
    name = extra.pop("Scheduler", label) if ours else label
    if name is None or (ours and name == OWN_SCHEDULER):
        return None, _take_number(extra, "Eta")
    try:
        choice = resolve(name)
    except UsageError:
        extra["Sampler"] = name
        return None, None
    return name, _take_number(extra, "Eta") if BY_CLASS[choice.class_name].default_eta is not None else None


def _take(extra: dict[str, str], key: str, known: Sequence[str]) -> Any:
    """The value of `key` if it is a `known` one, which then is understood; else None."""
    return extra.pop(key) if extra.get(key) in known else None


def _take_number(extra: dict[str, str], key: str) -> float | None:
    """The value of `key` if it is a number from 0 to 1."""
    if not re.fullmatch(r"0(\.\d{1,20})?|1(\.0{1,20})?|[1-9](\.\d{1,20})?e-\d{1,2}", extra.get(key, "")):
        return None
    return float(extra.pop(key))


def differences(told: Parameters, repeated: Parameters) -> list[str]:
    """Why a picture drawn from what another `told` will not equal it, as "name: there, here"; empty if it will."""
    rows = [("Model hash", told.model_hash, repeated.model_hash), ("Version", told.version, repeated.version)]
    if not is_ours(told):
        rows.pop()
    rows += [(key, told.extra.get(key), repeated.extra.get(key)) for key in WITNESSES]
    return [
        f"{key}: {there or 'none'}, here {here or 'none'}"
        for key, there, here in rows
        if (there or here) and there != here
    ]
