"""Samplers that diffusers lacks: held against their papers, written out again here, and against mathematics.

The transcriptions are float64 loops in sigma space that share no code with the runtime, except for the path: it is the
Euler sampler's, which test_schedulers_parity compares with diffusers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sd_runtime.cli.run import main as sd_run
from sd_runtime.errors import BundleError, UsageError
from sd_runtime.sampling import SamplingPlan, SchedulerConfig, describe, make_plan, resolve
from sd_runtime.sampling.er_sde import er_sde
from sd_runtime.sampling.make import make_sampler
from sd_runtime.sampling.path import SamplingPath
from sd_runtime.sampling.registry import BY_CLASS, PRESETS
from sd_runtime.sampling.samplers import Model, dpmpp_2s_ancestral
from sd_runtime.sampling.schedule import NoiseSchedule

NAMES = [preset.aliases[0] for sampler, preset in PRESETS if sampler.diffusers_class is None]
STABLE_DIFFUSION: dict[str, Any] = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
SIZE = 5  # values in a "picture"
TOLERANCE = 1e-10  # relative to the largest value

Array = np.ndarray
Denoise = Callable[[Array, float], Array]  # (x, σ) → the network's guess of the picture
Noise = Callable[[], Array]


def config(name: str, **options: Any) -> SchedulerConfig:
    return SchedulerConfig.from_dict({**STABLE_DIFFUSION, **options}).switched(resolve(name))


# ---- the papers ------------------------------------------------------------------------------------------------------


def dpmpp_2s_ancestral_of_k_diffusion(x: Array, sigmas: Array, denoise: Denoise, noise: Noise) -> Array:
    """Lu et al. 2022b, arXiv 2211.01095, algorithm 1 with r = 1/2, in t = −log σ, between ancestral noise."""
    for sigma, target in pairwise(sigmas):
        x0 = denoise(x, sigma)
        up = np.sqrt(target**2 * (sigma**2 - target**2) / sigma**2)
        down = np.sqrt(target**2 - up**2)
        if down == 0:
            x = x + (x - x0) / sigma * (down - sigma)
        else:
            t, t_next = -np.log(sigma), -np.log(down)
            h = t_next - t
            s = t + h / 2
            u = np.exp(-s) / np.exp(-t) * x - np.expm1(-h / 2) * x0
            x = np.exp(-t_next) / np.exp(-t) * x - np.expm1(-h) * denoise(u, np.exp(-s))
        if target > 0:
            x = x + up * noise()
    return x


def phi(sigma: Any) -> Any:
    """The noise scale function "SDE 5" of arXiv 2309.06169."""
    return sigma * (np.exp(sigma**0.3) + 10)


def phi_slope(sigma: Any) -> Any:
    return np.exp(sigma**0.3) * (1 + 0.3 * sigma**0.3) + 10


def simpson(function: Callable[[Array], Array], start: float, end: float, panels: int = 2000) -> Any:
    """∫ function over start … end, in log σ."""
    points = np.linspace(np.log(start), np.log(end), 2 * panels + 1)
    weights = np.ones(len(points))
    weights[1:-1:2], weights[2:-1:2] = 4, 2
    values = function(np.exp(points)) * np.exp(points)
    return (values * weights).sum() * (points[1] - points[0]) / 3


def er_sde_solver_3(x: Array, sigmas: Array, denoise: Denoise, noise: Noise) -> Array:
    """Cui et al. 2023, arXiv 2309.06169: the exact solution of the equation over a step, not integrated by parts,

        φ(t)/φ(s)·x + φ(t)·∫ φ′(σ)/φ(σ)²·x0(σ) dσ + √(t² − s²·(φ(t)/φ(s))²)·noise     from σ = s down to t

    in which a Taylor polynomial stands for x0(σ); its derivatives are those of the parabola through the last guesses.
    """
    past: list[tuple[float, Array]] = []  # (σ, the guess there), newest first
    for s, t in pairwise(sigmas):
        past = [(s, denoise(x, s)), *past][:3]
        if t == 0:
            return past[0][1]
        x = phi(t) / phi(s) * x
        for power, coefficient in enumerate(taylor(past)):
            weight = simpson(lambda v, p=power, s=s: phi_slope(v) / phi(v) ** 2 * (v - s) ** p, t, s)  # type: ignore[misc]
            x = x + phi(t) * weight * coefficient
        x = x + np.sqrt(t**2 - s**2 * (phi(t) / phi(s)) ** 2) * noise()
    return x


def taylor(past: list[tuple[float, Array]]) -> list[Array]:
    """The coefficients in (σ − σ_0) of the polynomial through the points `past`, the first of which is at σ_0.

    The second one is the slope of the chord to the last guess, as in the authors' code: the parabola's own slope would
    lean on the bend."""
    coefficients = [past[0][1]]
    if len(past) > 1:
        coefficients.append((past[0][1] - past[1][1]) / (past[0][0] - past[1][0]))
    if len(past) > 2:
        nodes = np.array([sigma - past[0][0] for sigma, _ in past])
        coefficients.append(np.linalg.solve(np.vander(nodes, 3, increasing=True), [guess for _, guess in past])[2])
    return coefficients


PAPERS: dict[str, Callable[[Array, Array, Denoise, Noise], Array]] = {
    "dpmpp_2s_ancestral": dpmpp_2s_ancestral_of_k_diffusion,
    "er_sde": er_sde_solver_3,
}


def network(z: Array, timestep: float) -> Array:
    """A smooth nonlinear stand-in for the UNet."""
    return 0.8 * np.sin(1.3 * z + timestep / 1000)


def noise_tape() -> Noise:
    return partial(np.random.default_rng(7).standard_normal, SIZE)


def guess_of(path: SamplingPath, prediction_type: str) -> Denoise:
    """`network` as a function of x and σ that guesses the picture, z = √ᾱ·x being what it sees.

    σ is one of the path's, and the network is told the timestep that goes with it."""

    def denoise(x: Array, sigma: float) -> Array:
        alpha = (1 + sigma**2) ** -0.5
        (level,) = np.flatnonzero(np.isclose(path.sigmas, sigma, rtol=1e-9, atol=0))
        output = network(alpha * x, float(path.timesteps[level]))
        if prediction_type == "v_prediction":  # v = √ᾱ·ε − √(1 − ᾱ)·x0 and z = √ᾱ·x0 + √(1 − ᾱ)·ε, solved for x0
            return alpha**2 * x - alpha * sigma * output
        return output if prediction_type == "sample" else x - sigma * output

    return denoise


