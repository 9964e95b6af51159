"""sd-run: flags → Settings → jobs → Pipeline → PNG files.  Nothing heavy is imported before it is needed."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .._version import __version__
from ..errors import BundleError, SDError, UsageError, one_line
from ..fields import FIELDS
from ..images.files import check_destination, same_name
from .arguments import ArgumentParser
from .console import run_parsed, say, tell
from .flags import add_fields, given, with_flags

if TYPE_CHECKING:
    from ..images.metadata import Parameters
    from ..pipeline import Pipeline
    from ..request import Defaults
    from ..result import Result, Timings
    from .jobs import Job, Saving

EPILOG = """examples:
  sd-run "a large red star on a blue background"
  sd-run "a lighthouse at dusk" --model stable-diffusion-v1-5 --steps 30 --scheduler dpmpp_2m_karras --seed 7
  sd-run "a cat" --num-images 4 --output "cat-{seed}.png"
  sd-run "a cat in the snow" --image cat.png --strength 0.6
  sd-run --from-image cat.png --seed 8
  sd-run --prompts-file prompts.txt --seed 1 --output "all-{index:03}.png"

A line of a prompts file is a prompt, or a JSON object such as {"prompt": "a cat", "num_inference_steps": 30}; what a
line does not say, the flags say.  Started again, it draws what is missing.
"""


def build_parser() -> ArgumentParser:
    """The flags that say what to draw are named, inside, like the fields of `settings.Settings`."""
    parser = ArgumentParser("sd-run", "Draw pictures from a prompt with an exported Stable Diffusion model.", EPILOG)
    _add_prompts(parser)
    _add_sampling(parser)
    _add_pictures(parser)
    _add_program(parser)
    return parser


def _add_prompts(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("what to draw").add_argument
    add("prompt", nargs="?", help="what to draw")
    add_fields(add, ("negative_prompt",))
    add("--image", metavar="FILE", help="a picture to change: PNG, JPEG or WEBP")
    add_fields(add, ("strength", "resize"))
    add("--from-image", type=Path, metavar="FILE", help="repeat a picture of sd-run or others; flags change it")
    add("--prompts-file", type=Path, metavar="FILE", help="draw every line; started again, what is missing")
    add_fields(add, ("prompt_weighting", "truncate"))
    add("--embedding", action="append", default=[], metavar="WORD=FILE", help="a textual inversion, .safetensors")


def _add_sampling(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("how").add_argument
    add("--model", metavar="NAME-OR-BUNDLE", help="an exported model's name or a bundle's folder")
    shown_above = ("negative_prompt", "strength", "resize", "prompt_weighting", "truncate")
    add_fields(add, [name for name in FIELDS if name not in shown_above])


def _add_pictures(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("where the pictures go").add_argument
    add("--output", metavar="FILE-OR-PATTERN", help="PNG to write; may hold {seed}, {index} and {prompt}")
    add("--overwrite", action="store_true", help="replace existing pictures")
    add("--grid", metavar="ROWSxCOLS", help="all pictures of a prompt on one sheet")
    add("--json", action="store_true", help="write each picture's settings to a .json beside it, too")
    add("--preview", type=Path, metavar="FILE", help="PNG that shows all steps so far, after each step")


def _add_program(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("this program").add_argument
    add("--device", default="auto", choices=("auto", "cuda", "cpu"), help="default: cuda where there is one")
    backends = "what runs the networks, in order of preference (default: tensorrt, tensorrt_rtx, onnxruntime)"
    add("--backend", metavar="A,B", help=backends)
    add("--no-safety-checker", dest="safety_checker", action="store_false", help="do not run the model's own")
    add("--quiet", action="store_true", help="print nothing but errors")
    add("--list-schedulers", action="store_true", help="show the samplers and their names, then exit")
    add("--version", action="version", version=f"sd-run {__version__}")


def main(argv: Sequence[str] | None = None) -> int:
    return run_parsed("sd-run", build_parser, _run, argv)


def _run(args: argparse.Namespace) -> None:
    if args.list_schedulers:
        _list_schedulers()
    elif args.prompt is None and args.from_image is None and args.prompts_file is None:
        raise UsageError("no prompt given", remedy='try: sd-run "a large red star on a blue background"')
    elif args.prompt is not None and args.prompts_file is not None:
        raise UsageError("a prompt and --prompts-file", accepted="one of them")
    else:
        _draw(args)


def _list_schedulers() -> None:
    from ..sampling.names import describe

    rows = describe()
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        say(f"{name:<{width}}  {text}")


def _draw(args: argparse.Namespace) -> None:
    """The whole command: what is asked for, whether it can be, where it goes; load; draw and save."""
    from ..bundle.bundle import Bundle, find_bundle
    from ..pipeline import Pipeline
    from .jobs import Saving, draw, error_at, missing, notices

    started = time.perf_counter()
    recorded = None if args.from_image is None else _read_picture(args.from_image)
    bundle = Bundle.open(find_bundle(args.model) if args.model or recorded is None else _model_of(recorded))
    saving = Saving(args.overwrite, args.json, args.preview, args.quiet)
    jobs = _jobs(args, recorded, bundle.manifest.defaults, saving)
    timings: list[Timings] = []
    report_error: SDError | None = None
    backends = None if args.backend is None else args.backend.split(",")
    with Pipeline.load(bundle, device=args.device, safety_checker=args.safety_checker, backends=backends) as pipeline:
        for word in args.embedding:
            _load_embedding(pipeline, word)
        left: list[list[int] | None] = []
        for job in jobs:
            with error_at(job.where):
                pipeline.check(job.request)
                left.append(None if args.prompts_file is None else missing(pipeline, job, saving))
        loaded = time.perf_counter() - started
        for notice in [] if args.quiet else notices(pipeline, jobs):
            _note(with_flags(notice))
        for job, indices in zip(jobs, left, strict=True):
            with error_at(job.where):
                for result, paths in draw(pipeline, job, indices, saving):
                    if recorded is not None and not timings and not args.quiet:
                        _note_differences(args, recorded, result)
                    timings.append(result.timings)
                    try:
                        _report(result, paths, quiet=args.quiet)
                    except SDError as error:  # the pictures are what counts: draw them all first
                        report_error = error
    if not args.quiet:
        _print_timings(timings, loaded, time.perf_counter() - started)
    if report_error is not None:
        raise report_error


def _read_picture(path: Path) -> Parameters:
    from ..images.metadata import read_parameters

    return read_parameters(path)


def _model_of(recorded: Parameters) -> Path:
    """The bundle that drew a picture, if it is among the exported ones: a path is the user's to give, not a picture's.
    For other programs' pictures, the only one there is."""
    from ..bundle.bundle import find_exported
    from ..provenance import is_ours

    try:
        return find_exported(recorded.model)
    except BundleError as error:
        if not is_ours(recorded):
            return find_exported(None)
        remedy = "name an exported model or a bundle's folder as `bundle`"
        raise BundleError("the picture's model is not here", got=recorded.model, remedy=remedy) from error


