"""Every sampler against diffusers' scheduler of the same configuration, driven as StableDiffusionPipeline drives it.

Both sides see the same fake network, start from the same noise and draw the same noise on the way.  The error is the
largest difference of the final latents, relative to the largest latent; float32 rounding costs a few 1e-6.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from reference_schedulers import BrownianTape, scheduler_module
from sd_runtime.sampling import SamplingPlan, SchedulerConfig, make_plan
from sd_runtime.sampling.make import make_sampler
from sd_runtime.sampling.registry import BY_CLASS

pytestmark = [  # diffusers hands torch tensors to numpy functions
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
]

SHAPE = (1, 4, 3, 3)
STEPS = (5, 20, 30, 50)
TOLERANCE = 2e-5
STABLE_DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
}


@dataclass(frozen=True)
class Sampler:
    name: str  # of the diffusers class, without "Scheduler"
    options: dict[str, Any] = field(default_factory=dict)
    eta: float | None = None

    @property
    def class_name(self) -> str:
        return f"{self.name}Scheduler"

    def __str__(self) -> str:
        settings = [str(value) for value in self.options.values()] + ([f"eta{self.eta}"] if self.eta else [])
        return "-".join([self.name, *settings])


SAMPLERS = (
    Sampler("DDIM"),
    Sampler("DDIM", eta=0.6),
    Sampler("DDIM", eta=1.0),
    Sampler("DDPM"),
    Sampler("PNDM"),
    Sampler("EulerDiscrete"),
    Sampler("EulerAncestralDiscrete"),
    Sampler("LMSDiscrete"),
    Sampler("HeunDiscrete"),
    Sampler("KDPM2Discrete"),
    Sampler("KDPM2AncestralDiscrete"),
    Sampler("DPMSolverSDE"),
    Sampler("DPMSolverMultistep", {"solver_order": 1}),
    Sampler("DPMSolverMultistep", {"solver_order": 2}),
    Sampler("DPMSolverMultistep", {"solver_order": 2, "solver_type": "heun"}),
    Sampler("DPMSolverMultistep", {"solver_order": 3}),
    Sampler("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"}),
    Sampler("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"}),
    Sampler("DPMSolverSinglestep", {"solver_order": 2}),
    Sampler("DPMSolverSinglestep", {"solver_order": 2, "solver_type": "heun"}),
    Sampler("DPMSolverSinglestep", {"solver_order": 3}),
    Sampler("DPMSolverSinglestep", {"solver_order": 3, "solver_type": "heun"}),
    Sampler("UniPCMultistep", {"solver_type": "bh1"}),
    Sampler("UniPCMultistep", {"solver_type": "bh2"}),
    Sampler("UniPCMultistep", {"solver_type": "bh2", "solver_order": 3}),
    Sampler("DEISMultistep", {"solver_order": 2}),
    Sampler("DEISMultistep", {"solver_order": 3}),
    Sampler("LCM"),
    Sampler("TCD"),
    Sampler("TCD", eta=0.8),
)

# Where diffusers and we differ, why, and what is compared instead.  Nothing else in this file makes an exception.
EXCEPTIONS: dict[tuple[str, str], str] = {
    ("LMSDiscrete", "float64"): "at order 4, rounding of the latents grows to 5e-5 over 50 exponential steps, on both "
    "sides.  Compared in float64.",
    ("DEISMultistep", "float64"): "its closed-form weights cancel in float32: 1e-3 at order 3 and 50 steps.  Compared "
    "in float64, where they agree with our quadrature.",
    ("UniPCMultistep", "bh1 ends at sigma_min"): "at σ = 0 its bh1 multiplies infinity by 0 and returns NaN; ours is "
    "finite.  Compared with final_sigmas_type sigma_min.",
    ("PNDM", "no sample"): "raises for prediction_type sample; ours computes it.",
    ("EulerAncestralDiscrete", "no sample"): "likewise.",
    ("KDPM2Discrete", "no sample"): "likewise.",
    ("KDPM2AncestralDiscrete", "no sample"): "likewise.",
    ("DPMSolverSDE", "no sample"): "likewise.",
    ("DDIM-eta1.0", "zero terminal SNR"): "takes the root of a negative number, by rounding, and returns NaN at some "
    "step counts; ours is finite.  Compared at eta 0 and 0.6.",
    (
        "EulerDiscrete",
        "zero terminal SNR",
    ): "holds x in float32 at σ = 4096, where numbers lie 2.4e-4 apart; ours holds z.  Compared with 5e-4.",
    ("DPMSolverMultistep", "trailing"): "at 62 step counts of 1000 its trailing list is one too long.  Not compared.",
    ("LMSDiscrete", "image to image"): "takes its order from the absolute step, so its first steps weigh slopes that "
    "do not exist (4e-2); ours starts at order 1.  Not compared.",
}


def network(z: np.ndarray, timestep: float) -> np.ndarray:
    """A smooth nonlinear stand-in for the UNet, bounded so that rounding does not grow; computes in z's dtype."""
    return z.dtype.type(0.8) * np.sin(z.dtype.type(1.3) * z + z.dtype.type(timestep / 1000))


