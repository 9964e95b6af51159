"""From what a picture says about itself back to settings; `provenance` is the way there."""

from __future__ import annotations

from typing import Any

from ..errors import UsageError
from ..fields import FIELDS
from ..images.metadata import Parameters
from ..prompt.foreign import Instruction, without_networks
from ..provenance import OWN_SCHEDULER, UNREPEATABLE, is_ours
from ..sampling import resolve
from ..sampling.registry import BY_CLASS
from .settings import Settings


def recall(parameters: Parameters) -> tuple[Settings, list[str]]:
    """The settings that a picture tells, and what it tells beyond them, as "name: value".

    Of other programs' pictures, what is not understood is left out.  They are taken for AUTOMATIC1111's, which draws
    with the GPU's noise unless it says otherwise."""
    ours, extra = is_ours(parameters), dict(parameters.extra)
    prompts, networks = (parameters.prompt, parameters.negative_prompt), list[Instruction]()
    if not ours:  # ours were read as what they say
        (prompt, networks), (negative, others) = map(without_networks, prompts)
        prompts, networks = (prompt, negative), [*networks, *others]
    options: dict[str, Any] = {
        "negative_prompt": prompts[1],
        "seed": parameters.seed,
        "num_inference_steps": parameters.num_inference_steps,
        "guidance_scale": parameters.guidance_scale,
        "height": parameters.height,
        "width": parameters.width,
        "rng": parameters.rng or (None if ours else "cuda"),
        "scheduler": _recall_scheduler(parameters.scheduler, extra, ours=ours),
    }
    for name, field in FIELDS.items():
        if field.label and _counts(name, parameters, options["scheduler"], ours=ours):
            value = field.from_metadata(extra.get(field.label, ""))
            if value is not None:
                options[name] = value
                del extra[field.label]
    grid = extra.pop("Grid", None)
    rest = [*map(str, networks), *(f"{key}: {value}" for key, value in extra.items() if key not in UNREPEATABLE)]
    said = {name: value for name, value in options.items() if value is not None}
    return Settings(prompt=prompts[0], grid=grid, options=said), rest


def _counts(name: str, parameters: Parameters, scheduler: str | None, *, ours: bool) -> bool:
    """Whether what a picture tells of a field is about the picture as it would be drawn here."""
    if name == "strength":  # of other programs' pictures perhaps that of a second pass, over an enlarged picture
        return ours or not any(key.startswith("Hires") for key in parameters.extra)
    if name == "eta":
        own = scheduler is None and (ours or parameters.scheduler is None)
        return own or (scheduler is not None and BY_CLASS[resolve(scheduler).class_name].default_eta is not None)
    return True


def _recall_scheduler(label: str | None, extra: dict[str, str], *, ours: bool) -> str | None:
    """The sampler's name; one that cannot be had is put into `extra`."""
    name = extra.pop("Scheduler", label) if ours else label
    if name is None or (ours and name == OWN_SCHEDULER):
        return None
    stem, _, levels = name.rpartition(" ")
    for known, left in ((name, {}), (stem, {"Schedule type": levels})):  # a sampler that has no such noise levels here
        if known and (not left or levels in ("Karras", "Exponential")):
            try:
                resolve(known)
            except UsageError:
                continue
            extra.update(left)
            return known
    extra["Sampler"] = name
    return None


def differences(recorded: Parameters, repeated: Parameters) -> list[str]:
    """Why a picture drawn from what another `recorded` will not equal it, as "name: there, here"; empty if it will."""
    rows = [("Model hash", recorded.model_hash, repeated.model_hash), ("Version", recorded.version, repeated.version)]
    if not is_ours(recorded):
        rows.pop()
    rows += [(key, recorded.extra.get(key), repeated.extra.get(key)) for key in UNREPEATABLE]
    return [
        f"{key}: {there or 'none'}, here {here or 'none'}"
        for key, there, here in rows
        if (there or here) and there != here
    ]
