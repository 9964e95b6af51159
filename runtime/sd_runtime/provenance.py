"""From a request to what its pictures say about themselves.  `cli.recall` is the way back.

What AUTOMATIC1111's text has no name for is told by names of our own, and only where it differs from what is usual, so
that ordinary pictures stay short to read:

    Scheduler             the sampler by the name it was asked for, where "Sampler" would not give the same one
    Guidance rescale, Eta, Denoising strength, Resize mode        fields of the request, by their labels in `FIELDS`
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

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ._version import __version__
from .bundle.manifest import Manifest
from .errors import SDError
from .fields import FIELDS
from .images.metadata import Parameters
from .inputs import Inputs, digest
from .loop.guidance import Guidance
from .prompt.normalization import normalize
from .request import Request
from .sampling import SchedulerConfig, resolve
from .tensor import Array

PROGRAM = "sd-lean"
OWN_SCHEDULER = "the model's"
SAFETY_CHECKER = "Safety checker"  # what it found; nothing is said where none was asked
STOPPED = "Stopped after"

# What only this program's pictures tell, that no setting brings back: if it differs, so does the picture.
UNREPEATABLE = ("Init image hash", "Latents hash", "TI hashes", "VAE", SAFETY_CHECKER, STOPPED)


def describe(
    request: Request,
    image: int,
    inputs: Inputs,
    guidance: Guidance,
    *,
    manifest: Manifest,
    own_scheduler: SchedulerConfig,
    inversions: Mapping[str, Array],
) -> Parameters:
    """What picture `image` of a request should say about itself: what it was drawn with, see `unused`."""
    if unused(request, guidance):
        request = replace(request, negative_prompts=("",) * len(request.prompts), guidance_rescale=0.0)
    used = own_scheduler if request.scheduler is None else own_scheduler.switched(resolve(request.scheduler))
    prompts = request.prompt_of(image), request.negative_prompt_of(image)
    extra = {
        "Scheduler": None if _named_by_label(used, own_scheduler) else request.scheduler or OWN_SCHEDULER,
        **{field.label: field.to_metadata(getattr(request, name)) for name, field in FIELDS.items() if field.label},
        "Init image hash": None if inputs.pictures is None else digest(inputs.pictures[inputs.row_of(request, image)]),
        "Latents hash": None if inputs.latents is None else digest(inputs.latents[image]),
        "VAE": manifest.parts["vae"].id if "vae" in manifest.parts else None,
        "TI hashes": _hashes(prompts, inversions),
    }
    if request.strength is None:  # there is no picture to resize
        extra[FIELDS["resize"].label] = None
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
        extra={key: value for key, value in extra.items() if value is not None},
    )


def unused(request: Request, guidance: Guidance) -> list[str]:
    """What a request asks for that its pictures do not depend on, a line for people each.

    Without two predictions to combine there is nothing that a negative prompt could say, and nothing to rescale."""
    if guidance.on:
        return []
    asked = {"negative_prompt": any(request.negative_prompts), "guidance_rescale": request.guidance_rescale > 0}
    off = f"with a `guidance_scale` of {request.guidance_scale:g} guidance is off, it takes more than 1"
    why = off if guidance.width is None else "this model guides itself by its prompt alone"
    return [f"`{name}` is not used: {why}" for name, said in asked.items() if said]


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


def is_ours(parameters: Parameters) -> bool:
    """Whether this program, of whatever version, drew the picture."""
    return (parameters.version or "").startswith(f"{PROGRAM} ")
