"""The registry: every sampler is one entry here.

To add a sampler, write its step function (see `samplers`), add an entry that names it, and a test that holds it against
its paper.  Where diffusers has it, say so in `diffusers_class` and the parity tests compare the two; where it has not,
`diffusers_class` is None and the sampler goes by its own first name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .entry import Option, Preset, Sampler
from .options import (
    DISTILLED,
    DPM,
    FIXED_DPM,
    FIXED_EULER,
    FIXED_UNIPC,
    LEADING,
    LINSPACE,
    MIDPOINT,
    MULTISTEP,
    SD_BETAS,
    SOLVER,
    TRAINING,
    WARPS,
    ZERO_SNR,
)

if TYPE_CHECKING:
    from .config import SchedulerConfig


def _dpm(algorithm_type: str, order: int, solver_type: str = "midpoint") -> dict[str, Option]:
    return {"algorithm_type": algorithm_type, "solver_order": order, "solver_type": solver_type}


def _ancestral(config: SchedulerConfig) -> Mapping[str, Any]:
    return {"eta": 1.0}


def _order(config: SchedulerConfig) -> Mapping[str, Any]:
    return {"order": config.solver_order, "lower_order_final": config.lower_order_final}


def _solver(config: SchedulerConfig) -> Mapping[str, Any]:
    return {**_order(config), "solver_type": config.solver_type}


def _multistep(config: SchedulerConfig) -> Mapping[str, Any]:
    sde = config.algorithm_type == "sde-dpmsolver++"
    return {**_solver(config), "sde": sde, "euler_at_final": config.euler_at_final}


def _lcm(config: SchedulerConfig) -> Mapping[str, Any]:
    return {"timestep_scaling": config.timestep_scaling}


SAMPLERS = (
    Sampler(
        diffusers_class="DDIMScheduler",
        presets=(Preset("DDIM", ("ddim",), "deterministic, or stochastic with eta up to 1"),),
        step="samplers.euler",
        default_eta=0.0,
        path="ddim",
        honoured={**TRAINING, **LEADING, **ZERO_SNR, "set_alpha_to_one": True},
        fixed=("clip_sample", "thresholding"),
    ),
    Sampler(
        diffusers_class="DDPMScheduler",
        presets=(Preset("DDPM", ("ddpm",), "the original chain: many steps, noise at each"),),
        step="samplers.euler",
        keywords=_ancestral,
        path="ddpm",
        honoured={**TRAINING, **LEADING, **ZERO_SNR},
        fixed=("clip_sample", "thresholding", "variance_type"),
    ),
    Sampler(
        diffusers_class="PNDMScheduler",
        presets=(
            Preset(
                "PLMS",
                ("plms", "pndm"),
                "pseudo linear multistep, Stable Diffusion 1's own",
                {"skip_prk_steps": True},
            ),
        ),
        step="samplers.plms",
        path="pndm",
        honoured={**TRAINING, **LEADING, "set_alpha_to_one": False},
        fixed=("skip_prk_steps",),
    ),
    Sampler(
        diffusers_class="EulerDiscreteScheduler",
        presets=(Preset("Euler", ("euler",), "one slope a step"),),
        step="samplers.euler",
        path="euler",
        honoured={**TRAINING, **LINSPACE, **WARPS, **ZERO_SNR, "final_sigmas_type": "zero"},
        fixed=FIXED_EULER,
        lifts_zero_snr=True,
    ),
    Sampler(
        diffusers_class="EulerAncestralDiscreteScheduler",
        presets=(Preset("Euler a", ("euler_a", "euler_ancestral"), "Euler, fresh noise each step"),),
        step="samplers.euler",
        keywords=_ancestral,
        path="euler",
        honoured={**TRAINING, **LINSPACE, **ZERO_SNR},
        lifts_zero_snr=True,
    ),
    Sampler(
        diffusers_class="LMSDiscreteScheduler",
        presets=(Preset("LMS", ("lms",), "the last four slopes"),),
        step="samplers.lms",
        path="euler",
        honoured={**TRAINING, **LINSPACE, **WARPS},
        fixed=("use_beta_sigmas",),
    ),
    Sampler(
        diffusers_class="HeunDiscreteScheduler",
        presets=(Preset("Heun", ("heun",), "two evaluations a step, second order"),),
        step="samplers.heun",
        path="euler",
        honoured={**TRAINING, **LINSPACE, **WARPS, **SD_BETAS},
        fixed=("use_beta_sigmas", "clip_sample"),
    ),
    Sampler(
        diffusers_class="KDPM2DiscreteScheduler",
        presets=(Preset("DPM2", ("dpm2", "kdpm2"), "two evaluations a step, midpoint"),),
        step="samplers.dpm2",
        path="euler",
        honoured={**TRAINING, **LINSPACE, **WARPS, **SD_BETAS},
        fixed=("use_beta_sigmas",),
        rounds_karras_timesteps=True,
    ),
    Sampler(
        diffusers_class="KDPM2AncestralDiscreteScheduler",
        presets=(Preset("DPM2 a", ("dpm2_a", "dpm2_ancestral", "kdpm2_ancestral"), "DPM2, fresh noise each step"),),
        step="samplers.dpm2",
        keywords=_ancestral,
        path="euler",
        honoured={**TRAINING, **LINSPACE, **WARPS, **SD_BETAS},
        fixed=("use_beta_sigmas",),
        rounds_karras_timesteps=True,
    ),
    Sampler(
        diffusers_class="DPMSolverMultistepScheduler",
        presets=(
            Preset("DPM++ 2M", ("dpmpp_2m",), "second order, one evaluation a step", _dpm("dpmsolver++", 2)),
            Preset("DPM++ 3M", ("dpmpp_3m",), "third order, one evaluation a step", _dpm("dpmsolver++", 3)),
            Preset(
                "DPM++ 2M SDE",
                ("dpmpp_2m_sde", "dpmpp_2m_sde_gpu"),
                "DPM++ 2M, fresh noise each step",
                _dpm("sde-dpmsolver++", 2),
            ),
            Preset(
                "DPM++ 2M SDE Heun",
                ("dpmpp_2m_sde_heun", "dpmpp_2m_sde_heun_gpu"),
                "the same with Heun's correction",
                _dpm("sde-dpmsolver++", 2, "heun"),
            ),
        ),
        step="dpm_solver.dpmpp_multistep",
        keywords=_multistep,
        path="dpm",
        honoured={**MULTISTEP, **ZERO_SNR, **DPM, "euler_at_final": False},
        fixed=(*FIXED_DPM, "use_lu_lambdas", "lambda_min_clipped", "variance_type"),
        spellings={
            "algorithm_type": {
                "dpmsolver++": "dpmsolver++",
                "sde-dpmsolver++": "sde-dpmsolver++",
                "deis": "dpmsolver++",
            },
            "solver_type": MIDPOINT,
        },
        lifts_zero_snr=True,
    ),
    Sampler(
        diffusers_class="DPMSolverSDEScheduler",
        presets=(Preset("DPM++ SDE", ("dpmpp_sde", "dpmpp_sde_gpu"), "two evaluations a step, fresh noise"),),
        step="samplers.dpm_sde",
        path="euler",
        honoured={**TRAINING, **LINSPACE, **WARPS, **SD_BETAS},
        fixed=("use_beta_sigmas", "noise_sampler_seed"),
    ),
    Sampler(
        diffusers_class="DPMSolverSinglestepScheduler",
        presets=(
            Preset("DPM++ 2S", ("dpmpp_2s",), "second order, steps in pairs", _dpm("dpmsolver++", 2)),
            Preset("DPM++ 3S", ("dpmpp_3s",), "third order, steps in triples", _dpm("dpmsolver++", 3)),
        ),
        step="dpm_solver.dpmpp_singlestep",
        keywords=_solver,
        path="dpm",
        honoured={**TRAINING, **WARPS, **SOLVER, **DPM, "lower_order_final": False},
        fixed=(*FIXED_DPM, "lambda_min_clipped", "variance_type"),
        spellings={
            "algorithm_type": {"dpmsolver++": "dpmsolver++", "deis": "dpmsolver++"},
            "solver_type": MIDPOINT,
        },
    ),
    Sampler(
        diffusers_class=None,
        presets=(
            Preset("DPM++ 2S a", ("dpmpp_2s_ancestral", "dpmpp_2s_a"), "two evaluations a step, fresh noise each step"),
        ),
        step="samplers.dpmpp_2s_ancestral",
        path="euler",
        honoured={**TRAINING, **LINSPACE, **WARPS, **ZERO_SNR},
        fixed=FIXED_EULER,
        lifts_zero_snr=True,
    ),
    Sampler(
        diffusers_class="UniPCMultistepScheduler",
        presets=(
            Preset(
                "UniPC",
                ("unipc", "unipc_bh2"),
                "predictor and corrector, weighted by bh2 as in diffusers",
                {"solver_type": "bh2", "solver_order": 2},
            ),
            Preset(
                "UniPC bh1",
                ("unipc_bh1",),
                "the same, weighted by bh1",
                {"solver_type": "bh1", "solver_order": 2},
            ),
        ),
        step="dpm_solver.unipc",
        keywords=_solver,
        path="dpm",
        honoured={**MULTISTEP, **ZERO_SNR, "solver_type": "bh2", "final_sigmas_type": "zero"},
        fixed=(*FIXED_DPM, *FIXED_UNIPC),
        spellings={"solver_type": {"bh1": "bh1", "bh2": "bh2", "midpoint": "bh2", "heun": "bh2", "logrho": "bh2"}},
        lifts_zero_snr=True,
    ),
    Sampler(
        diffusers_class="DEISMultistepScheduler",
        presets=(Preset("DEIS", ("deis",), "exponential integrator", {"solver_order": 2}),),
        step="samplers.deis",
        keywords=_order,
        path="dpm",
        honoured={**MULTISTEP, "algorithm_type": "deis", "solver_type": "logrho"},
        fixed=FIXED_DPM,
        spellings={
            "algorithm_type": dict.fromkeys(("deis", "dpmsolver", "dpmsolver++"), "deis"),
            "solver_type": dict.fromkeys(("logrho", "midpoint", "heun", "bh1", "bh2"), "logrho"),
        },
        ends_at_sigma_min=True,
    ),
    Sampler(
        diffusers_class=None,
        presets=(Preset("ER SDE", ("er_sde",), "third order, one evaluation a step, fresh noise"),),
        step="er_sde.er_sde",
        path="euler",
        honoured={**TRAINING, **LINSPACE, **WARPS, **ZERO_SNR},
        fixed=FIXED_EULER,
        lifts_zero_snr=True,
    ),
    Sampler(
        diffusers_class="LCMScheduler",
        presets=(Preset("LCM", ("lcm",), "for latent consistency models, 2 to 8 steps"),),
        step="samplers.lcm",
        keywords=_lcm,
        path="distilled",
        honoured={**TRAINING, **DISTILLED, **ZERO_SNR, "timestep_scaling": 10.0},
        fixed=("clip_sample", "thresholding"),
    ),
    Sampler(
        diffusers_class="TCDScheduler",
        presets=(Preset("TCD", ("tcd",), "for trajectory consistency models, 2 to 8 steps"),),
        step="samplers.tcd",
        default_eta=0.3,
        path="distilled",
        honoured={**TRAINING, **DISTILLED, **ZERO_SNR},
        ends_at_sigma_min=True,
    ),
)

BY_CLASS = {sampler.class_name: sampler for sampler in SAMPLERS}  # `SchedulerConfig.class_name` → its entry
PRESETS = tuple((sampler, preset) for sampler in SAMPLERS for preset in sampler.presets)
