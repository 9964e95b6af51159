"""From the names people know samplers by to a sampler and its settings.

Understood, in any capitalisation and with or without spaces, dashes and underscores: diffusers' class names
(`EulerAncestralDiscreteScheduler`), AUTOMATIC1111's labels (`DPM++ 2M Karras`), k-diffusion's and ComfyUI's function
names (`dpmpp_2m`, `sample_euler_ancestral`, `uni_pc`), with "karras" or "exponential" appended where the sampler has
such noise levels.

A class name changes the class and nothing else, as diffusers' `from_config` does.  Every other name also settles
solver, order and noise levels, whatever the checkpoint's file says: `dpmpp_2m` is never Karras, `dpmpp_2m_karras` is.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from ..errors import UsageError
from ..fields import check
from .entry import Option
from .registry import BY_CLASS, PRESETS


@dataclass(frozen=True)
class SchedulerChoice:
    """What a name means: a sampler of the registry by its class name, the fields of its configuration that the name
    settles, and a label as AUTOMATIC1111 writes it into picture metadata."""

    class_name: str
    overrides: Mapping[str, Option]
    label: str

    def reference_class(self) -> str:
        """The class in diffusers that computes the same; UsageError if diffusers has no such sampler."""
        name = BY_CLASS[self.class_name].diffusers_class
        if name is None:
            raise UsageError(
                f"scheduler: diffusers has no {self.label}, so there is no reference to compare with",
                remedy="choose a sampler that diffusers has, such as euler_a or dpmpp_2m",
            )
        return name


WARPS: dict[str, dict[str, Option]] = {  # what follows a name → the noise levels it stands for
    "karras": {"use_karras_sigmas": True, "use_exponential_sigmas": False},
    "exponential": {"use_karras_sigmas": False, "use_exponential_sigmas": True},
    "": {"use_karras_sigmas": False, "use_exponential_sigmas": False},
}


def resolve(name: str) -> SchedulerChoice:
    """What `name` stands for; UsageError with the nearest names if nothing, or for what is no text."""
    check("scheduler", name)
    return _resolve(name)


@lru_cache(maxsize=256)  # a hundred comparisons; a service asks for the same few again and again
def _resolve(name: str) -> SchedulerChoice:
    wanted = _squeeze(name)
    for sampler, preset in PRESETS:
        if sampler.diffusers_class is not None and wanted == _squeeze(sampler.diffusers_class):
            return SchedulerChoice(sampler.class_name, {}, preset.label)
    for warp, flags in WARPS.items():
        for sampler, preset in PRESETS:
            spellings = (_squeeze(stem + warp) for stem in (preset.label, *preset.aliases))
            if wanted in spellings and (sampler.warps or not warp):
                overrides = {**preset.overrides, **(flags if sampler.warps else {})}
                return SchedulerChoice(sampler.class_name, overrides, f"{preset.label} {warp.capitalize()}".rstrip())
    raise _unknown(name)


def describe() -> list[tuple[str, str]]:
    """(name, remark) of every preset, in the order of `--list-schedulers`."""
    return [
        (
            preset.aliases[0] + ("[_karras|_exponential]" if sampler.warps else ""),
            f"{preset.label}: {preset.note}" + ("" if sampler.diffusers_class else " (not in diffusers)"),
        )
        for sampler, preset in PRESETS
    ]


def _squeeze(name: str) -> str:
    """Lower case, ++ as pp, without what people vary: spaces, dashes, underscores, k-diffusion's and old prefixes."""
    plain = re.sub(r"[\s_\-./]", "", name.lower()).replace("++", "pp")
    return re.sub(r"^(sample|k(?=euler|lms|heun|dpm))", "", plain)


def _unknown(name: str) -> UsageError:
    spellings = [s for sampler, preset in PRESETS for s in (sampler.class_name, *preset.aliases)]
    known = {_squeeze(spelling): spelling for spelling in spellings}
    near = difflib.get_close_matches(_squeeze(name), known, n=3, cutoff=0.5)
    accepted = "nearest: " + ", ".join(known[n] for n in near) if near else "a name that sd-run --list-schedulers shows"
    return UsageError("scheduler", got=name, accepted=accepted, remedy="sd-run --list-schedulers shows all")
