#!/usr/bin/env python3
"""Draws the path of every sampler: the noise levels it visits, and the timesteps that the network is told.

    scripts/plot_samplers.py [--steps 20] [--output docs/pictures/samplers.png]

Left: σ at the start of each step and at the end of the last one, default, Karras and exponential.  Right: the timestep
of each evaluation; hollow marks are second evaluations inside a step.  Samplers with the same path share a row.
The training schedule is Stable Diffusion 1's.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sd_runtime.sampling import SchedulerConfig, make_plan, resolve
from sd_runtime.sampling.make import make_sampler
from sd_runtime.sampling.registry import PRESETS
from sd_runtime.tensor import Array

STABLE_DIFFUSION = {
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
WARPS = {"": ("default", "#1f6fb4"), "karras": ("Karras", "#d1495b"), "exponential": ("exponential", "#3a9c5f")}
ZERO = 0.015  # where σ = 0 is drawn on the logarithmic axis


def paths(steps: int) -> dict[str, tuple[list[str], dict[str, tuple[Array, Array, Array]]]]:
    """Samplers grouped by path: key → (labels, warp → (sigmas, timesteps, position of each timestep in steps))."""
    base = SchedulerConfig.from_dict(STABLE_DIFFUSION)
    groups: dict[str, tuple[list[str], dict[str, tuple[Array, Array, Array]]]] = {}
    for sampler, preset in PRESETS:
        curves = {}
        for warp in WARPS if sampler.warps else ("",):
            config = base.switched(resolve(f"{preset.label} {warp}"))
            path, plan = make_sampler(config, steps)[1], make_plan(config, steps)
            sigmas = np.append(path.sigmas, path.sigmas_next[-1])
            inside = np.diff(plan.steps, prepend=-1) == 0  # second evaluations
            curves[warp] = (sigmas, plan.timesteps, plan.steps + 0.5 * inside)
        key = repr([[values.round(3).tolist() for values in curve] for curve in curves.values()])
        groups.setdefault(key, ([], curves))[0].append(preset.label)
    return groups


def draw(figure: Any, steps: int) -> None:
    groups = list(paths(steps).values())
    rows = -(-len(groups) // 2)
    axes = figure.subplots(rows, 4, squeeze=False)
    for unused in axes.flat[2 * len(groups) :]:
        unused.axis("off")
    for number, (labels, curves) in enumerate(groups):
        left, right = axes.flat[2 * number], axes.flat[2 * number + 1]
        for warp, (sigmas, timesteps, position) in curves.items():
            name, color = WARPS[warp]
            left.plot(np.maximum(sigmas, ZERO), ".-", color=color, ms=4, lw=1, label=name)
            whole = position % 1 == 0
            right.plot(position[whole], timesteps[whole], ".-", color=color, ms=4, lw=1)
            right.plot(position[~whole], timesteps[~whole], "o", color=color, ms=3, mfc="none", mew=0.7)
        left.set_yscale("log")
        left.set_ylim(ZERO * 0.7, 25)
        left.set_yticks([ZERO, 0.1, 1, 10], ["0", "0.1", "1", "10"])
        left.minorticks_off()
        left.set_ylabel("σ")
        right.set_ylim(-40, 1040)
        right.set_ylabel("timestep")
        title = left.text(0, 1.05, ", ".join(labels), transform=left.transAxes, fontsize=7, fontweight="bold")
        title.set_in_layout(False)  # it may run on over the right-hand picture
        for axis in (left, right):
            axis.set_xlim(-0.7, steps + 1.7)  # PLMS has one evaluation more
            axis.set_xticks(range(0, steps + 1, max(steps // 4, 1)))
            axis.grid(alpha=0.25, lw=0.5)
            axis.tick_params(labelsize=7)
    handles, names = next(axis for axis in axes.flat if len(axis.lines) == len(WARPS)).get_legend_handles_labels()
    figure.legend(handles, names, loc="upper right", ncols=len(WARPS), fontsize=9, frameon=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs/pictures/samplers.png")
    args = parser.parse_args()
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    plt.rcParams["figure.constrained_layout.h_pad"] = 0.12
    figure = plt.figure(figsize=(13, 12), layout="constrained")
    draw(figure, args.steps)
    figure.suptitle(f"Paths of {args.steps} steps on Stable Diffusion 1's schedule", fontsize=11)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=80)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    Image.open(picture).convert("RGB").quantize(64).save(args.output, optimize=True)


if __name__ == "__main__":
    main()
