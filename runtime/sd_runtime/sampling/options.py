"""The options of diffusers' scheduler classes, as tables: what is computed here, with the defaults, and what is not.

Whatever a constructor takes is in HONOURED or in FIXED, or cannot change the result; the tests compare these tables
with diffusers' own signatures.
"""

from __future__ import annotations

import math
from typing import Any

_TRAINING: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
}
_SD_BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012}
_LEADING: dict[str, Any] = {"timestep_spacing": "leading", "steps_offset": 0}
_LINSPACE: dict[str, Any] = {"timestep_spacing": "linspace", "steps_offset": 0}
_WARPS: dict[str, Any] = {"use_karras_sigmas": False, "use_exponential_sigmas": False}
_ZERO_SNR: dict[str, Any] = {"rescale_betas_zero_snr": False}
_SOLVER: dict[str, Any] = {"solver_order": 2, "lower_order_final": True}
_DPM: dict[str, Any] = {"algorithm_type": "dpmsolver++", "solver_type": "midpoint", "final_sigmas_type": "zero"}
_MULTISTEP: dict[str, Any] = {**_TRAINING, **_LINSPACE, **_WARPS, **_SOLVER}
_DISTILLED: dict[str, Any] = {**_SD_BETAS, "beta_schedule": "scaled_linear", "original_inference_steps": 50}

HONOURED: dict[str, dict[str, Any]] = {  # diffusers class → the options computed here, and their defaults
    "DDIMScheduler": {**_TRAINING, **_LEADING, **_ZERO_SNR, "set_alpha_to_one": True},
    "DDPMScheduler": {**_TRAINING, **_LEADING, **_ZERO_SNR},
    "PNDMScheduler": {**_TRAINING, **_LEADING, "set_alpha_to_one": False},
    "EulerDiscreteScheduler": {**_TRAINING, **_LINSPACE, **_WARPS, **_ZERO_SNR, "final_sigmas_type": "zero"},
    "EulerAncestralDiscreteScheduler": {**_TRAINING, **_LINSPACE, **_ZERO_SNR},
    "LMSDiscreteScheduler": {**_TRAINING, **_LINSPACE, **_WARPS},
    "HeunDiscreteScheduler": {**_TRAINING, **_LINSPACE, **_WARPS, **_SD_BETAS},
    "KDPM2DiscreteScheduler": {**_TRAINING, **_LINSPACE, **_WARPS, **_SD_BETAS},
    "KDPM2AncestralDiscreteScheduler": {**_TRAINING, **_LINSPACE, **_WARPS, **_SD_BETAS},
    "DPMSolverSDEScheduler": {**_TRAINING, **_LINSPACE, **_WARPS, **_SD_BETAS},
    "DPMSolverMultistepScheduler": {
        **_MULTISTEP,
        **_ZERO_SNR,
        **_DPM,
        "euler_at_final": False,
    },
    "DPMSolverSinglestepScheduler": {**_TRAINING, **_WARPS, **_SOLVER, **_DPM, "lower_order_final": False},
    "UniPCMultistepScheduler": {
        **_MULTISTEP,
        **_ZERO_SNR,
        "solver_type": "bh2",
        "final_sigmas_type": "zero",
    },
    "DEISMultistepScheduler": {**_MULTISTEP, "algorithm_type": "deis", "solver_type": "logrho"},
    "LCMScheduler": {**_TRAINING, **_DISTILLED, **_ZERO_SNR, "timestep_scaling": 10.0},
    "TCDScheduler": {**_TRAINING, **_DISTILLED, **_ZERO_SNR},
}

ACCEPTED: dict[str, tuple[object, ...]] = {  # options computed in one way only → the values that ask for that way
    "clip_sample": (False,),  # clips the predicted picture: not linear
    "thresholding": (False,),  # likewise
    "skip_prk_steps": (True,),  # PNDM's Runge-Kutta start; Stable Diffusion skips it
    "use_beta_sigmas": (False, None),
    "use_lu_lambdas": (False,),
    "use_flow_sigmas": (False,),
    "use_dynamic_shifting": (False,),
    "shift_terminal": (None,),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "sigma_min": (None,),
    "sigma_max": (None,),
    "lambda_min_clipped": (-math.inf, None),
    "variance_type": (None, "fixed_small", "fixed_small_log"),  # the two are the same thing
    "predict_x0": (True,),
    "disable_corrector": ([],),
    "solver_p": (None,),
    "noise_sampler_seed": (None,),  # noise comes from the request's seed
}

