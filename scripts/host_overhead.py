#!/usr/bin/env python3
"""What the loop around the UNet costs on the host: ours and diffusers' pipeline, with a UNet that returns at once.

    scripts/host_overhead.py [--rounds 15] [--json FILE]

One guided 512×512 picture, so UNet inputs of (2, 4, 64, 64).  A round times a short and a long run of both programs in
turn; the difference between long and short, divided by their steps, is the cost of a step without what happens once
(prompts, first noise).  Both run on one thread, whose processor time is counted, so that a busy machine does not blur
the figures; medians over the rounds.  With a sampler that draws fresh noise, ours includes making torch's noise in
numpy (0.3 ms a picture), which these targets leave out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from sd_runtime.engines.protocol import Feed
from sd_runtime.loop.guidance import Guidance
from sd_runtime.loop.host import denoise
from sd_runtime.noise import NoiseSource
from sd_runtime.sampling import SchedulerConfig, make_plan, resolve
from sd_runtime.tensor import Array, Dim, FeedCheck, TensorSpec

SHAPE = (4, 64, 64)
SHORT, LONG = 20, 220  # steps
SCHEDULERS = ("plms", "ddim", "euler", "lms", "dpmpp_2m_karras", "heun", "unipc")
DRAWING = ("euler_a",)  # for the record: fresh noise in every step
LIMIT_MICROSECONDS, LEAST_RATIO = 150.0, 5.0
CONFIG = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}


class NullEngine:
    """A UNet that checks its inputs like any engine and returns at once."""

    def __init__(self) -> None:
        batch, sides = Dim("batch", 1, 2, 32), (Dim("h", 1, 64, 128), Dim("w", 1, 64, 128))
        self.inputs = (
            TensorSpec("sample", "float32", (batch, 4, *sides)),
            TensorSpec("timestep", "float32", (Dim("timesteps", 1, 2, 32),)),
            TensorSpec("encoder_hidden_states", "float32", (batch, 77, 768)),
        )
        self.outputs = (TensorSpec("out_sample", "float32", (batch, 4, *sides)),)
        self._check = FeedCheck(self.inputs)
        self._output = {"out_sample": np.random.default_rng(0).standard_normal((2, *SHAPE), np.float32)}

    def place(self, name: str, array: Array) -> Array:
        return array

    def run(self, feeds: Mapping[str, Feed]) -> dict[str, Array]:
        self._check(feeds)
        return self._output

    def close(self) -> None: ...


def ours() -> Callable[[str, int], None]:
    """(scheduler, steps) → run the whole guided loop."""
    config, engine = SchedulerConfig.from_dict(CONFIG), NullEngine()
    hidden = np.zeros((2, 77, 768), np.float32)

    def run(scheduler: str, steps: int) -> None:
        noise = NoiseSource([1])
        plan = make_plan(config.switched(resolve(scheduler)), steps)
        for _ in denoise(engine, plan, noise.draw(SHAPE), hidden, Guidance(7.5), noise):
            pass

    return run


def theirs() -> Callable[[str, int], None]:
    """The same through StableDiffusionPipeline, its UNet's forward replaced and nothing decoded."""
    unet = UNet2DConditionModel(
        sample_size=64, block_out_channels=(32,), layers_per_block=1, cross_attention_dim=768,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), mid_block_type=None,
    )  # fmt: skip
    output = torch.randn(2, *SHAPE)
    unet.forward = lambda *args, **kwargs: (output,)
    vae = AutoencoderKL(block_out_channels=(32,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
                        up_block_types=("UpDecoderBlock2D",) * 4)  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae, None, None, unet, diffusers.PNDMScheduler.from_config(CONFIG), None, None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    embeds = torch.zeros(1, 77, 768)

    def run(scheduler: str, steps: int) -> None:
        choice = resolve(scheduler)
        pipe.scheduler = getattr(diffusers, choice.reference_class()).from_config(CONFIG, **choice.overrides)
        pipe(
            prompt_embeds=embeds, negative_prompt_embeds=embeds, num_inference_steps=steps, output_type="latent",
            generator=torch.Generator().manual_seed(1), height=512, width=512,
        )  # fmt: skip

    return run


def microseconds_a_step(run: Callable[[str, int], None], scheduler: str) -> float:
    """One round: a long run less a short one, by the steps between them."""
    seconds = []
    for steps in (SHORT, LONG):
        started = time.thread_time()
        run(scheduler, steps)
        seconds.append(time.thread_time() - started)
    return 1e6 * (seconds[1] - seconds[0]) / (LONG - SHORT)


def compare(scheduler: str, rounds: int, sides: Mapping[str, Callable[[str, int], None]]) -> dict[str, float]:
    """Medians of both sides and of their ratio; the first round only warms up."""
    pairs = [[microseconds_a_step(run, scheduler) for run in sides.values()] for _ in range(rounds + 1)][1:]
    return {
        "ours_us": statistics.median(pair[0] for pair in pairs),
        "diffusers_us": statistics.median(pair[1] for pair in pairs),
        "ratio": statistics.median(pair[1] / pair[0] for pair in pairs),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="measured rounds (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    sides = {"ours": ours(), "diffusers": theirs()}
    rows = {scheduler: compare(scheduler, args.rounds, sides) for scheduler in (*SCHEDULERS, *DRAWING)}
    print(f"{'scheduler':<18}{'ours µs':>10}{'diffusers µs':>14}{'ratio':>8}")
    for scheduler, row in rows.items():
        print(f"{scheduler:<18}{row['ours_us']:>10.0f}{row['diffusers_us']:>14.0f}{row['ratio']:>8.1f}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    fine = all(
        row["ours_us"] <= LIMIT_MICROSECONDS and row["ratio"] >= LEAST_RATIO
        for row in map(rows.__getitem__, SCHEDULERS)
    )
    verdict = "met" if fine else "MISSED"
    print(f"targets: ours at most {LIMIT_MICROSECONDS:.0f} µs and {LEAST_RATIO:.0f} times less: {verdict}")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
