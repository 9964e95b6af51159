"""What an entry of the registry says about a sampler: how it steps, where, with which options, and what it is called.

An entry is plain data and loads no numpy: its step function is told by name, "samplers.euler" for the function `euler`
of the module `samplers`, and is imported when the first plan is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from .config import SchedulerConfig

Option = str | int | bool
PathFamily = Literal["ddim", "ddpm", "pndm", "distilled", "euler", "dpm"]  # see `path` and `make.make_path`
Keywords = Callable[["SchedulerConfig"], Mapping[str, Any]]


def no_keywords(config: SchedulerConfig) -> Mapping[str, Any]:
    """The keyword arguments of a step function that has no settings: none."""
    return {}


@dataclass(frozen=True)
class Preset:
    """A name that people know a sampler by, with the settings that it stands for.

    label      as AUTOMATIC1111 writes it into picture metadata
    aliases    other names; the first one is the name in `--list-schedulers`
    note       what is special about it, for that list
    overrides  the fields of the configuration that the name settles, whatever the checkpoint's file says
    """

    label: str
    aliases: tuple[str, ...]
    note: str
    overrides: Mapping[str, Option] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """A step function on a family of paths, with its options; one sampler may have several presets.

    diffusers_class  the class in diffusers that computes the same; None if diffusers has no such sampler
    presets          its names, at least one
    step             the step function, "module.function" in this package
    keywords         the step function's keyword arguments, from the configuration; eta excepted
    default_eta      what eta is unless a request sets it; None if the step takes no eta from a request
    path             the family of its paths
    honoured         the options computed here, and their defaults; fields of `SchedulerConfig`
    fixed            the options computed in one way only: which of `options.ACCEPTED` it has
    spellings        option → the values in a file, some carried over from other classes → what they mean
    ends_at_sigma_min         the last step ends at the smallest σ of training, whatever the options say
    rounds_karras_timesteps   on paths of the Euler family, the timesteps of Karras sigmas are whole numbers
    lifts_zero_snr            zero terminal SNR: the last ᾱ is 2^-24 (see `schedule.LIFTED_ALPHA`)
    """

    diffusers_class: str | None
    presets: tuple[Preset, ...]
    step: str
    path: PathFamily
    honoured: Mapping[str, Any]
    fixed: tuple[str, ...] = ()
    keywords: Keywords = no_keywords
    default_eta: float | None = None
    spellings: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    ends_at_sigma_min: bool = False
    rounds_karras_timesteps: bool = False
    lifts_zero_snr: bool = False

    @property
    def class_name(self) -> str:
        """What `SchedulerConfig.class_name` calls it: diffusers' class or, where there is none, its own first name."""
        return self.diffusers_class or self.presets[0].aliases[0]

    @property
    def warps(self) -> bool:
        """Whether "karras" and "exponential" can follow its names."""
        return "use_karras_sigmas" in self.honoured