def _jobs(args: argparse.Namespace, recorded: Parameters | None, defaults: Defaults, saving: Saving) -> list[Job]:
    """What to draw and where to: every request and every file's name checked, but for what needs the engines."""
    from .jobs import check_free, check_resumable, default_pattern, make_jobs, off_sheet
    from .recall import recall
    from .settings import Settings, read_prompts_file

    settings = Settings(args.prompt, args.image, args.grid, given(args))
    if recorded is not None:
        single, count = off_sheet(recorded)
        recalled, unknown = recall(single)
        if settings.grid is None:  # another sheet is filled
            held = {} if count is None else {"num_images_per_prompt": count}
            recalled = replace(recalled, options={**recalled.options, **held})
        settings = settings.over(recalled)
        if unknown and not args.quiet:
            _note(f"not understood in {args.from_image}: {one_line('; '.join(unknown), 400)}")
    pattern = args.output
    if args.prompts_file is None:
        jobs = make_jobs([("", settings)], defaults, pattern)
    else:
        lines = [(where, line.over(settings)) for where, line in read_prompts_file(args.prompts_file)]
        pattern = pattern or default_pattern(args.prompts_file)
        jobs = make_jobs(lines, defaults, pattern)
        check_resumable(jobs, pattern)
    paths = [path for job in jobs for path in job.paths or ()]
    if args.output is None and args.prompts_file is None:
        check_destination(Path("picture.png"), overwrite=True)  # any name: whether the folder takes files
    for path in paths if args.prompts_file is None else []:
        check_free(path, saving)
    if args.preview is not None:
        pictures = [*paths, *(Path(job.image) for job in jobs if job.image), args.from_image, args.prompts_file]
        _check_preview(args.preview, [path for path in pictures if path is not None], overwrite=args.overwrite)
    return jobs


def _check_preview(preview: Path, others: Sequence[Path], *, overwrite: bool) -> None:
    """UsageError: not a name for a preview, or one of the `others`, which are read or written."""
    from .jobs import is_preview

    if preview.suffix.lower() != ".png" or any(same_name(preview, other) for other in others):
        raise UsageError("preview", got=str(preview), accepted="a name of its own that ends in .png")
    check_destination(preview, overwrite=overwrite or is_preview(preview))


def _load_embedding(pipeline: Pipeline, definition: str) -> None:
    word, equals, path = definition.partition("=")
    if not (word and equals and path):
        raise UsageError("embedding", got=definition, accepted="WORD=FILE")
    pipeline.load_textual_inversion(path, word)


def _report(result: Result, paths: Sequence[Path], *, quiet: bool) -> None:
    """Say which files were written, and what was cut off their prompts."""
    if quiet:
        return
    for prompt, lost in zip(result.request.prompts, result.truncated, strict=True):
        if lost and not result.indices.start:
            _note(f"dropped from '{one_line(prompt, 30)}' beyond 77 tokens: {one_line(lost)}")
    for path in _withheld(result, paths):
        _note(f"black, as the safety checker withheld it: {path}")
    for path in paths:
        say(path)


def _withheld(result: Result, paths: Sequence[Path]) -> Sequence[Path]:
    """The files with a picture that the safety checker withheld: one each, or the sheet of all."""
    withheld = result.nsfw_content_detected or ()
    if len(paths) == len(withheld):
        return [path for path, black in zip(paths, withheld, strict=True) if black]
    return paths if any(withheld) else []


def _note_differences(args: argparse.Namespace, recorded: Parameters, result: Result) -> None:
    from .recall import differences

    found = differences(recorded, result.parameters[0])
    if found:
        _note(f"not drawn as {args.from_image} was: {'; '.join(found)}")


def _print_timings(timings: Sequence[Timings], loaded: float, total: float) -> None:
    stages = {"load": loaded}
    for name in ("encode_prompt", "encode_image", "denoise", "decode", "safety_checker"):
        stages[name] = sum(getattr(one, name) for one in timings)
    shown = {
        name: seconds for name, seconds in (stages | {"total": total}).items() if seconds >= 0.005 or name == "total"
    }
    tell("  ".join(f"{name.replace('_', ' ')} {seconds:.2f} s" for name, seconds in shown.items()))


def _note(message: str) -> None:
    tell(f"sd-run: {message}")


if __name__ == "__main__":
    sys.exit(main())
