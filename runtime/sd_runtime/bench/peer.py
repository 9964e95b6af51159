"""The other side of `sd-bench --against diffusers`: a program of its own that draws with diffusers' pipeline.

    python -m sd_runtime.bench.peer '{"model": …}'             keeps the model loaded; a line on stdin draws once
    python -m sd_runtime.bench.peer '{"model": …}' FILE.png    draws one picture and ends

Each drawing answers with a line of JSON on stdout: seconds of the picture, and of each of its steps.  This is the one
file of the runtime that imports torch and diffusers, and nothing of the runtime imports it.
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
    pipe = load(settings)
    if len(sys.argv) > 2:
        draw(pipe, settings)[0].save(sys.argv[2])
        return
    for line in sys.stdin:
        started = time.perf_counter()
        _, steps = timed_draw(pipe, settings | json.loads(line))
        print(json.dumps({"picture": time.perf_counter() - started, "steps": steps}), file=out, flush=True)


def load(settings: dict[str, Any]) -> Any:
    """StableDiffusionPipeline as its users load it: on a GPU in float16, on the CPU in float32."""
    import torch
    from diffusers import StableDiffusionPipeline

    cuda = settings["device"] == "cuda"
    if not cuda:
        torch.set_num_threads(settings["threads"])
    dtype = torch.float16 if cuda and settings["precision"] == "fp16" else torch.float32
    model = settings["model"]
    read = StableDiffusionPipeline.from_single_file if model.endswith(".safetensors") else None
    pipe = (read or StableDiffusionPipeline.from_pretrained)(model, torch_dtype=dtype)
    pipe.safety_checker = None
    pipe.set_progress_bar_config(disable=True)
    if (scheduler := settings.get("scheduler")) is not None:
        import diffusers

        kind = getattr(diffusers, scheduler["class_name"])
        pipe.scheduler = kind.from_config(pipe.scheduler.config, **scheduler["overrides"])
    return pipe.to("cuda") if cuda else pipe


def draw(pipe: Any, settings: dict[str, Any], **more: Any) -> list[Any]:
    """PIL pictures."""
    import torch

    names = ("prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "height", "width")
    generator = torch.Generator().manual_seed(settings["seed"])
    images: list[Any] = pipe(**{name: settings[name] for name in names}, generator=generator, **more).images
    return images


def timed_draw(pipe: Any, settings: dict[str, Any]) -> tuple[list[Any], list[float]]:
    """Pictures, and the seconds of each step but the first, which begins unseen."""
    moments: list[float] = []

    def note(pipeline: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        moments.append(time.perf_counter())
        return values

    images = draw(pipe, settings, callback_on_step_end=note)
    return images, [later - earlier for earlier, later in pairwise(moments)]


if __name__ == "__main__":
    main()