def run_plan(plan: SamplingPlan, latents: Array) -> Array:
    """The plan in float64, by its definition: state = coefficients[k] @ [state, output, noise]."""
    fresh = noise_tape()
    state = np.zeros((plan.coefficients.shape[1], SIZE))
    state[0] = latents
    for k, timestep in enumerate(plan.timesteps):
        noise = fresh() if plan.draws[k] else np.zeros(SIZE)
        state = plan.coefficients[k] @ np.vstack([state, network(state[0], timestep), noise])
    return state[0]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("warp", ["", "_karras", "_exponential"])
@pytest.mark.parametrize("name", NAMES)
def test_the_plan_is_the_papers(name: str, warp: str, spacing: str, prediction_type: str) -> None:
    """Text to image and image to image, from few steps to many."""
    options = {"timestep_spacing": spacing, "prediction_type": prediction_type}
    settings, euler = config(name + warp, **options), config("euler" + warp, **options)
    generator = np.random.default_rng(1)
    for count, strength in ((1, 1.0), (2, 1.0), (3, 1.0), (7, 1.0), (20, 1.0), (50, 1.0), (10, 0.5), (20, 0.15)):
        path = make_sampler(euler, count, strength=strength)[1]
        plan = make_plan(settings, count, strength=strength)
        noise, picture = generator.standard_normal((2, SIZE))
        if strength == 1.0:
            z = plan.init_noise_scale * noise
            x = z * np.sqrt(1 + path.sigmas[0] ** 2)
        else:
            z = plan.start_signal * picture + plan.start_noise * noise
            x = picture + path.sigmas[0] * noise
        sigmas = np.append(path.sigmas, path.sigmas_next[-1])
        expected = PAPERS[name](x, sigmas, guess_of(path, prediction_type), noise_tape())
        error = np.abs(run_plan(plan, z) - expected).max() / np.abs(expected).max()
        assert error < TOLERANCE, f"{count} steps at strength {strength}"


@pytest.mark.parametrize("name", NAMES)
def test_zero_terminal_snr(name: str) -> None:
    """Starts at the σ of Euler's path, and from there as the paper has it."""
    options = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    path = make_sampler(config("euler", **options), 20)[1]
    plan = make_plan(config(name, **options), 20)
    assert path.sigmas[0] == pytest.approx(4096, rel=1e-6)
    noise = np.random.default_rng(1).standard_normal(SIZE)
    sigmas = np.append(path.sigmas, path.sigmas_next[-1])
    x = plan.init_noise_scale * noise * np.sqrt(1 + sigmas[0] ** 2)
    expected = PAPERS[name](x, sigmas, guess_of(path, "v_prediction"), noise_tape())
    np.testing.assert_allclose(run_plan(plan, plan.init_noise_scale * noise), expected, rtol=0, atol=1e-6)


