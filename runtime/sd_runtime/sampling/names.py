"""The names people know samplers by, and the diffusers class and settings each one stands for.

Understood, in any capitalisation and with or without spaces, dashes and underscores: diffusers' class names
(`EulerAncestralDiscreteScheduler`), AUTOMATIC1111's labels (`DPM++ 2M Karras`), k-diffusion's and ComfyUI's function
names (`dpmpp_2m`, `sample_euler_ancestral`, `uni_pc`), with "karras" or "exponential" appended where the class has
such noise levels.

A class name changes the class and nothing else, as diffusers' `from_config` does.  Every other name also settles
solver, order and noise levels, whatever the checkpoint's file says: `dpmpp_2m` is never Karras, `dpmpp_2m_karras` is.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from functools import lru_cache

from ..errors import UsageError

Option = str | int | bool


@dataclass(frozen=True)
class SchedulerChoice:
    """What a name means: a diffusers class, the fields of its configuration that the name settles, and a label as
    AUTOMATIC1111 writes it into picture metadata."""

    class_name: str
    overrides: dict[str, Option]
    label: str


@dataclass(frozen=True)
class _Row:
    label: str
    class_name: str
    aliases: tuple[str, ...]
    note: str
    overrides: dict[str, Option] = field(default_factory=dict)
    warps: bool = False  # whether the class has use_karras_sigmas and use_exponential_sigmas


def _dpm(algorithm_type: str, order: int, solver_type: str = "midpoint") -> dict[str, Option]:
    return {"algorithm_type": algorithm_type, "solver_order": order, "solver_type": solver_type}


SCHEDULERS = (
    _Row("DDIM", "DDIMScheduler", ("ddim",), "deterministic, or stochastic with eta up to 1"),
    _Row("DDPM", "DDPMScheduler", ("ddpm",), "the original chain: many steps, noise at each"),
    _Row(
        "PLMS",
        "PNDMScheduler",
        ("plms", "pndm"),
        "pseudo linear multistep, Stable Diffusion 1's own",
        {"skip_prk_steps": True},
    ),
    _Row("Euler", "EulerDiscreteScheduler", ("euler",), "one slope a step", warps=True),
    _Row("Euler a", "EulerAncestralDiscreteScheduler", ("euler_a", "euler_ancestral"), "Euler, fresh noise each step"),
    _Row("LMS", "LMSDiscreteScheduler", ("lms",), "the last four slopes", warps=True),
    _Row("Heun", "HeunDiscreteScheduler", ("heun",), "two evaluations a step, second order", warps=True),
    _Row("DPM2", "KDPM2DiscreteScheduler", ("dpm2", "kdpm2"), "two evaluations a step, midpoint", warps=True),
    _Row(
        "DPM2 a",
        "KDPM2AncestralDiscreteScheduler",
        ("dpm2_a", "dpm2_ancestral", "kdpm2_ancestral"),
        "DPM2, fresh noise each step",
        warps=True,
    ),
    _Row(
        "DPM++ 2M",
        "DPMSolverMultistepScheduler",
        ("dpmpp_2m",),
        "second order, one evaluation a step",
        _dpm("dpmsolver++", 2),
        warps=True,
    ),
    _Row(
        "DPM++ 3M",
        "DPMSolverMultistepScheduler",
        ("dpmpp_3m",),
        "third order, one evaluation a step",
        _dpm("dpmsolver++", 3),
        warps=True,
    ),
    _Row(
        "DPM++ 2M SDE",
        "DPMSolverMultistepScheduler",
        ("dpmpp_2m_sde", "dpmpp_2m_sde_gpu"),
        "DPM++ 2M, fresh noise each step",
        _dpm("sde-dpmsolver++", 2),
        warps=True,
    ),
    _Row(
        "DPM++ 2M SDE Heun",
        "DPMSolverMultistepScheduler",
        ("dpmpp_2m_sde_heun", "dpmpp_2m_sde_heun_gpu"),
        "the same with Heun's correction",
        _dpm("sde-dpmsolver++", 2, "heun"),
        warps=True,
    ),
    _Row(
        "DPM++ SDE",
        "DPMSolverSDEScheduler",
        ("dpmpp_sde", "dpmpp_sde_gpu"),
        "two evaluations a step, fresh noise",
        warps=True,
    ),
    _Row(
        "DPM++ 2S",
        "DPMSolverSinglestepScheduler",
        ("dpmpp_2s",),
        "second order, steps in pairs",
        _dpm("dpmsolver++", 2),
        warps=True,
    ),
    _Row(
        "DPM++ 3S",
        "DPMSolverSinglestepScheduler",
        ("dpmpp_3s",),
        "third order, steps in triples",
        _dpm("dpmsolver++", 3),
        warps=True,
    ),
    _Row(
        "UniPC",
        "UniPCMultistepScheduler",
        ("unipc", "unipc_bh2"),
        "predictor and corrector, weighted by bh2 as in diffusers",
        {"solver_type": "bh2", "solver_order": 2},
        warps=True,
    ),
    _Row(
        "UniPC bh1",
        "UniPCMultistepScheduler",
        ("unipc_bh1",),
        "the same, weighted by bh1",
        {"solver_type": "bh1", "solver_order": 2},
        warps=True,
    ),
    _Row("DEIS", "DEISMultistepScheduler", ("deis",), "exponential integrator", {"solver_order": 2}, warps=True),
    _Row("LCM", "LCMScheduler", ("lcm",), "for latent consistency models, 2 to 8 steps"),
    _Row("TCD", "TCDScheduler", ("tcd",), "for trajectory consistency models, 2 to 8 steps"),
)

WARPS = {
    "karras": {"use_karras_sigmas": True, "use_exponential_sigmas": False},
    "exponential": {"use_karras_sigmas": False, "use_exponential_sigmas": True},
    "": {"use_karras_sigmas": False, "use_exponential_sigmas": False},
}


@lru_cache(maxsize=256)  # a hundred comparisons; a service asks for the same few again and again
def resolve(name: str) -> SchedulerChoice:
    """What `name` stands for; UsageError with the nearest names if nothing."""
    wanted = _squeeze(name)
    for row in SCHEDULERS:
        if wanted == _squeeze(row.class_name):
            return SchedulerChoice(row.class_name, {}, row.label)
    for warp, flags in WARPS.items():
        for row in SCHEDULERS:
            if wanted in (_squeeze(stem + warp) for stem in (row.label, *row.aliases)) and (row.warps or not warp):
                overrides = {**row.overrides, **(flags if row.warps else {})}
                return SchedulerChoice(row.class_name, overrides, f"{row.label} {warp.capitalize()}".rstrip())
    raise _unknown(name)


def describe() -> list[tuple[str, str]]:
    """(name, remark) of every sampler, in the order of `--list-schedulers`."""
    return [
        (row.aliases[0] + ("[_karras|_exponential]" if row.warps else ""), f"{row.label}: {row.note}")
        for row in SCHEDULERS
    ]


def _squeeze(name: str) -> str:
    """Lower case, ++ as pp, without what people vary: spaces, dashes, underscores, k-diffusion's and old prefixes."""
    plain = re.sub(r"[\s_\-./]", "", name.lower()).replace("++", "pp")
    return re.sub(r"^(sample|k(?=euler|lms|heun|dpm))", "", plain)


def _unknown(name: str) -> UsageError:
    known = {_squeeze(spelling): spelling for row in SCHEDULERS for spelling in (row.class_name, *row.aliases)}
    near = difflib.get_close_matches(_squeeze(name), known, n=3, cutoff=0.5)
    accepted = "nearest: " + ", ".join(known[n] for n in near) if near else "a name from --list-schedulers"
    return UsageError("scheduler", got=name, accepted=accepted, remedy="sd-run --list-schedulers shows all")
