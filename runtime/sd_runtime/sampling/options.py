"""The options of samplers, in diffusers' names: groups that several samplers share, and what holds for all of them.

Whatever a constructor of diffusers takes is honoured or fixed in the sampler's entry of the `registry`, or cannot
change the result; the tests compare the entries with diffusers' own signatures.
"""

from __future__ import annotations

import math
from typing import Any

# ---- groups of honoured options, with their defaults ----

TRAINING: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
}
SD_BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012}
LEADING: dict[str, Any] = {"timestep_spacing": "leading", "steps_offset": 0}
LINSPACE: dict[str, Any] = {"timestep_spacing": "linspace", "steps_offset": 0}
WARPS: dict[str, Any] = {"use_karras_sigmas": False, "use_exponential_sigmas": False}
ZERO_SNR: dict[str, Any] = {"rescale_betas_zero_snr": False}
SOLVER: dict[str, Any] = {"solver_order": 2, "lower_order_final": True}
DPM: dict[str, Any] = {"algorithm_type": "dpmsolver++", "solver_type": "midpoint", "final_sigmas_type": "zero"}
MULTISTEP: dict[str, Any] = {**TRAINING, **LINSPACE, **WARPS, **SOLVER}
DISTILLED: dict[str, Any] = {**SD_BETAS, "beta_schedule": "scaled_linear", "original_inference_steps": 50}

# ---- groups of fixed options: computed in one way only, the one of ACCEPTED ----

FIXED_DPM = ("thresholding", "use_beta_sigmas", "use_flow_sigmas", "use_dynamic_shifting")
FIXED_EULER = ("use_beta_sigmas", "interpolation_type", "timestep_type", "sigma_min", "sigma_max")
FIXED_UNIPC = ("predict_x0", "disable_corrector", "solver_p", "shift_terminal", "sigma_min", "sigma_max")

ACCEPTED: dict[str, tuple[object, ...]] = {  # fixed option → the values that ask for the way it is computed
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

REQUIRED = ("skip_prk_steps",)  # fixed options whose default in diffusers is not the accepted value

CHOICES: dict[str, tuple[object, ...]] = {  # the values that an honoured option can take, where they are few
    "timestep_spacing": ("leading", "linspace", "trailing"),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "solver_order": (1, 2, 3),
}

# solver_type of a file, perhaps written by another class → what the DPM-Solver++ family makes of it
MIDPOINT = {"midpoint": "midpoint", "heun": "heun", "logrho": "midpoint", "bh1": "midpoint", "bh2": "midpoint"}

REMEDIES = {
    "clip_sample": 'latents are not bounded by 1: set "clip_sample": false in scheduler_config.json',
    "skip_prk_steps": "ask for plms, which is PNDM without the Runge-Kutta steps",
    "sde": "the third-order SDE formula of diffusers has a wrong constant; choose dpmpp_2m_sde",
}
