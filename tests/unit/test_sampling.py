"""Plans: equal to the samplers they were compiled from, cheap; and samplers: of the order they claim.

What the samplers compute is compared with diffusers in test_schedulers_parity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sd_runtime.errors import UsageError
from sd_runtime.sampling import SamplingPlan, SchedulerConfig, make_plan, resolve
from sd_runtime.sampling.dpm_solver import dpmpp_multistep, dpmpp_singlestep, unipc
from sd_runtime.sampling.make import make_path, make_sampler
from sd_runtime.sampling.path import SamplingPath
from sd_runtime.sampling.plan import scale_after
from sd_runtime.sampling.registry import PRESETS
from sd_runtime.sampling.samplers import History, Model, StepFunction, ancestral, deis, dpm2, euler, heun, lms, plms
from sd_runtime.sampling.schedule import NoiseSchedule

STABLE_DIFFUSION = SchedulerConfig.from_dict(
    {
        "_class_name": "PNDMScheduler",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
    }
)
WARPS = ("", "_karras", "_exponential")
NAMES = [preset.aliases[0] + warp for sampler, preset in PRESETS for warp in (WARPS if sampler.warps else WARPS[:1])]


def config(name: str, **changes: Any) -> SchedulerConfig:
    return replace(STABLE_DIFFUSION.switched(resolve(name)), **changes)


def network(z: np.ndarray, timestep: float) -> np.ndarray:
    return 0.8 * np.sin(1.3 * z + timestep / 1000)


def noise_tape() -> Callable[[], np.ndarray]:
    return partial(np.random.default_rng(7).standard_normal, 5)


def run_plan(plan: SamplingPlan, latents: np.ndarray) -> np.ndarray:
    """The plan in float64, by its definition: state = coefficients[k] @ [state, output, noise]."""
    fresh = noise_tape()
    state = np.zeros((plan.coefficients.shape[1], latents.size))
    state[0] = latents
    for k, timestep in enumerate(plan.timesteps):
        noise = fresh() if plan.draws[k] else np.full(latents.size, np.nan)
        columns = np.vstack([state, network(state[0], timestep), noise])
        used = plan.coefficients[k].any(axis=0)
        state = plan.coefficients[k][:, used] @ columns[used]
    return state[0]


def sample_directly(
    step: StepFunction,
    path: SamplingPath,
    prediction_type: str,
    latents: np.ndarray,
    network: Callable[[np.ndarray, float], np.ndarray],
    noise: Callable[[], np.ndarray],
) -> np.ndarray:
    """The sampler without a plan, as its paper has it: from the network's first input to the finished latents.

    Between steps the latents are handed over as the network sees them, z = x / √(1 + σ²)."""
    history: History = ()
    for i in range(len(path)):
        x = latents * np.sqrt(1 + path.sigmas[i] ** 2)
        x, history = step(path, i, x, history, Model(network, prediction_type), noise)
        latents = x * scale_after(path, i)
    return latents


plans = {
    "name": st.sampled_from(NAMES),
    "count": st.integers(1, 40),
    "prediction": st.sampled_from(("epsilon", "v_prediction", "sample")),
    "spacing": st.sampled_from(("leading", "linspace", "trailing")),
    "strength": st.floats(0.05, 1.0),
}


@settings(max_examples=300, deadline=None, derandomize=True)
@given(**plans)
def test_a_plan_equals_its_sampler(name: str, count: int, prediction: str, spacing: str, strength: float) -> None:
    settings_ = config(name, prediction_type=prediction, timestep_spacing=spacing)
    strength = min(max(strength, 1.001 / count), 1.0)
    step, path = make_sampler(settings_, count, strength=strength)
    latents = np.random.default_rng(count).standard_normal(5)
    direct = sample_directly(step, path, prediction, latents, network, noise_tape())
    planned = run_plan(make_plan(settings_, count, strength=strength), latents)
    np.testing.assert_allclose(planned, direct, rtol=0, atol=1e-12 * np.abs(direct).max())


@pytest.mark.parametrize("name", NAMES)
def test_advance_is_the_matrix_product_in_float32(name: str) -> None:
    plan = make_plan(config(name), 6)
    generator = np.random.default_rng(3)
    size = plan.coefficients.shape[1]
    for k in range(len(plan)):
        state, output, noise = (
            generator.standard_normal(shape).astype(np.float32) for shape in ((size, 64), (64,), (64,))
        )
        given_state = state.copy()
        after = plan.advance(k, state, output, noise if plan.draws[k] else None)
        exact = plan.coefficients[k] @ np.vstack([state, output, noise]).astype(np.float64)
        assert after.dtype == np.float32 and after.shape == state.shape
        np.testing.assert_array_equal(state, given_state)
        np.testing.assert_allclose(after, exact, rtol=0, atol=3e-6 * np.abs(exact).max())


def test_initial_state_holds_the_first_input_and_nothing_else() -> None:
    latents = np.random.default_rng(0).standard_normal((2, 4, 3, 3)).astype(np.float32)
    state = make_plan(config("dpmpp_2m"), 4).initial_state(latents)
    assert state.dtype == np.float32
    np.testing.assert_array_equal(state[0], latents.ravel())
    assert not state[1:].any()


@pytest.mark.parametrize("name", [name for name in NAMES if name != "plms"])  # its tail follows diffusers' quirk
def test_image_to_image_is_the_end_of_the_whole_path(name: str) -> None:
    """Half of the steps, at the same noise levels, entered with exactly that level's share of signal and noise."""
    settings_ = config(name)
    whole, half = make_sampler(settings_, 10)[1], make_sampler(settings_, 10, strength=0.5)[1]
    assert len(whole) - len(half) == half.skipped == 5
    np.testing.assert_array_equal(half.timesteps, whole.timesteps[5:])
    np.testing.assert_array_equal(half.sigmas_next, whole.sigmas_next[5:])
    plan = make_plan(settings_, 10, strength=0.5)
    assert plan.start_noise / plan.start_signal == pytest.approx(whole.sigmas[5], rel=1e-12)
    assert plan.start_noise**2 + plan.start_signal**2 == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_paths_fall_and_end_at_the_picture(name: str) -> None:
    for count in (1, 2, 7, 25):
        path = make_sampler(config(name), count)[1]
        assert (path.sigmas_next <= path.sigmas).all()
        assert path.sigmas_next[-1] < 0.04
        assert path.timesteps.min() >= 0 and path.timesteps.max() <= 999


