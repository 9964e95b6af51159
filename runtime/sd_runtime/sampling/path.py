"""The path: which noise levels a sampler visits, from almost pure noise down to the picture.

Diffusers grew three families of paths, and the same n steps mean different noise levels in each:

    table    DDIM, DDPM, PNDM, LCM, TCD    n integer timesteps, σ looked up
    euler    Euler, LMS, Heun, DPM2, …     n timesteps that may be fractional, σ interpolated, then 0
    dpm      DPM-Solver++, UniPC, DEIS     n + 1 integer timesteps of which the last is dropped, σ looked up, then 0

Timesteps are spaced as in Lin et al. 2023 (arXiv 2305.08891), table 2.  Karras and exponential sigmas replace the
spacing by one in σ; the timestep told to the network is then read back from the schedule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from ..errors import UsageError
from ..tensor import Array
from .schedule import NoiseSchedule

Spacing = Callable[[float, float, int], Array]  # (first σ, last σ, count) → σ, falling


@dataclass(frozen=True, eq=False)
class SamplingPath:
    """n steps, the i-th leading from sigmas[i] to sigmas_next[i].

    timesteps, sigmas, sigmas_next  (n,) float64; sigmas_next[i] equals sigmas[i + 1] but for DDIM's and PNDM's quirks
    init_noise_scale                the network's first input = init_noise_scale · unit noise
    final_scale                     the finished latents = final_scale · x
    skipped                         steps that image-to-image left out in front
    in_sigma_space                  diffusers' samplers of this family keep x between steps, the others √ᾱ · x
    """

    schedule: NoiseSchedule
    timesteps: Array
    sigmas: Array
    sigmas_next: Array
    init_noise_scale: float = 1.0
    final_scale: float = 1.0
    skipped: int = 0
    in_sigma_space: bool = False

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def planned(self) -> int:
        """The number of steps asked for, before image-to-image skipped some: rules for "few steps" look at this."""
        return self.skipped + len(self)

    def steps_left(self, i: int) -> int:
        """How many steps are left at step i, this one included, where that matters: diffusers lets the order of its
        multistep solvers fall to 2 and 1 at the end of a path of fewer than 15 steps, and never of a longer one."""
        return len(self) - i if self.planned < 15 else self.planned

    def tail(self, skip: int) -> SamplingPath:
        """The same path without its first `skip` steps: image-to-image starts in the middle."""
        return replace(
            self,
            timesteps=self.timesteps[skip:],
            sigmas=self.sigmas[skip:],
            sigmas_next=self.sigmas_next[skip:],
            skipped=self.skipped + skip,
        )


def spaced_timesteps(count: int, total: int, spacing: str, offset: int, *, extra: int = 0) -> Array:
    """`count` falling timesteps out of 0 … total − 1, (count,) float64; extra = 1 spaces one more and drops the last.

    leading and linspace as in arXiv 2305.08891, table 2.  trailing is fixed at `count` entries: for 62 step counts
    up to 1000 (61, 103, …) diffusers' rounding yields one more, timestep −1, which its tables wrap around to T − 1."""
    points = count + extra
    if spacing == "linspace":
        timesteps: Array = np.linspace(0, total - 1, points)[::-1]
    elif spacing == "leading":
        timesteps = np.arange(points)[::-1] * float(total // points) + offset
    elif spacing == "trailing":
        timesteps = np.round(np.arange(total, 0, -total / count)) - 1
    else:
        raise UsageError("timestep_spacing", got=spacing, accepted="leading, linspace, trailing")
    return timesteps[:count].astype(np.float64)


def karras_sigmas(first: float, last: float, count: int) -> Array:
    """Karras et al. 2022, arXiv 2206.00364, equation 5, with ρ = 7: steps shrink towards low noise."""
    rho, ramp = 7.0, np.linspace(0, 1, count)
    sigmas: Array = (first ** (1 / rho) + ramp * (last ** (1 / rho) - first ** (1 / rho))) ** rho
    return sigmas


def exponential_sigmas(first: float, last: float, count: int) -> Array:
    """Equal steps in log σ, that is, in the log-SNR."""
    return np.exp(np.linspace(np.log(first), np.log(last), count))


def table_path(
    schedule: NoiseSchedule, timesteps: Array, end: Array, *, final_sigma: float, start: Array | None = None
) -> SamplingPath:
    """Steps between integer timesteps, σ from the table: from `start` (the network's timesteps unless given) to `end`,
    where an end below 0 means the picture itself, at `final_sigma`."""
    start = timesteps if start is None else start
    if start.max() >= schedule.num_train_timesteps:
        raise UsageError(
            "steps_offset moves the first timestep past training",
            got=int(start.max()),
            accepted=f"below {schedule.num_train_timesteps}",
            remedy="use fewer steps",
        )
    ahead = schedule.sigmas[np.maximum(end, 0).astype(int)]
    sigmas_next = np.where(end >= 0, ahead, final_sigma)
    return with_final_scale(SamplingPath(schedule, timesteps, schedule.sigmas[start.astype(int)], sigmas_next))


def ddim_path(schedule: NoiseSchedule, count: int, spacing: str, offset: int, *, final_sigma: float) -> SamplingPath:
    """DDIM: every step goes down by T // n timesteps, whatever the spacing: right for leading, a quirk else."""
    total = schedule.num_train_timesteps
    timesteps = np.round(spaced_timesteps(count, total, spacing, offset))
    return table_path(schedule, timesteps, timesteps - total // count, final_sigma=final_sigma)


def ddpm_path(schedule: NoiseSchedule, count: int, spacing: str, offset: int) -> SamplingPath:
    """DDPM: every step goes to the next timestep of the list, the last one to the picture."""
    timesteps = np.round(spaced_timesteps(count, schedule.num_train_timesteps, spacing, offset))
    return table_path(schedule, timesteps, np.append(timesteps[1:], -1), final_sigma=0.0)


def pndm_path(
    schedule: NoiseSchedule, count: int, spacing: str, offset: int, *, final_sigma: float, skip: int = 0
) -> SamplingPath:
    """PNDM without Runge-Kutta steps: n + 1 evaluations, because its first step is taken twice.

    The second timestep stands in the list twice.  The first entry makes an Euler step t_0 → t_1; the second, told t_1,
    makes the same step again from t_0 with the mean of both outputs (see `samplers.plms`).  Image-to-image drops `skip`
    entries of this list as diffusers does: it starts one step early and, after its doubled step, one step late."""
    total = schedule.num_train_timesteps
    stride = total // count
    timesteps = np.round(spaced_timesteps(count, total, spacing, offset))
    visited = np.concatenate([timesteps[:2], timesteps[1:]])[skip:]
    start = visited.copy()
    start[1:2] += stride
    path = table_path(schedule, visited, start - stride, final_sigma=final_sigma, start=start)
    return replace(path, skipped=skip)


def distilled_path(
    schedule: NoiseSchedule, count: int, original_steps: int, *, final_sigma: float, share: float = 1.0
) -> SamplingPath:
    """LCM and TCD: n timesteps spread over the last `share` of the `original_steps` that the student was distilled on.

    Luo et al. 2023, arXiv 2310.04378, section 4.3 (skipping-step); Zheng et al. 2024, arXiv 2402.19159."""
    stride, visited = schedule.num_train_timesteps // original_steps, int(original_steps * share)
    if visited < count:
        least = count / original_steps
        raise UsageError("strength", got=share, accepted=f"at least {least:.3g} at {count} steps", remedy="fewer steps")
    grid = (np.arange(1, visited + 1) * stride - 1)[::-1].astype(np.float64)
    timesteps = grid[np.floor(np.linspace(0, visited, count, endpoint=False)).astype(int)]
    return table_path(schedule, timesteps, np.append(timesteps[1:], -1), final_sigma=final_sigma)


def euler_path(
    schedule: NoiseSchedule,
    count: int,
    spacing: str,
    offset: int,
    *,
    warp: Spacing | None = None,
    round_timesteps: bool = False,
    final_sigma: float = 0.0,
) -> SamplingPath:
    """Fractional timesteps, interpolated σ; `warp` (Karras, exponential) spans the range that the spacing visits.

    diffusers starts "leading" at √(σ² + 1) · noise and the other spacings at σ · noise; and it hands out x, not √ᾱ · x,
    at the end, which differs only when final_sigma is not 0."""
    timesteps = spaced_timesteps(count, schedule.num_train_timesteps, spacing, offset)
    timesteps = timesteps.astype(np.float32).astype(np.float64)
    sigmas = schedule.sigma_at(timesteps)
    if warp is not None:
        sigmas = warp(sigmas[0], sigmas[-1], count)
        timesteps = schedule.timestep_at(sigmas)
        timesteps = np.round(timesteps) if round_timesteps else timesteps
    sigmas = np.append(sigmas, final_sigma).astype(np.float32).astype(np.float64)
    scale = 1.0 if spacing == "leading" else float(sigmas[0] / np.sqrt(1 + sigmas[0] ** 2))
    return SamplingPath(schedule, timesteps, sigmas[:-1], sigmas[1:], init_noise_scale=scale, in_sigma_space=True)


def dpm_path(
    schedule: NoiseSchedule,
    count: int,
    spacing: str,
    offset: int,
    *,
    warp: Spacing | None = None,
    round_timesteps: bool = True,
    final_sigma: float = 0.0,
) -> SamplingPath:
    """Integer timesteps, the first n of n + 1; `warp` spans the whole training range, its timesteps rounded or cut."""
    timesteps = np.round(spaced_timesteps(count, schedule.num_train_timesteps, spacing, offset, extra=1))
    sigmas = schedule.sigma_at(timesteps)
    if warp is not None:
        sigmas = warp(schedule.sigmas[-1], schedule.sigmas[0], count)
        timesteps = schedule.timestep_at(sigmas)
        timesteps = np.round(timesteps) if round_timesteps else np.trunc(timesteps)
    sigmas = np.append(sigmas, final_sigma).astype(np.float32).astype(np.float64)
    return with_final_scale(SamplingPath(schedule, timesteps, sigmas[:-1], sigmas[1:]))


def with_final_scale(path: SamplingPath) -> SamplingPath:
    """`path` that hands out √ᾱ · x at the end, as every family but the Euler one does."""
    return replace(path, final_scale=float(1 / np.sqrt(1 + path.sigmas_next[-1] ** 2)))
