#!/usr/bin/env python3
"""The diffusers side of scripts/benchmark.py: a program of its own that draws with StableDiffusionPipeline.

    scripts/diffusers_peer.py '{"model": …}'             keeps the model loaded; each line on stdin draws one picture
    scripts/diffusers_peer.py '{"model": …}' FILE.png    draws one picture and ends

A line on stdin is a JSON object of settings that differ from the first.  The answer is a line of JSON on stdout: the
seconds of the picture, and of its steps.
"""

from __future__ import annotations

import json
import sys
import time
from itertools import pairwise
from typing import Any


def main() -> None:
    settings = json.loads(sys.argv[1])
    out, sys.stdout = sys.stdout, sys.stderr  # what the libraries print must not get between the answers
    pipe = load_pipeline(settings)
    if len(sys.argv) > 2:
        draw(pipe, settings)[0].save(sys.argv[2])
        return
    for line in sys.stdin:
        started = time.perf_counter()
        _, steps = timed_draw(pipe, settings | json.loads(line))
        print(json.dumps({"picture": time.perf_counter() - started, "steps": steps}), file=out, flush=True)


def load_pipeline(settings: dict[str, Any]) -> Any:
    """StableDiffusionPipeline as its users load it: in float16 on a GPU where the bundle is fp16, else in float32."""
    import torch
    from diffusers import StableDiffusionPipeline

    cuda = settings["device"] == "cuda"
    if not cuda:
        torch.set_num_threads(settings["threads"])
    dtype = torch.float16 if cuda and settings["precision"] == "fp16" else torch.float32
    model = settings["model"]
    single_file = model.endswith(".safetensors")
    load = StableDiffusionPipeline.from_single_file if single_file else StableDiffusionPipeline.from_pretrained
    pipe = load(model, revision=settings["revision"], torch_dtype=dtype)
    pipe.safety_checker = None
    pipe.set_progress_bar_config(disable=True)
    if (scheduler := settings["scheduler"]) is not None:
        import diffusers

        kind = getattr(diffusers, scheduler["class_name"])
        pipe.scheduler = kind.from_config(pipe.scheduler.config, **scheduler["overrides"])
    return pipe.to("cuda") if cuda else pipe


def draw(pipe: Any, settings: dict[str, Any], **more: Any) -> list[Any]:
    """Draw with `settings`, a picture of PIL's in a list; `more` is handed to the pipeline."""
    import torch

    names = ("prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "height", "width")
    generator = torch.Generator().manual_seed(settings["seed"])
    images: list[Any] = pipe(**{name: settings[name] for name in names}, generator=generator, **more).images
    return images


def timed_draw(pipe: Any, settings: dict[str, Any]) -> tuple[list[Any], list[float]]:
    """Pictures, and the seconds of each step but the first, whose beginning diffusers does not tell."""
    moments: list[float] = []

    def note(pipeline: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        moments.append(time.perf_counter())
        return values

    images = draw(pipe, settings, callback_on_step_end=note)
    return images, [later - earlier for earlier, later in pairwise(moments)]


if __name__ == "__main__":
    main()
