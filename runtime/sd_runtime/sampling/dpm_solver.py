"""The DPM-Solver++ family: exponential integrators that extrapolate the predicted picture x0.

In λ = −log σ the equation of `samplers` reads dx/dλ = x0 − x, and over a step of length h it is solved by

    x_next = e^−h · x + ∫ e^(τ−h) · x0(λ + τ) dτ   over τ = 0 … h,   where e^−h = σ_next / σ

(Lu et al. 2022b, arXiv 2211.01095, proposition 4.1, divided by √ᾱ).  The decay e^−h is exact; only x0 along the step
has to be guessed, by a polynomial D0 + D1·(τ/h) + D2·(τ/h)²/2 through predictions already made, which integrates to

    x_next = e^−h · x + (1 − e^−h)·D0 + φ1(h)·D1 + φ2(h)·D2

    φ1(h) = (e^−h − 1)/h + 1           φ2(h) = (1 − e^−h − h)/h² + 1/2

The stochastic form replaces h by 2h in these formulas and adds noise: the state decays twice as fast, and fresh noise
of σ_next·√(1 − e^−2h) fills up what is missing (section 5 there).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..tensor import Array
from .path import SamplingPath
from .samplers import History, Model, Noise, weighted


def half_log_snr(sigmas: Array) -> Array:
    """λ = −log σ; infinite for the finished picture, where σ = 0."""
    with np.errstate(divide="ignore"):
        lambdas: Array = -np.log(sigmas)
    return lambdas


def phi1(h: float) -> float:
    """∫ e^(τ−h)·(τ/h) dτ over 0 … h; for small h its series, because the formula cancels."""
    return np.expm1(-h) / h + 1 if h > 1e-4 else h / 2


def phi2(h: float) -> float:
    """∫ e^(τ−h)·(τ/h)²/2 dτ over 0 … h."""
    return (-np.expm1(-h) - h) / h**2 + 0.5 if h > 1e-4 else h / 6


def integrate(
    x: Array, sigma: float, target: float, derivatives: Sequence[Array], solver_type: str, sde: bool, noise: Noise
) -> Array:
    """One step σ → target with x0 along it given by its `derivatives` D0, D1, D2 (as many as the order).

    solver_type only matters at order 2: "heun" weighs D1 by its integral φ1, "midpoint" takes x0 at half the step."""
    decay = (target / sigma) ** (2 if sde else 1)
    x = decay * x + (1 - decay) * derivatives[0]
    if len(derivatives) > 1:
        h = np.log(sigma / target) * (2 if sde else 1)
        midpoint = len(derivatives) == 2 and solver_type == "midpoint"
        x = x + ((1 - decay) / 2 if midpoint else phi1(h)) * derivatives[1]
        if len(derivatives) > 2:
            x = x + phi2(h) * derivatives[2]
    return x + target * np.sqrt(1 - (target / sigma) ** 2) * noise() if sde and target > 0 else x


def dpmpp_multistep(
    path: SamplingPath,
    i: int,
    x: Array,
    history: History,
    model: Model,
    noise: Noise,
    *,
    order: int = 2,
    solver_type: str = "midpoint",
    sde: bool = False,
    lower_order_final: bool = True,
    euler_at_final: bool = False,
) -> tuple[Array, History]:
    """DPM-Solver++ 1M, 2M, 3M and 1M SDE, 2M SDE: arXiv 2211.01095, algorithm 2; one evaluation a step.

    The first steps have fewer past predictions than the order wants.  The last step is first order where it ends at
    σ = 0: λ is infinite there.  At order 3, D2 is half of h²·x0″, as in the authors' code and all that follow it."""
    x0, _ = model(x, path.sigmas[i], path.timesteps[i])
    predictions = (x0, *history)
    last = i == len(path) - 1
    limit = 1 if last and (euler_at_final or path.sigmas_next[i] == 0) else order
    limit = min(limit, path.steps_left(i)) if lower_order_final else limit
    used = predictions[:limit]
    past = half_log_snr(path.sigmas[i::-1][: len(used)])  # λ of the used predictions, newest first
    derivatives = [x0]
    if len(used) > 1:
        h = half_log_snr(path.sigmas_next[i]) - past[0]
        slope = (used[0] - used[1]) / (past[0] - past[1])
        if len(used) > 2:
            bend = (slope - (used[1] - used[2]) / (past[1] - past[2])) / (past[0] - past[2])
            derivatives += [h * (slope + (past[0] - past[1]) * bend), h**2 * bend]
        else:
            derivatives += [h * slope]
    x = integrate(x, path.sigmas[i], path.sigmas_next[i], derivatives, solver_type, sde, noise)
    return x, predictions[: order - 1]


