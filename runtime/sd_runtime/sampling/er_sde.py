"""ER-SDE-Solver-3, an exponential integrator of the extended reverse-time SDE.

Cui et al. 2023, arXiv 2309.06169: for every rising φ(σ) there is a stochastic equation that leads from noise to the
pictures, deterministic for φ = σ and noisier the faster φ rises.  Divided by √ᾱ, a step σ → σ_next of it is

    x_next = r·x + φ(σ_next)·∫ φ′(s)/φ(s)²·x0(s) ds + √(σ_next² − r²·σ²)·noise     over s = σ_next … σ

with r = φ(σ_next)/φ(σ).  As in the DPM-Solver++ family only x0 has to be guessed, here by a Taylor polynomial around σ;
integrated by parts it gives, with h = σ_next − σ,

    x_next = r·x + (1 − r)·x0 + (h + φ(σ_next)·∫ 1/φ(s) ds)·x0′ + (h²/2 + φ(σ_next)·∫ (s − σ)/φ(s) ds)·x0″ + noise

φ is the authors' choice, "SDE 5" in their er_sde_solver.py: φ(σ) = σ·(e^(σ^0.3) + 10).  Their code, and ComfyUI's, sum
the integrals over 100 and 200 points; here they are found by Gauss-Legendre quadrature in log σ, exact to rounding.
"""

from __future__ import annotations

import numpy as np

from ..tensor import Array
from .path import SamplingPath
from .samplers import History, Model, Noise, quadrature


def stretch(sigma: Array) -> Array:
    """φ(σ)/σ, rising from 11: how fast φ rises is how much noise a step adds."""
    rising: Array = np.exp(sigma**0.3) + 10
    return rising


def er_sde(path: SamplingPath, i: int, x: Array, history: History, model: Model, noise: Noise) -> tuple[Array, History]:
    """ER-SDE-Solver-3; its first two steps are those of ER-SDE-Solver-1 and 2.  History: past x0, newest first."""
    sigma, target = path.sigmas[i], path.sigmas_next[i]
    x0, _ = model(x, sigma, path.timesteps[i])
    if target == 0:
        return x0, history
    share = stretch(target) / stretch(sigma)
    r, h = target / sigma * share, target - sigma
    points, weights = quadrature(np.log(target), np.log(sigma))
    densities = target * stretch(target) * weights / stretch(np.exp(points))  # φ(σ_next)/φ(s) ds, as s = e^points
    x = r * x + (1 - r) * x0
    predictions = (x0, *history)
    if len(predictions) > 1:
        nodes = path.sigmas[i::-1]
        slope = (predictions[0] - predictions[1]) / (nodes[0] - nodes[1])
        x = x + (h + densities.sum()) * slope
        if len(predictions) > 2:
            earlier = (predictions[1] - predictions[2]) / (nodes[1] - nodes[2])
            bend = 2 * (slope - earlier) / (nodes[0] - nodes[2])
            x = x + (h**2 / 2 + densities @ (np.exp(points) - sigma)) * bend
    return x + target * np.sqrt(1 - share**2) * noise(), predictions[:2]