def starting_noise() -> np.ndarray:
    return np.random.default_rng(1).standard_normal(SHAPE).astype(np.float32)


def dtype_for(sampler: Sampler) -> type[np.floating]:
    return np.float64 if (sampler.name, "float64") in EXCEPTIONS else np.float32


class NoiseTape:
    """Fresh noise, the same sequence for both sides."""

    def __init__(self) -> None:
        self._generator = np.random.default_rng(2)

    def __call__(self) -> np.ndarray:
        return self._generator.standard_normal(SHAPE).astype(np.float32)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def diffusers_result(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """run(sampler, scheduler, count, latents=None, skip=0) → (final latents, timesteps told to the network)."""

    def run(
        sampler: Sampler, scheduler: Any, count: int, latents: np.ndarray | None = None, skip: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        module, tape = scheduler_module(sampler.name), NoiseTape()
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: torch.from_numpy(tape()), raising=False)
        monkeypatch.setattr(module, "BrownianTreeNoiseSampler", lambda *_: BrownianTape(tape), raising=False)
        scheduler.set_timesteps(count)
        timesteps = scheduler.timesteps
        sample = torch.from_numpy(starting_noise().astype(dtype_for(sampler)))
        if latents is None:
            sample = sample * scheduler.init_noise_sigma
        else:  # StableDiffusionImg2ImgPipeline.get_timesteps and .prepare_latents
            timesteps = timesteps[skip * scheduler.order :]
            if hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(skip * scheduler.order)
            sample = scheduler.add_noise(torch.from_numpy(latents), sample, timesteps[:1])
        if dtype_for(sampler) is np.float64:  # as numbers for LMS, whose quadrature crawls on tensors
            wide = scheduler.sigmas.double()
            scheduler.sigmas = wide.tolist() if sampler.name == "LMSDiscrete" else wide
        extra = {} if sampler.eta is None else {"eta": sampler.eta}
        for timestep in timesteps:
            fed = scheduler.scale_model_input(sample, timestep)
            output = torch.from_numpy(network(fed.numpy(), float(timestep)))
            sample = scheduler.step(output, timestep, sample, **extra, return_dict=False)[0]
        return sample.numpy(), timesteps.double().numpy()

    return run


def our_result(
    plan: SamplingPlan, latents: np.ndarray | None = None, dtype: type[np.floating] = np.float32
) -> np.ndarray:
    """The plan's final latents: through `advance` in float32, by the plain matrix product in float64."""
    noise, tape = starting_noise().astype(dtype), NoiseTape()
    if latents is None:
        first = dtype(plan.init_noise_scale) * noise
    else:
        first = dtype(plan.start_signal) * latents + dtype(plan.start_noise) * noise
    state = plan.initial_state(first).astype(dtype)
    state[0] = first.ravel()
    for k, timestep in enumerate(plan.timesteps):
        output = network(state[0], float(timestep))
        fresh = tape().ravel() if plan.draws[k] else None
        if dtype is np.float32:
            state = plan.advance(k, state, output, fresh)
        else:
            state = plan.coefficients[k] @ np.vstack([state, output, np.zeros_like(output) if fresh is None else fresh])
    return state[0].reshape(SHAPE)


def raw_config(sampler: Sampler, **options: Any) -> dict[str, Any]:
    raw = {**STABLE_DIFFUSION, **sampler.options, **options, "_class_name": sampler.class_name}
    if sampler.options.get("solver_type") == "bh1":
        raw["final_sigmas_type"] = "sigma_min"
    return raw


def build(raw: dict[str, Any], sampler: Sampler) -> Any:
    """The scheduler; some constructors lay out all 1000 steps, which takes 0.1 s and is made to lay out 2 here."""
    scheduler = getattr(scheduler_module(sampler.name), sampler.class_name)
    lay_out = scheduler.set_timesteps
    with mock.patch.object(scheduler, "set_timesteps", lambda self, count, *rest: lay_out(self, 2, *rest)):
        return scheduler.from_config(raw)


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def supports(sampler: Sampler, option: str) -> bool:
    return option in BY_CLASS[sampler.class_name].honoured


def test_every_sampler_that_diffusers_has_is_compared() -> None:
    """The others are held against their papers in test_samplers_without_reference."""
    known = {entry.diffusers_class for entry in BY_CLASS.values() if entry.diffusers_class is not None}
    assert {sampler.class_name for sampler in SAMPLERS} == known


def matrix() -> Iterator[Any]:
    spacings, warps = ("leading", "linspace", "trailing"), ("", "karras", "exponential")
    for sampler, prediction in itertools.product(SAMPLERS, ("epsilon", "v_prediction", "sample")):
        if prediction == "sample" and (sampler.name, "no sample") in EXCEPTIONS:
            continue
        for spacing, warp in itertools.product(spacings, warps):
            if (spacing == "leading" or supports(sampler, "timestep_spacing")) and (
                not warp or supports(sampler, "use_karras_sigmas")
            ):
                name = "-".join(filter(None, (str(sampler), prediction, spacing, warp)))
                yield pytest.param(sampler, prediction, spacing, warp, id=name)


@pytest.mark.parametrize(("sampler", "prediction", "spacing", "warp"), list(matrix()))
def test_the_matrix(
    sampler: Sampler, prediction: str, spacing: str, warp: str, diffusers_result: Callable[..., Any]
) -> None:
    options: dict[str, Any] = {"prediction_type": prediction, "timestep_spacing": spacing}
    if warp:
        options[f"use_{warp}_sigmas"] = True
    raw = raw_config(sampler, **options)
    scheduler, config = build(raw, sampler), SchedulerConfig.from_dict(raw)
    for count in STEPS:
        plan = make_plan(config, count, eta=sampler.eta)
        theirs, timesteps = diffusers_result(sampler, scheduler, count)
        np.testing.assert_allclose(plan.timesteps, timesteps, rtol=0, atol=1e-3)
        assert difference(our_result(plan, dtype=dtype_for(sampler)), theirs) < TOLERANCE, f"{count} steps"


OPTIONS = (
    (Sampler("DDIM"), {"set_alpha_to_one": True}),
    (Sampler("DDIM", eta=0.5), {"set_alpha_to_one": True}),
    (Sampler("PNDM"), {"set_alpha_to_one": True}),
    (Sampler("DDPM"), {"variance_type": "fixed_small_log"}),
    (Sampler("EulerDiscrete"), {"final_sigmas_type": "sigma_min"}),
    (Sampler("EulerDiscrete"), {"final_sigmas_type": "sigma_min", "use_karras_sigmas": True}),
    (Sampler("DPMSolverMultistep"), {"final_sigmas_type": "sigma_min"}),
    (Sampler("DPMSolverMultistep"), {"final_sigmas_type": "sigma_min", "use_karras_sigmas": True}),
    (Sampler("DPMSolverMultistep"), {"lower_order_final": False, "solver_order": 3}),
    (Sampler("DPMSolverMultistep"), {"lower_order_final": False, "final_sigmas_type": "sigma_min", "solver_order": 3}),
    (Sampler("DPMSolverMultistep"), {"euler_at_final": True, "final_sigmas_type": "sigma_min"}),
    (Sampler("DPMSolverMultistep"), {"algorithm_type": "sde-dpmsolver++", "final_sigmas_type": "sigma_min"}),
    (Sampler("DPMSolverMultistep"), {"beta_schedule": "squaredcos_cap_v2"}),
    (Sampler("DPMSolverMultistep"), {"solver_type": "bh2"}),  # carried over from another class, and renamed
    (Sampler("DPMSolverMultistep"), {"algorithm_type": "deis", "final_sigmas_type": "sigma_min"}),
    (Sampler("DPMSolverSinglestep"), {"lower_order_final": True, "final_sigmas_type": "sigma_min"}),
    (Sampler("DPMSolverSinglestep"), {"lower_order_final": True, "final_sigmas_type": "sigma_min", "solver_order": 3}),
    (Sampler("DPMSolverSinglestep"), {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min", "solver_order": 3}),
    (Sampler("UniPCMultistep"), {"final_sigmas_type": "sigma_min"}),
    (Sampler("UniPCMultistep"), {"final_sigmas_type": "sigma_min", "lower_order_final": False, "solver_order": 3}),
    (Sampler("UniPCMultistep"), {"final_sigmas_type": "sigma_min", "use_karras_sigmas": True}),
    (Sampler("UniPCMultistep"), {"solver_type": "midpoint"}),
    (Sampler("DEISMultistep"), {"lower_order_final": False, "solver_order": 3}),
    (Sampler("DEISMultistep"), {"algorithm_type": "dpmsolver++", "solver_type": "heun"}),
    (Sampler("LCM"), {"original_inference_steps": 100, "timestep_scaling": 1.0}),
    (Sampler("TCD"), {"original_inference_steps": 100}),
    *((sampler, {"num_train_timesteps": 500, "timestep_spacing": "trailing"}) for sampler in SAMPLERS),
)


@pytest.mark.parametrize(
    ("sampler", "options"), OPTIONS, ids=lambda value: str(value) if isinstance(value, Sampler) else ",".join(value)
)
def test_other_options_and_few_steps(
    sampler: Sampler, options: dict[str, Any], diffusers_result: Callable[..., Any]
) -> None:
    raw = raw_config(sampler, **options)
    for count in (2, 3, 4, 10, 14, 15, 18):
        scheduler = build(raw, sampler)  # anew: the singlestep one changes its own configuration for good
        plan = make_plan(SchedulerConfig.from_dict(raw), count, eta=sampler.eta)
        theirs, timesteps = diffusers_result(sampler, scheduler, count)
        np.testing.assert_allclose(plan.timesteps, timesteps, rtol=0, atol=1e-3)
        assert difference(our_result(plan, dtype=dtype_for(sampler)), theirs) < TOLERANCE, f"{count} steps"


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
@pytest.mark.parametrize("betas", ["linear", "trained"])
def test_other_training_schedules(sampler: Sampler, betas: str, diffusers_result: Callable[..., Any]) -> None:
    """Ho et al.'s linear betas, whose σ reaches 157, and a list of betas."""
    trained = np.linspace(0.001, 0.01, 1000).tolist()
    linear = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
    raw = raw_config(sampler, **(linear if betas == "linear" else {"trained_betas": trained}))
    scheduler, config = build(raw, sampler), SchedulerConfig.from_dict(raw)
    for count in (10, 25):
        theirs, _ = diffusers_result(sampler, scheduler, count)
        ours = our_result(make_plan(config, count, eta=sampler.eta), dtype=dtype_for(sampler))
        assert difference(ours, theirs) < TOLERANCE, f"{count} steps"


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("sampler", [Sampler("DDIM"), Sampler("EulerDiscrete"), Sampler("DPMSolverMultistep")], ids=str)
def test_timesteps_of_every_step_count(sampler: Sampler, spacing: str) -> None:
    raw = raw_config(sampler, timestep_spacing=spacing)
    scheduler, config = build(raw, sampler), SchedulerConfig.from_dict(raw)
    for count in (*range(1, 100), 128, 250, 333, 500):
        scheduler.set_timesteps(count)
        _, path = make_sampler(config, count)
        if spacing == "trailing" and len(scheduler.timesteps) == count + 1:  # see EXCEPTIONS
            np.testing.assert_array_equal(path.timesteps, scheduler.timesteps[:-1])
            assert scheduler.timesteps[-1] == -1
        else:
            np.testing.assert_array_equal(path.timesteps, scheduler.timesteps)


ZERO_SNR = [
    (sampler, prediction, spacing)
    for sampler in SAMPLERS
    if supports(sampler, "rescale_betas_zero_snr") and str(sampler) != "DDIM-eta1.0"  # see EXCEPTIONS
    for prediction, spacing in (("v_prediction", "trailing"), ("v_prediction", "linspace"), ("epsilon", "leading"))
    if prediction != "epsilon" or supports(sampler, "timestep_spacing")  # epsilon means nothing at the last timestep
]


@pytest.mark.parametrize(("sampler", "prediction", "spacing"), ZERO_SNR, ids=str)
def test_zero_terminal_snr(
    sampler: Sampler, prediction: str, spacing: str, diffusers_result: Callable[..., Any]
) -> None:
    options = {"prediction_type": prediction, "timestep_spacing": spacing}
    raw = raw_config(sampler, rescale_betas_zero_snr=True, **options)
    scheduler, config = build(raw, sampler), SchedulerConfig.from_dict(raw)
    tolerance = 5e-4 if (str(sampler), "zero terminal SNR") in EXCEPTIONS else TOLERANCE
    for count in STEPS:
        theirs, _ = diffusers_result(sampler, scheduler, count)
        assert difference(our_result(make_plan(config, count, eta=sampler.eta)), theirs) < tolerance, f"{count} steps"


TAILS = [
    (sampler, warp)
    for sampler, warp in itertools.product(SAMPLERS, ("", "karras"))
    if (not warp or supports(sampler, "use_karras_sigmas")) and (sampler.name, "image to image") not in EXCEPTIONS
]


@pytest.mark.parametrize(("sampler", "warp"), TAILS, ids=str)
def test_image_to_image_tails(sampler: Sampler, warp: str, diffusers_result: Callable[..., Any]) -> None:
    """StableDiffusionImg2ImgPipeline's rule: the last int(strength · n) steps, entered with `add_noise`."""
    raw = raw_config(sampler, **({"use_karras_sigmas": True} if warp else {}))
    scheduler, config = build(raw, sampler), SchedulerConfig.from_dict(raw)
    latents = np.random.default_rng(3).standard_normal(SHAPE).astype(dtype_for(sampler))
    for count, strength in itertools.product((8, 20), (0.13, 0.3, 0.5, 0.75, 0.9, 0.95, 1.0)):
        plan = make_plan(config, count, strength=strength, eta=sampler.eta)
        skip = count - min(int(count * strength), count)
        theirs, timesteps = diffusers_result(sampler, scheduler, count, latents, skip)
        np.testing.assert_allclose(plan.timesteps, timesteps, rtol=0, atol=1e-3)
        ours = our_result(plan, latents, dtype=dtype_for(sampler))
        assert difference(ours, theirs) < TOLERANCE, f"{count} steps at strength {strength}"
