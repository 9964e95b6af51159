"""Samplers: the names people use, the configuration files they come in, and the plans they compile to.

    registry, entry          every sampler as one entry: its step, path, options and names
    names, options, config   what was asked for: "dpmpp_2m_karras", scheduler_config.json
    schedule, path           which noise levels are visited
    samplers, dpm_solver,    how a step is made: read these to learn how diffusion sampling works
    er_sde
    plan, make               any of them as one table of numbers

Of the samplers that diffusers has, the results are those of its schedulers, quirks included, to float32 rounding:
test_schedulers_parity compares them and lists every exception with its reason.  The others are held against their
papers in test_samplers_without_reference.  Where a user can notice an exception:

    image to image with LMS     starts at order 1; diffusers weighs slopes that it does not have
    trailing at 62 step counts  has no timestep −1 at the end
    DPM++ SDE                   takes its noise from the request's seed; diffusers' Brownian tree has a seed of its own
    UniPC bh1, DDIM at eta 1    finite where diffusers returns NaN (ending at σ = 0; zero terminal SNR)

Nothing is imported before it is used, so that listing samplers does not load numpy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import SchedulerConfig
    from .make import make_plan
    from .names import SchedulerChoice, describe, resolve
    from .plan import SamplingPlan

__all__ = ["SamplingPlan", "SchedulerChoice", "SchedulerConfig", "describe", "make_plan", "resolve"]

_HOMES = {
    "SamplingPlan": "plan",
    "SchedulerConfig": "config",
    "make_plan": "make",
    "SchedulerChoice": "names",
    "describe": "names",
    "resolve": "names",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
