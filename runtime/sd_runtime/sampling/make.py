"""From a scheduler's configuration and a number of steps to a plan: which step function, on which path."""

from __future__ import annotations

from functools import lru_cache, partial
from importlib import import_module

import numpy as np

from ..errors import BundleError, UsageError
from .config import SchedulerConfig
from .path import (
    SamplingPath,
    Spacing,
    ddim_path,
    ddpm_path,
    distilled_path,
    dpm_path,
    euler_path,
    exponential_sigmas,
    karras_sigmas,
    pndm_path,
)
from .plan import SamplingPlan, compile_plan
from .registry import BY_CLASS, SAMPLERS
from .samplers import StepFunction
from .schedule import NoiseSchedule


@lru_cache(maxsize=64)
def make_plan(
    config: SchedulerConfig,
    num_inference_steps: int,
    *,
    strength: float = 1.0,
    eta: float | None = None,
    keep_steps: bool = False,
) -> SamplingPlan:
    """The plan of a text-to-image run, or of an image-to-image run that starts at `strength` (0 … 1] of the noise.

    num_inference_steps counts the whole path; strength s leaves int(s · num_inference_steps) steps of it, as diffusers
    does.  With `keep_steps`, which LCM and TCD alone heed, all steps are spread over what strength leaves of the path,
    as in diffusers' pipeline for latent consistency models.  eta, 0 … 1: how much fresh noise DDIM (default 0) and TCD
    (default 0.3) add; the others have none to set.
    Plans are cached, and shared: their arrays are read-only.  UsageError if the sampler cannot do this many steps.
    """
    step, path = make_sampler(config, num_inference_steps, strength=strength, eta=eta, keep_steps=keep_steps)
    return compile_plan(step, path, config.prediction_type)


def make_sampler(
    config: SchedulerConfig,
    num_inference_steps: int,
    *,
    strength: float = 1.0,
    eta: float | None = None,
    keep_steps: bool = False,
) -> tuple[StepFunction, SamplingPath]:
    """The step function and the path that `make_plan` compiles."""
    check_steps(config, num_inference_steps)
    check_strength(strength)
    if keep_steps and BY_CLASS[config.class_name].path == "distilled":
        skip, share = 0, strength
    else:
        skip, share = num_inference_steps - steps_at_strength(num_inference_steps, strength), 1.0
    schedule = NoiseSchedule.from_config(config)
    if not (np.diff(schedule.sigmas, prepend=0) > 0).all():
        raise BundleError(
            "training noise schedule", got=config.beta_schedule, accepted="σ that rises at every timestep"
        )
    path = make_path(config, schedule, num_inference_steps, skip, share)
    if path.sigmas[0] > 1e9 and config.prediction_type == "epsilon":
        raise UsageError(
            "a schedule of zero terminal SNR cannot start from epsilon predictions",
            got=f"{config.class_name}, prediction_type epsilon",
            accepted="prediction_type v_prediction",
            remedy="choose a sampler such as Euler, or timestep_spacing leading",
        )
    return make_step(config, eta), path


def make_step(config: SchedulerConfig, eta: float | None = None) -> StepFunction:
    """The step function of a configuration, its settings bound."""
    sampler = BY_CLASS[config.class_name]
    keywords = dict(sampler.keywords(config))
    if sampler.default_eta is not None:
        keywords["eta"] = sampler.default_eta if eta is None else eta
        if not 0 <= keywords["eta"] <= 1:
            raise UsageError("eta", got=eta, accepted="0 to 1")
    elif eta is not None:
        named = " and ".join(other.presets[0].aliases[0] for other in SAMPLERS if other.default_eta is not None)
        raise UsageError(f"`eta` for a sampler without one, as all but {named}", got=eta, remedy="leave it out")
    module, function = sampler.step.split(".")
    step: StepFunction = getattr(import_module(f".{module}", __package__), function)
    return partial(step, **keywords)


def make_path(
    config: SchedulerConfig, schedule: NoiseSchedule, count: int, skip: int = 0, share: float = 1.0
) -> SamplingPath:
    """The path of a configuration, without its first `skip` steps; of LCM and TCD within the last `share` of it."""
    sampler, spacing, offset = BY_CLASS[config.class_name], config.timestep_spacing, config.steps_offset
    at_sigma_min = config.final_sigmas_type == "sigma_min" or not config.set_alpha_to_one or sampler.ends_at_sigma_min
    final = float(schedule.sigmas[0]) if at_sigma_min else 0.0
    warp: Spacing | None = None
    if config.use_karras_sigmas or config.use_exponential_sigmas:
        warp = karras_sigmas if config.use_karras_sigmas else exponential_sigmas
    if sampler.path == "pndm":
        return pndm_path(schedule, count, spacing, offset, final_sigma=final, skip=skip)
    if sampler.path == "ddim":
        path = ddim_path(schedule, count, spacing, offset, final_sigma=final)
    elif sampler.path == "ddpm":
        path = ddpm_path(schedule, count, spacing, offset)
    elif sampler.path == "distilled":
        path = distilled_path(schedule, count, config.original_inference_steps, final_sigma=final, share=share)
    elif sampler.path == "dpm":
        rounded = not config.use_exponential_sigmas
        path = dpm_path(schedule, count, spacing, offset, warp=warp, round_timesteps=rounded, final_sigma=final)
    else:
        rounded = config.use_karras_sigmas and sampler.rounds_karras_timesteps
        path = euler_path(schedule, count, spacing, offset, warp=warp, round_timesteps=rounded, final_sigma=final)
    return path.tail(skip)


def check_steps(config: SchedulerConfig, count: int) -> None:
    """UsageError unless the sampler has a path of `count` steps."""
    path, most = BY_CLASS[config.class_name].path, config.num_train_timesteps
    if path == "distilled":
        most = config.original_inference_steps
    elif path == "dpm":
        most -= 1  # n + 1 different timesteps
    if not 1 <= count <= most:
        raise UsageError(f"num_inference_steps for {config.label}", got=count, accepted=f"1 to {most}")


def check_strength(strength: float) -> None:
    if not 0 < strength <= 1:
        raise UsageError("strength", got=strength, accepted="more than 0, up to 1")


def steps_at_strength(count: int, strength: float) -> int:
    """How many of `count` steps image-to-image at `strength` takes."""
    steps = min(int(count * strength), count)
    if steps < 1:
        raise UsageError("strength", got=strength, accepted=f"at least {1 / count:.3g} at {count} steps")
    return steps