def dpmpp_singlestep(
    path: SamplingPath,
    i: int,
    x: Array,
    history: History,
    model: Model,
    noise: Noise,
    *,
    order: int = 2,
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
) -> tuple[Array, History]:
    """DPM-Solver++ 1S, 2S, 3S: arXiv 2211.01095, algorithm 1, on a common path for all evaluations.

    Steps come in groups of `order`; each step of a group starts over from the group's beginning, with one more
    prediction than the one before.  History: x where the group began, and its predictions, newest first."""
    orders = singlestep_orders(path.planned, order, lower_order_final, path.sigmas_next[-1] == 0)
    used_order = min(orders[path.skipped + i], max(len(history), 1))
    start = x if used_order == 1 else history[0]
    x0, _ = model(x, path.sigmas[i], path.timesteps[i])
    predictions = (x0, *history[1:])
    begin = i + 1 - used_order
    derivatives = [predictions[used_order - 1]]
    if used_order > 1:
        lambdas = half_log_snr(path.sigmas[begin : i + 1])  # of the group's predictions, oldest first
        h = half_log_snr(path.sigmas_next[i]) - lambdas[0]
        slope = (predictions[0] - derivatives[0]) / (lambdas[-1] - lambdas[0])
        if used_order == 2:
            derivatives += [h * slope]
        elif solver_type == "midpoint":
            derivatives += [h * slope, np.zeros_like(slope)]
        else:
            near = (predictions[1] - derivatives[0]) / (lambdas[1] - lambdas[0])
            bend = (slope - near) / (lambdas[2] - lambdas[1])
            derivatives += [h * (near - (lambdas[1] - lambdas[0]) * bend), 2 * h**2 * bend]
    x = integrate(start, path.sigmas[begin], path.sigmas_next[i], derivatives, solver_type, False, noise)
    return x, (start, *predictions[: order - 1])


def singlestep_orders(steps: int, order: int, lower_order_final: bool, ends_at_zero: bool) -> list[int]:
    """The order of each step: groups 1, 2, … `order`, cut short at the end so that the last step is of order 1."""
    group = list(range(1, order + 1))
    orders = group * (steps // order) + group[: steps % order]
    if (lower_order_final or ends_at_zero) and steps % order == 0 and order > 1:
        orders[-order:] = [1, 1] if order == 2 else [1, 2, 1]
    if ends_at_zero:
        orders[-1] = 1
    return orders


def unipc(
    path: SamplingPath,
    i: int,
    x: Array,
    history: History,
    model: Model,
    noise: Noise,
    *,
    order: int = 2,
    solver_type: str = "bh2",
    lower_order_final: bool = True,
) -> tuple[Array, History]:
    """UniPC: each evaluation first corrects the step that led to it (UniC), then predicts the next one (UniP).

    Zhao et al. 2023, arXiv 2302.04867, algorithms 1 and 2, here for predictions of x0.  History: x where the last step
    began, and past predictions, newest first."""
    x0, _ = model(x, path.sigmas[i], path.timesteps[i])

    def order_at(step: int) -> int:
        return min(order, step + 1, len(path) - step if lower_order_final else order)

    if history:
        x = unified_update(path, i - 1, history[0], history[1:], order_at(i - 1), solver_type, x0)
    predictions = (x0, *history[1:])
    return unified_update(path, i, x, predictions, order_at(i), solver_type), (x, *predictions[:order])


def unified_update(
    path: SamplingPath,
    i: int,
    x: Array,
    predictions: History,
    order: int,
    solver_type: str,
    prediction_ahead: Array | None = None,
) -> Array:
    """Step i from x with past `predictions` (newest first); with `prediction_ahead`, made at its end, the corrector.

    The weights of the differences D_k / r_k follow from the paper's order conditions: R(r)·a = b with rows of powers of
    r, and b the φ integrals over B(h).  B is h for bh1 and e^h − 1 for bh2, where h = −(λ_next − λ) is negative."""
    if path.sigmas_next[i] == path.sigmas[i]:
        return x  # Karras sigmas that end at sigma_min: the last step has no length
    lambdas = half_log_snr(path.sigmas[i::-1][:order])
    h = lambdas[0] - half_log_snr(path.sigmas_next[i])
    scale = h if solver_type == "bh1" else np.expm1(h)
    r = [*((lambdas[1:] - lambdas[0]) / -h), 1.0]
    integrals, phi, factorial = [], np.expm1(h) / h - 1, 1
    for k in range(1, order + 1):
        integrals.append(phi * factorial / scale)
        factorial *= k + 1
        phi = phi / h - 1 / factorial
    differences = [(past - predictions[0]) / r_k for past, r_k in zip(predictions[1:order], r, strict=False)]
    if prediction_ahead is not None:
        differences.append(prediction_ahead - predictions[0])
    x = path.sigmas_next[i] / path.sigmas[i] * x - np.expm1(h) * predictions[0]
    count = len(differences)
    if count == 0:
        return x
    if count == 1:
        weights = np.array([0.5])  # the paper's choice: exact enough, and independent of r
    else:
        weights = np.linalg.solve(np.vander(r[:count], count, increasing=True).T, integrals[:count])
    corrected: Array = x - scale * weighted(weights, differences)
    return corrected
