"""The samplers, each as the few lines its paper gives.

A diffusion model predicts the noise in a noisy picture.  A sampler starts from pure noise and follows these predictions
down through falling noise levels σ to the picture.  All of them solve one differential equation (or its stochastic
sister), and differ in how they step.

Glossary

    z            the latents as the network sees them:  z = √ᾱ·x0 + √(1−ᾱ)·ε                          (B, 4, h, w)
    x            the same in "sigma space":  x = z / √ᾱ = x0 + σ·ε,  so z = x / √(1 + σ²); samplers work on x
    x0           the picture (here: its latent), or the network's present guess of it, D(x; σ)
    ε, epsilon   the unit noise, or the network's guess of it; x = x0 + σ·ε always holds
    ᾱ            alphas_cumprod, the signal's share of the variance at a training timestep
    σ, sigma     √((1−ᾱ)/ᾱ), noise per unit of signal: from 14.6 at timestep 999 down to 0.03 at timestep 0
    timestep     σ's other name: where on the training schedule (0 … T − 1) the network is told to be
    λ            −log σ, half the log-SNR; h is the step in λ
    i            the step, 0 … n − 1, from sigmas[i] to sigmas_next[i]
    history      what a step leaves for later ones: earlier slopes, predictions or states, newest first
    noise()      fresh unit Gaussian noise of x's shape; deterministic samplers never ask for it

The equation is dx/dσ = (x − x0) / σ = ε (Karras et al. 2022, arXiv 2206.00364, equations 1 and 3 with σ(t) = t): the
network's noise prediction *is* the slope.  Euler's method on it is DDIM; going down further and adding fresh noise
back is the ancestral form, and DDPM.  Expanding ε over several steps gives LMS, PLMS and DEIS; writing the solution in
λ, where its linear part is exact, and expanding x0 gives the DPM-Solver++ family (`dpm_solver`).

Every step is  step(path, i, x, history, model, noise) → (x, history)  and linear in all arrays: `plan` uses that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..tensor import Array
from .path import SamplingPath

History = tuple[Array, ...]
Noise = Callable[[], Array]


@dataclass(frozen=True)
class Model:
    """The network as samplers see it.

    network(z, timestep) → output; what that means is prediction_type: epsilon (ε), sample (x0), or v_prediction
    (√ᾱ·ε − √(1−ᾱ)·x0: Salimans & Ho 2022, arXiv 2202.00512)."""

    network: Callable[[Array, float], Array]
    prediction_type: str

    def __call__(self, x: Array, sigma: float, timestep: float) -> tuple[Array, Array]:
        """The network's (x0, ε) at a point of sigma space."""
        return self.explain(self.output(x, sigma, timestep), x, sigma)

    def output(self, x: Array, sigma: float, timestep: float) -> Array:
        """The network's raw output."""
        return self.network(x / np.sqrt(1 + sigma**2), timestep)

    def explain(self, output: Array, x: Array, sigma: float) -> tuple[Array, Array]:
        """A raw output as (x0, ε), with x = x0 + σ·ε."""
        if self.prediction_type == "sample":
            return output, (x - output) / sigma
        if self.prediction_type == "v_prediction":
            cosine, sine = 1 / np.sqrt(1 + sigma**2), sigma / np.sqrt(1 + sigma**2)  # √ᾱ and √(1−ᾱ)
            z = cosine * x
            return cosine * z - sine * output, cosine * output + sine * z
        return x - sigma * output, output


StepFunction = Callable[[SamplingPath, int, Array, History, Model, Noise], tuple[Array, History]]


def ancestral(sigma: float, target: float, eta: float = 1.0) -> tuple[float, float]:
    """A step σ → target as (σ_down, σ_up): deterministic to σ_down, then fresh noise σ_up; σ_down² + σ_up² = target².

    Song et al. 2020 (DDIM), arXiv 2010.02502, equation 16, divided by √ᾱ; eta = 1 is DDPM's posterior variance."""
    ratio = target / sigma
    return target * np.sqrt(1 - eta**2 + (eta * ratio) ** 2), eta * target * np.sqrt(1 - ratio**2)


def euler(
    path: SamplingPath, i: int, x: Array, history: History, model: Model, noise: Noise, *, eta: float = 0.0
) -> tuple[Array, History]:
    """Euler's method: DDIM, DDIM with eta, Euler; with eta = 1 DDPM and Euler ancestral.

    arXiv 2010.02502, equation 12, divided by √ᾱ: the guessed picture, and the guessed noise at the new level."""
    x0, epsilon = model(x, path.sigmas[i], path.timesteps[i])
    sigma_down, sigma_up = ancestral(path.sigmas[i], path.sigmas_next[i], eta)
    x = x0 + sigma_down * epsilon
    return (x + sigma_up * noise() if sigma_up > 0 else x), history


