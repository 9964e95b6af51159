"""diffusers' schedulers, also the one that wants torchsde, and the Brownian motion that the tests put in its place."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable

import numpy as np
import torch

MODULES = {
    "EulerDiscrete": "euler_discrete",
    "EulerAncestralDiscrete": "euler_ancestral_discrete",
    "LMSDiscrete": "lms_discrete",
    "HeunDiscrete": "heun_discrete",
    "KDPM2Discrete": "k_dpm_2_discrete",
    "KDPM2AncestralDiscrete": "k_dpm_2_ancestral_discrete",
    "DPMSolverSDE": "dpmsolver_sde",
    "DPMSolverMultistep": "dpmsolver_multistep",
    "DPMSolverSinglestep": "dpmsolver_singlestep",
    "UniPCMultistep": "unipc_multistep",
    "DEISMultistep": "deis_multistep",
}


class BrownianTape:
    """In the place of diffusers' BrownianTreeNoiseSampler: one Brownian motion in σ, its increments from the tape.

    DPMSolverSDE asks for the increment over a step's first part, then for that over the whole step."""

    def __init__(self, tape: Callable[[], np.ndarray]) -> None:
        self._tape, self._begun = tape, (float("nan"), 0.0, 0.0)

    def __call__(self, start: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        sigma, target = float(start), float(end)
        origin, reached, increment = self._begun
        if sigma != origin:
            reached, increment = sigma, 0.0
        increment = increment + np.sqrt(abs(target - reached)) * self._tape()
        self._begun = (sigma, target, increment)
        return torch.from_numpy((increment / np.sqrt(abs(target - sigma))).astype(np.float32))


def scheduler_module(name: str) -> types.ModuleType:
    """diffusers' module of a scheduler; torchsde, which one of them wants for its Brownian tree, need not be there."""
    missing = name == "DPMSolverSDE" and "torchsde" not in sys.modules
    if missing:
        sys.modules["torchsde"] = types.ModuleType("torchsde")
    try:
        return importlib.import_module(f"diffusers.schedulers.scheduling_{MODULES.get(name, name.lower())}")
    finally:
        if missing:
            del sys.modules["torchsde"]
