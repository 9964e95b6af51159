"""sd-run: flags → Request → Pipeline → PNG files.  Nothing heavy is imported before the flags are known to be good."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import ArgumentParser
from .console import run
from .errors import UsageError, one_line
from .output import check_destination, expand_pattern

if TYPE_CHECKING:
    from .generation import Generation
    from .pipeline import Pipeline
    from .request import Request
    from .result import Result

EPILOG = """examples:
  sd-run "a large red star on a blue background"
  sd-run "a lighthouse at dusk" --model stable-diffusion-v1-5 --steps 30 --scheduler dpmpp_2m_karras --seed 7
  sd-run "a cat" --num-images 4 --output "cat-{seed}.png"
"""


def build_parser() -> ArgumentParser:
    parser = ArgumentParser("sd-run", "Draw pictures from a prompt with an exported Stable Diffusion model.", EPILOG)
    add = parser.add_argument
    add("prompt", nargs="?", help="what to draw")
    add("--model", metavar="NAME-OR-BUNDLE", help="an exported model's name or a bundle's folder")
    add("--negative-prompt", metavar="TEXT", help="what to keep out of the picture")
    add("--steps", type=int, metavar="N", help="inference steps, 1 to 1000 (default: the model's)")
    add("--guidance-scale", type=float, metavar="X", help="0 to 100, at most 1 is off (default: the model's)")
    add("--seed", type=int, metavar="N", help="picture i uses seed + i (default: random)")
    add("--scheduler", metavar="NAME", help="a sampler from --list-schedulers (default: the model's)")
    add("--width", type=int, metavar="PIXELS", help="a multiple of 8 (default: the model's)")
    add("--height", type=int, metavar="PIXELS", help="a multiple of 8 (default: the model's)")
    add("--num-images", type=int, default=1, metavar="N", help="pictures to draw (default: 1)")
    add("--rng", default="cpu", choices=("cpu", "cuda"), help="whose noise a seed stands for (default: cpu)")
    add("--no-weighting", action="store_true", help="take ( ) [ ] and BREAK in prompts literally")
    add("--truncate", action="store_true", help="cut prompts at 77 tokens, as diffusers does")
    add("--output", metavar="FILE-OR-PATTERN", help="PNG to write; may hold {seed}, {index} and {prompt}")
    add("--overwrite", action="store_true", help="replace existing pictures")
    add("--device", default="auto", choices=("auto", "cuda", "cpu"), help="default: cuda where there is one")
    add("--quiet", action="store_true", help="print nothing but errors")
    add("--list-schedulers", action="store_true", help="show the samplers and their names, then exit")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run("sd-run", lambda: _run(build_parser().parse_args(argv)))


def _run(args: argparse.Namespace) -> None:
    if args.list_schedulers:
        _list_schedulers()
    elif args.prompt is None:
        raise UsageError("no prompt given", remedy='try: sd-run "a large red star on a blue background"')
    else:
        _draw(args)


def _list_schedulers() -> None:
    from .sampling.names import describe

    rows = describe()
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        print(f"{name:<{width}}  {text}")


def _request(args: argparse.Namespace, pipeline: Pipeline) -> Request:
    from .request import make_request

    return make_request(
        pipeline.manifest.defaults,
        args.prompt,
        negative_prompt=args.negative_prompt,
        num_images_per_prompt=args.num_images,
        seed=args.seed,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance_scale,
        height=args.height,
        width=args.width,
        scheduler=args.scheduler,
        rng=args.rng,
        prompt_weighting=not args.no_weighting,
        truncate=args.truncate,
    )


def _draw(args: argparse.Namespace) -> None:
    """The whole command: load, check where the pictures go, draw, save."""
    from .pipeline import Pipeline

    started = time.perf_counter()
    with Pipeline.load(args.model, device=args.device) as pipeline:
        loaded = time.perf_counter() - started
        request = _request(args, pipeline)
        paths = _destinations(args, request)
        generation = pipeline.start(request)
        _show_progress(generation, quiet=args.quiet)
        result = generation.result()
        saved = _save(result, paths, overwrite=args.overwrite)
    for prompt, lost in zip(request.prompts, result.truncated, strict=True):
        if lost:
            print(f"sd-run: dropped from '{one_line(prompt, 30)}' beyond 77 tokens: {one_line(lost)}", file=sys.stderr)
    if not args.quiet:
        timings = result.timings
        stages = {"load": loaded, "prompt": timings.encode_prompt, "denoise": timings.denoise, "decode": timings.decode}
        stages["total"] = time.perf_counter() - started
        print("  ".join(f"{name} {seconds:.2f} s" for name, seconds in stages.items()), file=sys.stderr)
        print(*saved, sep="\n")


def _show_progress(generation: Generation, *, quiet: bool) -> None:
    """Run the steps under a progress bar; on anything but a terminal, in silence."""
    if quiet or not sys.stderr.isatty():
        return
    from tqdm import tqdm

    for _ in tqdm(generation, total=len(generation), unit="step", leave=False):
        pass


def _destinations(args: argparse.Namespace, request: Request) -> list[Path] | None:
    """Where each picture goes, checked before the work; None: picture-0001.png and so on in the current folder."""
    if args.output is None:
        return None
    prompts = [request.prompt_of(i) for i in range(request.num_images)]
    paths = expand_pattern(args.output, seeds=request.seeds, prompts=prompts)
    for path in paths:
        check_destination(path, overwrite=args.overwrite)
    return paths


def _save(result: Result, paths: list[Path] | None, *, overwrite: bool) -> list[Path]:
    from .metadata import save_numbered_png, save_png

    described = list(zip(result.images, result.parameters, strict=True))
    if paths is None:
        return [save_numbered_png(image, ".", parameters=parameters) for image, parameters in described]
    return [
        save_png(image, path, parameters=parameters, overwrite=overwrite)
        for (image, parameters), path in zip(described, paths, strict=True)
    ]