def heun(path: SamplingPath, i: int, x: Array, history: History, model: Model, noise: Noise) -> tuple[Array, History]:
    """Heun's second-order method, the mean of the slopes at both ends: arXiv 2206.00364, algorithm 1."""
    sigma, target = path.sigmas[i], path.sigmas_next[i]
    x0, slope = model(x, sigma, path.timesteps[i])
    if target == 0:
        return x0, history
    _, slope_ahead = model(x + (target - sigma) * slope, target, path.timesteps[i + 1])
    return x + (target - sigma) * (slope + slope_ahead) / 2, history


def dpm2(
    path: SamplingPath, i: int, x: Array, history: History, model: Model, noise: Noise, *, eta: float = 0.0
) -> tuple[Array, History]:
    """DPM-Solver-2, the slope at the middle in λ; with eta = 1 its ancestral form.

    Lu et al. 2022, arXiv 2206.00927, algorithm 1, in the form of k-diffusion's sample_dpm_2."""
    sigma = path.sigmas[i]
    x0, slope = model(x, sigma, path.timesteps[i])
    if path.sigmas_next[i] == 0:
        return x0, history
    sigma_down, sigma_up = ancestral(sigma, path.sigmas_next[i], eta)
    middle = np.sqrt(sigma * sigma_down)
    _, slope = model(x + (middle - sigma) * slope, middle, float(path.schedule.timestep_at(middle)))
    x = x + (sigma_down - sigma) * slope
    return (x + sigma_up * noise() if sigma_up > 0 else x), history


def lms(
    path: SamplingPath, i: int, x: Array, history: History, model: Model, noise: Noise, *, order: int = 4
) -> tuple[Array, History]:
    """Linear multistep: the slope is extrapolated by a polynomial in σ through the last `order` slopes.

    Adams-Bashforth for uneven steps (Hairer, Nørsett & Wanner, Solving ODEs I, III.5); k-diffusion's sample_lms."""
    _, slope = model(x, path.sigmas[i], path.timesteps[i])
    slopes = (slope, *history)[:order]
    nodes = path.sigmas[i::-1][: len(slopes)]
    points, weights = quadrature(path.sigmas[i], path.sigmas_next[i])
    basis = lagrange(nodes, points)
    return x + weighted(basis @ weights, slopes), slopes[: order - 1]


def deis(
    path: SamplingPath,
    i: int,
    x: Array,
    history: History,
    model: Model,
    noise: Noise,
    *,
    order: int = 2,
    lower_order_final: bool = True,
) -> tuple[Array, History]:
    """DEIS, log-ρ multistep: like LMS, but the polynomial is in log σ, where ε is smoother.

    Zhang & Chen 2022, arXiv 2204.13902, the Adams-Bashforth form in ρ = σ.  The weights, ∫ basis dσ, are found by
    quadrature: the closed form cancels."""
    _, slope = model(x, path.sigmas[i], path.timesteps[i])
    slopes = (slope, *history)
    used = slopes[: min(order, path.steps_left(i))] if lower_order_final else slopes[:order]
    nodes = np.log(path.sigmas[i::-1][: len(used)])
    points, weights = quadrature(np.log(path.sigmas[i]), np.log(path.sigmas_next[i]))
    basis = lagrange(nodes, points)
    return x + weighted(basis @ (weights * np.exp(points)), used), slopes[: order - 1]


LEGENDRE = np.polynomial.legendre.leggauss(16)


def quadrature(start: float, end: float) -> tuple[Array, Array]:
    """Gauss-Legendre points and weights on start … end, (16,) each: exact far beyond the orders in use here."""
    points, weights = LEGENDRE
    return (start + end) / 2 + (end - start) / 2 * points, (end - start) / 2 * weights


def lagrange(nodes: Array, points: Array) -> Array:
    """The Lagrange basis polynomials through `nodes` (k,), at `points` (p,): (k, p)."""
    basis = np.ones((len(nodes), len(points)))
    for j, node in enumerate(nodes):
        for other in np.delete(nodes, j):
            basis[j] *= (points - other) / (node - other)
    return basis


def weighted(weights: Sequence[float] | Array, arrays: Sequence[Array]) -> Array:
    """Σ weights[j] · arrays[j]."""
    total = weights[0] * arrays[0]
    for weight, array in zip(weights[1:], arrays[1:], strict=True):
        total = total + weight * array
    return total


ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def plms(path: SamplingPath, i: int, x: Array, history: History, model: Model, noise: Noise) -> tuple[Array, History]:
    """PLMS, or PNDM without its Runge-Kutta start: Adams-Bashforth of order 4 on the network's raw outputs.

    Liu et al. 2022, arXiv 2202.09778, equations 9 and 12, algorithm 2.  The first two entries of the path are one step
    taken twice, as in Heun's method: see `path.pndm_path`.  History: the outputs, newest first; after the first entry
    also where it began."""
    sigma, target = path.sigmas[i], path.sigmas_next[i]
    output = model.output(x, sigma, path.timesteps[i])
    if i == 0:
        _, slope = model.explain(output, x, sigma)
        return x + (target - sigma) * slope, (output, x / np.sqrt(1 + sigma**2))
    if i == 1:  # once more from where the first entry started, with the mean of both outputs
        first, z = history
        outputs: History = (first,)
        x, mean = z * np.sqrt(1 + sigma**2), (first + output) / 2
    else:
        outputs = (output, *history)[:4]
        mean = weighted(ADAMS_BASHFORTH[len(outputs) - 1], outputs)
    _, slope = model.explain(mean, x, sigma)
    return x + (target - sigma) * slope, outputs