def test_draws_only_where_noise_counts() -> None:
    """A draw that nothing uses would shift the noise of every later step."""
    for name in NAMES:
        plan = make_plan(config(name), 12)
        np.testing.assert_array_equal(plan.draws, plan.coefficients[:, :, -1].any(axis=1), err_msg=name)
    assert not make_plan(config("ddim"), 12, eta=0.0).draws.any()
    assert make_plan(config("ddim"), 12, eta=0.1).draws.sum() == 12  # ends at sigma_min, so even the last one
    assert make_plan(config("dpmpp_sde"), 12).draws.sum() == 22


STATE_TENSORS = {
    **dict.fromkeys(("ddim", "ddpm", "euler", "euler_a", "lcm", "tcd"), 1),
    **dict.fromkeys(("dpm2", "dpm2_a", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_2m_sde_heun", "deis"), 2),
    **dict.fromkeys(("heun", "dpmpp_3m", "dpmpp_2s", "dpmpp_2s_ancestral", "er_sde"), 3),
    **dict.fromkeys(("plms", "lms", "dpmpp_sde", "dpmpp_3s", "unipc", "unipc_bh1"), 4),
}


@pytest.mark.parametrize("name", [preset.aliases[0] for _, preset in PRESETS])
def test_the_state_holds_nothing_that_is_not_read(name: str) -> None:
    """Memory on the device, and time on the host."""
    assert make_plan(config(name), 20).coefficients.shape[1] == STATE_TENSORS[name]


def test_evaluations_know_their_step() -> None:
    np.testing.assert_array_equal(make_plan(config("heun"), 4).steps, [0, 0, 1, 1, 2, 2, 3])
    np.testing.assert_array_equal(make_plan(config("dpmpp_2m"), 4).steps, [0, 1, 2, 3])


def test_plans_are_cached_and_cannot_be_changed() -> None:
    plan = make_plan(config("unipc"), 21)
    assert make_plan(config("unipc"), 21) is plan
    assert make_plan(config("unipc"), 22) is not plan
    for array in (plan.timesteps, plan.coefficients, plan.draws, plan.steps):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


# ---- what cannot be had ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count", "options", "message"),
    [
        ("euler", 0, {}, "num_inference_steps for Euler: got 0, accepted 1 to 1000"),
        ("dpmpp_2m", 1000, {}, "num_inference_steps for DPM"),
        ("lcm", 51, {}, "accepted 1 to 50"),
        ("euler", 10, {"strength": 0.0}, "strength: got 0.0"),
        ("euler", 10, {"strength": 0.09}, "strength: got 0.09, accepted at least 0.1 at 10 steps"),
        ("euler", 10, {"strength": 1.01}, "strength"),
        ("euler", 10, {"strength": float("nan")}, "strength"),
        ("euler", 10, {"eta": 0.5}, "as all but ddim and tcd"),
        ("ddim", 10, {"eta": 1.5}, "eta: got 1.5, accepted 0 to 1"),
        ("ddim", 10, {"eta": float("nan")}, "eta"),
        ("ddim", 1000, {}, "steps_offset"),
    ],
)
def test_impossible_requests(name: str, count: int, options: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_plan(config(name), count, **options)


def test_epsilon_predictions_cannot_start_from_pure_noise() -> None:
    zero_snr = config("ddim", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    with pytest.raises(UsageError, match="zero terminal SNR"):
        make_plan(zero_snr, 10)
    make_plan(replace(zero_snr, prediction_type="v_prediction"), 10)
    make_plan(replace(zero_snr, timestep_spacing="leading"), 10)


# ---- the samplers, against mathematics -------------------------------------------------------------------------------

MEAN, DEVIATION = 0.7, 0.5  # of Gaussian "pictures": the best x0 and the solution of the equation are known


def perfect_network(z: np.ndarray, sigma: float) -> np.ndarray:
    """The exact ε for pictures from N(MEAN, DEVIATION²); told σ in place of a timestep."""
    x = z * np.sqrt(1 + sigma**2)
    return sigma / (DEVIATION**2 + sigma**2) * (x - MEAN)


class SigmaIsTimestep(NoiseSchedule):
    def timestep_at(self, sigmas: Any) -> Any:
        return sigmas


def smooth_path(count: int, *, doubled: bool = False) -> SamplingPath:
    """count equal steps in log σ from 8 to 0.3 and one more, which Heun's method looks ahead to."""
    sigmas = np.exp(np.linspace(np.log(8), np.log(0.3), count + 1))
    start, end = sigmas, np.append(sigmas[1:], 0.2)
    told = start
    if doubled:  # as pndm_path does
        told, end = np.concatenate([sigmas[:2], sigmas[1:]]), np.concatenate([end[:1], end])
        start = np.concatenate([sigmas[:1], sigmas])
    return SamplingPath(SigmaIsTimestep(np.array([0.5], np.float32)), told, start, end)


SOLVERS = {  # step, order: the error falls as 1 / count^order
    "euler": (euler, 1),
    "heun": (heun, 2),
    "dpm2": (dpm2, 2),
    "lms": (lms, 2),  # like all multistep methods here, held back by its first steps
    "plms": (plms, 2),
    "deis": (partial(deis, lower_order_final=False), 2),
    "1m": (partial(dpmpp_multistep, order=1, lower_order_final=False), 1),
    "2m": (partial(dpmpp_multistep, order=2, lower_order_final=False), 2),
    "2m heun": (partial(dpmpp_multistep, order=2, solver_type="heun", lower_order_final=False), 2),
    "3m": (partial(dpmpp_multistep, order=3, lower_order_final=False), 2),
    "2s": (partial(dpmpp_singlestep, order=2, lower_order_final=False), 2),
    "3s": (partial(dpmpp_singlestep, order=3, lower_order_final=False), 3),
    "3s heun": (partial(dpmpp_singlestep, order=3, solver_type="heun", lower_order_final=False), 3),
    "unipc 1": (partial(unipc, order=1, lower_order_final=False), 2),  # the corrector adds one
    "unipc 2 bh1": (partial(unipc, order=2, solver_type="bh1", lower_order_final=False), 3),
    "unipc 2 bh2": (partial(unipc, order=2, lower_order_final=False), 3),
    "unipc 3": (partial(unipc, order=3, lower_order_final=False), 4),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_order_of_convergence(name: str) -> None:
    step, order = SOLVERS[name]
    start, model = np.array([3.0, -5.0]), Model(perfect_network, "epsilon")
    ratio = np.sqrt((DEVIATION**2 + 0.3**2) / (DEVIATION**2 + 8**2))
    errors = []
    for count in (60, 120):
        path, x, history = smooth_path(count, doubled=name == "plms"), start, ()
        for i in range(len(path) - 1):
            x, history = step(path, i, x, history, model, None)  # type: ignore[arg-type]
        errors.append(np.abs(x - (MEAN + (start - MEAN) * ratio)).max())
    assert np.log2(errors[0] / errors[1]) > order - 0.3
    assert errors[1] < 0.004


@settings(max_examples=200, derandomize=True)
@given(st.floats(1e-3, 200), st.floats(0, 1), st.floats(0, 1))
def test_ancestral_steps_keep_the_noise_level(sigma: float, share: float, eta: float) -> None:
    target = sigma * share
    down, up = ancestral(sigma, target, eta)
    assert down**2 + up**2 == pytest.approx(target**2, rel=1e-12)
    assert 0 <= down <= target * (1 + 1e-12)


def test_stochastic_samplers_reach_the_right_spread() -> None:
    """From unit noise to 4000 pictures of N(MEAN, DEVIATION²), with the perfect network."""
    generator = np.random.default_rng(0)
    schedule = NoiseSchedule.from_config(STABLE_DIFFUSION)

    def told_timestep(z: np.ndarray, timestep: float) -> np.ndarray:
        return perfect_network(z, float(schedule.sigma_at(np.array(timestep))))

    names = ("ddpm", "euler_a", "dpm2_a", "dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_sde")
    for name in (*names, "dpmpp_2s_ancestral", "er_sde"):
        step, path = make_sampler(config(name, timestep_spacing="trailing"), 300)
        noise = partial(generator.standard_normal, 4000)
        pictures = sample_directly(step, path, "epsilon", noise(), told_timestep, noise)
        assert pictures.mean() == pytest.approx(MEAN, abs=0.03), name
        assert pictures.std() == pytest.approx(DEVIATION, rel=0.05), name


# ---- the training schedule, against torch ----------------------------------------------------------------------------


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize(
    "betas",
    [
        {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
        {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": np.linspace(1e-4, 0.03, 777).tolist(), "num_train_timesteps": 777},
        {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 501},
    ],
)
@pytest.mark.parametrize("class_name", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_alphas_cumprod_is_torchs(class_name: str, betas: dict[str, Any], zero_snr: bool) -> None:
    diffusers = pytest.importorskip("diffusers")
    raw = {"_class_name": class_name, "clip_sample": False, "rescale_betas_zero_snr": zero_snr, **betas}
    theirs = getattr(diffusers, class_name).from_config(raw).alphas_cumprod.numpy()
    ours = NoiseSchedule.from_config(SchedulerConfig.from_dict(raw)).alphas_cumprod
    assert ours.dtype == np.float32
    if zero_snr:  # torch's square root, which only this needs, is one bit off on some processors
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)
        assert ours[-1] == theirs[-1]
    else:
        assert ours.tobytes() == theirs.tobytes()


def test_sigma_and_timestep_are_each_others_inverse() -> None:
    schedule = NoiseSchedule.from_config(STABLE_DIFFUSION)
    timesteps = np.arange(1000.0)
    np.testing.assert_allclose(schedule.timestep_at(schedule.sigma_at(timesteps)), timesteps, atol=1e-3)
    assert schedule.timestep_at(1e9) == 999 and schedule.timestep_at(0.0) == 0
    assert schedule.sigmas[[0, 999]] == pytest.approx([0.0292, 14.6146], abs=1e-4)


def test_tail_of_a_tail() -> None:
    path = make_path(config("euler"), NoiseSchedule.from_config(STABLE_DIFFUSION), 20)
    assert path.tail(3).tail(4).skipped == 7
    assert path.tail(3).tail(4).planned == 20


@pytest.mark.parametrize(("steps", "strength"), [(4, 1.0), (4, 0.5), (1, 0.8), (8, 0.3), (5, 0.37)])
@pytest.mark.parametrize("name", ["lcm", "tcd"])
def test_steps_kept_at_a_strength_are_diffusers(name: str, steps: int, strength: float) -> None:
    from diffusers import LCMScheduler, TCDScheduler

    theirs = (LCMScheduler if name == "lcm" else TCDScheduler)()
    theirs.set_timesteps(steps, strength=strength)
    plan = make_plan(config(name), steps, strength=strength, keep_steps=True)
    assert plan.timesteps.tolist() == theirs.timesteps.tolist()


def test_steps_kept_at_a_strength_have_room() -> None:
    with pytest.raises(UsageError, match=r"strength: got 0\.05, accepted at least 0\.08 at 4 steps; fewer steps"):
        make_plan(config("lcm"), 4, strength=0.05, keep_steps=True)
    kept, cut = (make_plan(config("euler"), 10, strength=0.5, keep_steps=keep) for keep in (True, False))
    assert kept.timesteps.tolist() == cut.timesteps.tolist()  # other samplers do not know it