# ---- mathematics -----------------------------------------------------------------------------------------------------

MEAN, DEVIATION = 0.7, 0.5  # of Gaussian "pictures": the best guess and the solution of the equations are known
HIGH, LOW = 8.0, 0.3


class SigmaIsTimestep(NoiseSchedule):
    def timestep_at(self, sigmas: Any) -> Any:
        return sigmas


def perfect_network(z: Array, sigma: float) -> Array:
    """The exact ε for pictures from N(MEAN, DEVIATION²); told σ in place of a timestep."""
    return sigma / (DEVIATION**2 + sigma**2) * (z * np.sqrt(1 + sigma**2) - MEAN)


def smooth_path(sigmas: Array) -> SamplingPath:
    return SamplingPath(SigmaIsTimestep(np.array([0.5], np.float32)), sigmas[:-1], sigmas[:-1], sigmas[1:])


def slope_exponent(errors: list[float]) -> float:
    """How the error falls as the number of steps doubles: 2 for a second-order method."""
    return float(np.log2(errors[0] / errors[1]))


def test_er_sde_converges() -> None:
    """The mean over all noise follows dx/dσ = φ′/φ·(x − x0), whose solution for Gaussian pictures is an integral."""
    start = np.array([3.0, -5.0])
    log_ratio = simpson(lambda v: phi_slope(v) / phi(v) * v**2 / (DEVIATION**2 + v**2), LOW, HIGH)
    exact = MEAN + (start - MEAN) * np.exp(-log_ratio)
    errors = []
    for count in (60, 120):
        path = smooth_path(np.exp(np.linspace(np.log(HIGH), np.log(LOW), count + 1)))
        x, history = start, ()
        for i in range(count):
            x, history = er_sde(path, i, x, history, Model(perfect_network, "epsilon"), partial(np.zeros, x.shape))
        errors.append(float(np.abs(x - exact).max()))
    assert slope_exponent(errors) > 1.7  # like all multistep methods here, held back by its first steps
    assert errors[1] < 0.001


def test_dpmpp_2s_ancestral_steps_are_second_order() -> None:
    """Without noise a step goes down to σ_down; beyond that, its error falls with the third power of its length."""
    start, errors = np.array([3.0, -5.0]), []
    for h in (0.1, 0.05):
        path = smooth_path(np.array([2.0, 2.0 * np.exp(-h), 0.0]))
        down = 2.0 * np.exp(-2 * h)
        exact = MEAN + (start - MEAN) * np.sqrt((DEVIATION**2 + down**2) / (DEVIATION**2 + 2.0**2))
        x, _ = dpmpp_2s_ancestral(path, 0, start, (), Model(perfect_network, "epsilon"), partial(np.zeros, start.shape))
        errors.append(float(np.abs(x - exact).max()))
    assert slope_exponent(errors) > 2.7
    assert errors[1] < 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_pictures_come_out_as_they_are_distributed(name: str) -> None:
    """With the perfect network all is linear in the noise: mean and deviation of the pictures, without drawing any.

    Each "value" of the latents is the coefficient of one of the noises; the last one is the constant 1."""
    schedule = NoiseSchedule.from_config(config(name))
    distances = []
    for count in (100, 200):
        plan = make_plan(config(name, timestep_spacing="trailing"), count)
        state = np.zeros((plan.coefficients.shape[1], len(plan) + 2))
        first = float(schedule.sigma_at(np.array(plan.timesteps[0])))
        state[0, [0, -1]] = np.array([np.sqrt(DEVIATION**2 + first**2), MEAN]) * plan.start_signal
        for k, timestep in enumerate(plan.timesteps):
            sigma = float(schedule.sigma_at(np.array(timestep)))
            output = sigma / (DEVIATION**2 + sigma**2) * np.sqrt(1 + sigma**2) * state[0]
            output[-1] -= sigma / (DEVIATION**2 + sigma**2) * MEAN
            fresh = np.eye(len(plan) + 2)[k + 1] * plan.draws[k]
            state = plan.coefficients[k] @ np.vstack([state, output, fresh])
        mean, deviation = state[0, -1], np.sqrt((state[0, :-1] ** 2).sum())
        distances.append(abs(mean - MEAN) + abs(deviation - DEVIATION))
    assert distances[1] < 0.006  # the last step, from σ to a guess of the picture, narrows it by σ²/2
    assert distances[1] < 0.6 * distances[0]


# ---- a name of our own -----------------------------------------------------------------------------------------------

