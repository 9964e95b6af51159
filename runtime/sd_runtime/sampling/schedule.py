"""The training noise schedule: how much of the picture is left at each training timestep.

A diffusion model was trained on z_t = √ᾱ_t · z_0 + √(1 − ᾱ_t) · ε with ε ~ N(0, 1), where ᾱ_t is the product of
1 − β_0 … 1 − β_t (Ho et al. 2020, arXiv 2006.11239, equation 4).  Everything a sampler needs to know about training is
the table ᾱ; σ_t = √((1 − ᾱ_t) / ᾱ_t), the noise per unit of signal, is the same table in another scale.

The tables are computed in float32 as torch does, to the bit: the smallest σ would move by 1.3e-5 in float64, and the
networks were trained with the rounded ones.  (After a zero-SNR rescale to 4e-7: there torch takes a square root that
is one bit off on some processors.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from ..errors import UsageError
from ..tensor import Array
from .config import SchedulerConfig
from .registry import BY_CLASS

# ᾱ at the end of a zero-terminal-SNR schedule, where it would be 0 and σ infinite.  Some samplers set it to 2^-24
# (`Sampler.lifts_zero_snr`); for the others σ = 1e10 stands in for infinity: what is left of the signal is below any
# rounding.
LIFTED_ALPHA = 2.0**-24
VANISHING_ALPHA = 1e-20


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """alphas_cumprod: (T,) float32, ᾱ for each of the T = num_train_timesteps training timesteps, falling."""

    alphas_cumprod: Array

    @classmethod
    def from_config(cls, config: SchedulerConfig) -> NoiseSchedule:
        betas = training_betas(config)
        if config.rescale_betas_zero_snr:
            betas = rescale_zero_terminal_snr(betas)
        alphas_cumprod = cumulative_product(np.float32(1) - betas)
        if config.rescale_betas_zero_snr and BY_CLASS[config.class_name].lifts_zero_snr:
            alphas_cumprod[-1] = LIFTED_ALPHA
        return cls(alphas_cumprod)

    @property
    def num_train_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    @cached_property
    def sigmas(self) -> Array:
        """(T,) float64 holding float32 values, rising: 1 − ᾱ cancels, and training lived with that rounding."""
        alphas = np.maximum(self.alphas_cumprod, np.float32(VANISHING_ALPHA))
        return np.sqrt((np.float32(1) - alphas) / alphas).astype(np.float64)

    @cached_property
    def log_sigmas(self) -> Array:
        """(T,) float32: float64 would put some timesteps on the other side of an integer where they are truncated."""
        logs: Array = np.log(self.sigmas.astype(np.float32))
        return logs

    def sigma_at(self, timesteps: Array) -> Array:
        """σ at (possibly fractional) timesteps, by linear interpolation."""
        return np.interp(timesteps, np.arange(self.num_train_timesteps), self.sigmas)

    def timestep_at(self, sigmas: Array | float) -> Array:
        """The fractional timestep of each σ, by linear interpolation in log σ, clipped to the table."""
        knots, log_sigma = self.log_sigmas, np.log(np.maximum(sigmas, 1e-10))
        low = np.clip(np.searchsorted(knots, log_sigma, side="right") - 1, 0, len(knots) - 2)
        weight = np.clip((knots[low] - log_sigma) / (knots[low] - knots[low + 1]), 0, 1)
        timesteps: Array = (1 - weight) * low + weight * (low + 1)
        return timesteps


def training_betas(config: SchedulerConfig) -> Array:
    """β_t, the share of variance that training step t replaces by noise: (T,) float32."""
    count = config.num_train_timesteps
    if config.trained_betas is not None:
        return np.array(config.trained_betas, np.float32)
    if config.beta_schedule == "linear":  # Ho et al. 2020, section 4
        return linspace_float32(config.beta_start, config.beta_end, count)
    if config.beta_schedule == "scaled_linear":  # latent diffusion (arXiv 2112.10752): √β rises linearly
        return linspace_float32(config.beta_start**0.5, config.beta_end**0.5, count) ** 2
    if config.beta_schedule == "squaredcos_cap_v2":  # Nichol & Dhariwal 2021, arXiv 2102.09672, equation 17
        signal = [math.cos((i / count + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(count + 1)]
        betas = [min(1 - after / before, 0.999) for before, after in pairwise(signal)]
        return np.array(betas, np.float32)
    raise UsageError("beta_schedule", got=config.beta_schedule, accepted="linear, scaled_linear, squaredcos_cap_v2")


def rescale_zero_terminal_snr(betas: Array) -> Array:
    """Shift and stretch √ᾱ so that the last timestep is pure noise: Lin et al. 2023, arXiv 2305.08891, algorithm 1."""
    root = np.sqrt(cumulative_product(np.float32(1) - betas))
    first, last = root[0], root[-1]
    root = (root - last) * (first / (first - last))
    alphas_cumprod = root**2
    alphas = np.concatenate([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])
    rescaled: Array = np.float32(1) - alphas
    return rescaled


def cumulative_product(alphas: Array) -> Array:
    """torch.cumprod on float32: accumulated in float64, each partial product rounded."""
    return np.cumprod(alphas.astype(np.float64)).astype(np.float32)


def linspace_float32(start: float, end: float, count: int) -> Array:
    """torch.linspace on float32: one fused multiply-add per element, counted from the nearer end."""
    first, last, index = np.float32(start), np.float32(end), np.arange(count, dtype=np.float64)
    step = np.float64((last - first) / np.float32(max(count - 1, 1)))
    rising = np.float64(first) + step * index
    falling = np.float64(last) - step * (count - 1 - index)
    return np.where(index < count // 2, rising, falling).astype(np.float32)