_FIXED_DPM = ("thresholding", "use_beta_sigmas", "use_flow_sigmas", "use_dynamic_shifting")
_FIXED_UNIPC = ("predict_x0", "disable_corrector", "solver_p", "shift_terminal", "sigma_min", "sigma_max")
FIXED: dict[str, tuple[str, ...]] = {  # diffusers class → which options of ACCEPTED it has
    "DDIMScheduler": ("clip_sample", "thresholding"),
    "DDPMScheduler": ("clip_sample", "thresholding", "variance_type"),
    "PNDMScheduler": ("skip_prk_steps",),
    "EulerDiscreteScheduler": ("use_beta_sigmas", "interpolation_type", "timestep_type", "sigma_min", "sigma_max"),
    "EulerAncestralDiscreteScheduler": (),
    "LMSDiscreteScheduler": ("use_beta_sigmas",),
    "HeunDiscreteScheduler": ("use_beta_sigmas", "clip_sample"),
    "KDPM2DiscreteScheduler": ("use_beta_sigmas",),
    "KDPM2AncestralDiscreteScheduler": ("use_beta_sigmas",),
    "DPMSolverSDEScheduler": ("use_beta_sigmas", "noise_sampler_seed"),
    "DPMSolverMultistepScheduler": (*_FIXED_DPM, "use_lu_lambdas", "lambda_min_clipped", "variance_type"),
    "DPMSolverSinglestepScheduler": (*_FIXED_DPM, "lambda_min_clipped", "variance_type"),
    "UniPCMultistepScheduler": (*_FIXED_DPM, *_FIXED_UNIPC),
    "DEISMultistepScheduler": _FIXED_DPM,
    "LCMScheduler": ("clip_sample", "thresholding"),
    "TCDScheduler": (),
}

REQUIRED = ("skip_prk_steps",)  # options of FIXED whose default in diffusers is not the accepted value

CHOICES: dict[str, tuple[object, ...]] = {  # the values that an honoured option can take, where they are few
    "timestep_spacing": ("leading", "linspace", "trailing"),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "solver_order": (1, 2, 3),
}
_MIDPOINT = {"midpoint": "midpoint", "heun": "heun", "logrho": "midpoint", "bh1": "midpoint", "bh2": "midpoint"}
SOLVERS: dict[
    str, dict[str, dict[str, str]]
] = {  # names in a file, some carried over from other classes → their meaning
    "DPMSolverMultistepScheduler": {
        "algorithm_type": {
            "dpmsolver++": "dpmsolver++",
            "sde-dpmsolver++": "sde-dpmsolver++",
            "deis": "dpmsolver++",
        },
        "solver_type": _MIDPOINT,
    },
    "DPMSolverSinglestepScheduler": {
        "algorithm_type": {"dpmsolver++": "dpmsolver++", "deis": "dpmsolver++"},
        "solver_type": _MIDPOINT,
    },
    "UniPCMultistepScheduler": {
        "solver_type": {"bh1": "bh1", "bh2": "bh2", "midpoint": "bh2", "heun": "bh2", "logrho": "bh2"},
    },
    "DEISMultistepScheduler": {
        "algorithm_type": dict.fromkeys(("deis", "dpmsolver", "dpmsolver++"), "deis"),
        "solver_type": dict.fromkeys(("logrho", "midpoint", "heun", "bh1", "bh2"), "logrho"),
    },
}

REMEDIES = {
    "clip_sample": 'latents are not bounded by 1: set "clip_sample": false in scheduler_config.json',
    "skip_prk_steps": "ask for plms, which is PNDM without the Runge-Kutta steps",
    "sde": "the third-order SDE formula of diffusers has a wrong constant; choose dpmpp_2m_sde",
}