CHECKPOINTS: dict[str, dict[str, Any]] = {
    "stable diffusion 1": STABLE_DIFFUSION,
    "stable diffusion 2.1": {**STABLE_DIFFUSION, "_class_name": "DDIMScheduler", "prediction_type": "v_prediction"},
    "turbo": {**STABLE_DIFFUSION, "_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"},
    "saved by DPM++ 3M Karras": {
        **STABLE_DIFFUSION,
        "_class_name": "DPMSolverMultistepScheduler",
        "use_karras_sigmas": True,
        "solver_order": 3,
    },
    "latent consistency": {**STABLE_DIFFUSION, "_class_name": "LCMScheduler", "original_inference_steps": 50},
    "zero terminal SNR": {
        **STABLE_DIFFUSION,
        "_class_name": "DDIMScheduler",
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    },
}


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("name", NAMES)
def test_any_checkpoint_can_be_switched(name: str, checkpoint: str) -> None:
    own = SchedulerConfig.from_dict(CHECKPOINTS[checkpoint])
    for warp, suffix in (("", ""), ("_karras", " Karras"), ("_exponential", " Exponential")):
        used = own.switched(resolve(name + warp))
        assert used.class_name == name and used.label.endswith(suffix)
        assert (used.prediction_type, used.beta_end) == (own.prediction_type, own.beta_end)
        assert used.rescale_betas_zero_snr == own.rescale_betas_zero_snr
        assert replace(own.switched(resolve(used.label)), original="") == replace(used, original="")
        assert make_plan(used, 6).draws.any()
        back = used.switched(resolve("ddim"))
        assert replace(back, original="") == replace(own.switched(resolve("ddim")), original="")


@pytest.mark.parametrize("name", NAMES)
def test_listed_as_what_it_is(name: str) -> None:
    remarks = {listed.partition("[")[0]: remark for listed, remark in describe()}
    assert remarks[name].endswith("(not in diffusers)")
    assert sum(remark.endswith("(not in diffusers)") for remark in remarks.values()) == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_diffusers_cannot_name_it(name: str) -> None:
    with pytest.raises(BundleError, match=f"_class_name: got {name}, accepted DDIMScheduler, ") as caught:
        SchedulerConfig.from_dict({**STABLE_DIFFUSION, "_class_name": name})
    assert not {known for known, sampler in BY_CLASS.items() if sampler.diffusers_class is None} & set(
        str(caught.value).partition("accepted")[2].replace(";", ",").split(", ")
    )


@pytest.mark.parametrize("name", NAMES)
def test_options_that_are_not_computed_are_refused(name: str) -> None:
    own = SchedulerConfig.from_dict({**STABLE_DIFFUSION, "use_beta_sigmas": True})
    with pytest.raises(UsageError, match=f"{name}: use_beta_sigmas: got True, accepted False, null"):
        own.switched(resolve(name))
    with pytest.raises(UsageError, match=r"`eta` for a sampler without one, as all but ddim and tcd: got 0\.5"):
        make_plan(config(name), 5, eta=0.5)


@pytest.mark.parametrize("name", [NAMES[0], f"{NAMES[1]}_karras"])
def test_a_picture_and_what_it_tells(
    name: str, demo_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Drawn by name, and drawn again, to the byte, from the label in its metadata."""
    monkeypatch.chdir(tmp_path)
    model = ["--model", str(demo_bundle), "--quiet"]
    size = ["--steps", "5", "--width", "64", "--height", "64", "--seed", "3"]
    assert sd_run(["a red star", "--scheduler", name, *size, *model, "--output", "a.png"]) == 0
    assert sd_run(["--from-image", "a.png", *model, "--output", "b.png"]) == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    assert f"Sampler: {resolve(name).label}, ".encode() in Path("a.png").read_bytes()
    assert capsys.readouterr().err == ""


# ---- nothing to compare with -----------------------------------------------------------------------------------------

NO_REFERENCE = (
    "scheduler: diffusers has no {}, so there is no reference to compare with; choose a sampler that diffusers"
)


@pytest.mark.parametrize("name", NAMES)
def test_there_is_no_reference_class(name: str) -> None:
    with pytest.raises(UsageError, match="diffusers has no") as caught:
        resolve(f"{name}_karras").reference_class()
    label = resolve(f"{name}_karras").label
    assert str(caught.value) == f"{NO_REFERENCE.format(label)} has, such as euler_a or dpmpp_2m"
    for remedy in ("euler_a", "dpmpp_2m"):
        assert resolve(remedy).reference_class() == resolve(remedy).class_name


@pytest.mark.parametrize("program", ["sd_export.verify.cli", "benchmark"])
def test_programs_that_compare_say_so_in_a_line(
    program: str, demo_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = pytest.importorskip(program).main
    assert main([str(demo_bundle), "--scheduler", "er_sde", "--steps", "2"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert NO_REFERENCE.format("ER SDE") in err