def dpm_sde(
    path: SamplingPath, i: int, x: Array, history: History, model: Model, noise: Noise
) -> tuple[Array, History]:
    """DPM-Solver++ SDE, two evaluations a step: k-diffusion's sample_dpmpp_sde with r = 1/2 and eta = 1.

    arXiv 2211.01095, section 5, with the predicted x0 at the middle in λ.  Both noises belong to one Brownian motion in
    σ: the second one, over the whole step, contains the first, over its beginning, and adds the rest."""
    sigma, target = path.sigmas[i], path.sigmas_next[i]
    x0, _ = model(x, sigma, path.timesteps[i])
    if target == 0:
        return x0, history
    middle = np.sqrt(sigma * target)
    early = noise()
    sigma_down, sigma_up = ancestral(sigma, middle)
    halfway = toward(x0, x, sigma_down / sigma) + sigma_up * early
    x0, _ = model(halfway, middle, float(path.schedule.timestep_at(middle)))
    share = (sigma - middle) / (sigma - target)
    whole = np.sqrt(share) * early + np.sqrt(1 - share) * noise()
    sigma_down, sigma_up = ancestral(sigma, target)
    return toward(x0, x, sigma_down / sigma) + sigma_up * whole, history


def dpmpp_2s_ancestral(
    path: SamplingPath, i: int, x: Array, history: History, model: Model, noise: Noise
) -> tuple[Array, History]:
    """DPM-Solver++(2S) down to σ_down, then fresh noise: k-diffusion's sample_dpmpp_2s_ancestral with eta = 1.

    arXiv 2211.01095, algorithm 1 with r = 1/2: the picture predicted at the middle in λ stands for the whole step.
    With eta = 1, σ_down = target² / σ: the middle is the target, and the network is told the next step's timestep."""
    sigma, target = path.sigmas[i], path.sigmas_next[i]
    x0, _ = model(x, sigma, path.timesteps[i])
    if target == 0:
        return x0, history
    sigma_down, sigma_up = ancestral(sigma, target)
    x0, _ = model(toward(x0, x, target / sigma), target, path.timesteps[i + 1])
    return toward(x0, x, sigma_down / sigma) + sigma_up * noise(), history


def toward(x0: Array, x: Array, share: float) -> Array:
    """The point on the line from x0 (share 0) to x (share 1): a first-order step of DPM-Solver++."""
    return share * x + (1 - share) * x0


def lcm(
    path: SamplingPath,
    i: int,
    x: Array,
    history: History,
    model: Model,
    noise: Noise,
    *,
    timestep_scaling: float = 10.0,
) -> tuple[Array, History]:
    """Latent consistency: guess the picture, noise it again to the next level.

    Luo et al. 2023, arXiv 2310.04378, algorithm 3; c_skip and c_out from Song et al. 2023, arXiv 2303.01469, with
    σ_data = 1/2 and diffusers' scaled timestep."""
    sigma, time = path.sigmas[i], path.timesteps[i] * timestep_scaling
    x0, _ = model(x, sigma, path.timesteps[i])
    c_skip, c_out = 0.25 / (time**2 + 0.25), time / np.sqrt(time**2 + 0.25)
    denoised = c_skip * x / np.sqrt(1 + sigma**2) + c_out * x0
    return (denoised + path.sigmas_next[i] * noise() if i < len(path) - 1 else denoised), history


def tcd(
    path: SamplingPath, i: int, x: Array, history: History, model: Model, noise: Noise, *, eta: float = 0.3
) -> tuple[Array, History]:
    """Trajectory consistency: jump to timestep (1 − eta)·t_next, then noise up to t_next.

    Zheng et al. 2024, arXiv 2402.19159, algorithm 4 (strategic stochastic sampling, eta is the paper's γ)."""
    last = i == len(path) - 1
    landing = 0 if last else int(np.floor(np.float32(1 - eta) * np.float32(path.timesteps[i + 1])))
    sigma_landing = path.schedule.sigmas[landing]
    x0, epsilon = model(x, path.sigmas[i], path.timesteps[i])
    x = x0 + sigma_landing * epsilon
    sigma_up = np.sqrt(max(path.sigmas_next[i] ** 2 - sigma_landing**2, 0.0))
    return (x + sigma_up * noise() if sigma_up > 0 and not last else x), history
