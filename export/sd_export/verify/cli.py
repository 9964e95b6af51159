"""sd-verify: flags → which reference → compare → report.  Nothing heavy is imported before the flags are known good."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sd_runtime.cli.arguments import ArgumentParser
from sd_runtime.cli.console import run_parsed
from sd_runtime.errors import DependencyError, SDError, UsageError

from ..choices import PREDICTION_TYPES

if TYPE_CHECKING:
    from sd_runtime.bundle.bundle import Bundle
    from sd_runtime.pipeline import Pipeline

    from ..source import Checkpoint
    from .reference import Reference
    from .report import Drift, Report

STORED = "stored"
LIBRARIES = ("torch", "diffusers", "transformers", "onnx", "onnx_ir", "safetensors", "huggingface_hub")
EPILOG = """examples:
  sd-verify stable-diffusion-v1-5 --against stable-diffusion-v1-5/stable-diffusion-v1-5
  sd-verify bundles/demo --html report.html --bisect
  sd-verify bundles/demo --prompt "a small red heart" --steps 25 --scheduler euler_a

The reference is computed by torch where the checkpoint is at hand (needs: pip install "sd-lean[export]"), else read
from the bundle, where the export left a small one.  Exit code 1: a limit is broken; the message names the component.
"""


def build_parser() -> ArgumentParser:
    parser = ArgumentParser("sd-verify", "Compare what a bundle computes with what its checkpoint computes.", EPILOG)
    add = parser.add_argument
    add("bundle", metavar="BUNDLE", help="a bundle's folder, or the name of an exported model")
    against = f"the checkpoint, as for sd-export (default: if at hand), or '{STORED}' for the tensors in the bundle"
    add("--against", metavar="MODEL", help=against)
    add("--device", default="auto", choices=("auto", "cuda", "cpu"), help="where the bundle runs (default: auto)")
    add("--bisect", action="store_true", help="find the layer where the drift starts (needs the checkpoint)")
    add("--json", type=Path, metavar="FILE", help="write every measured value")
    add("--html", type=Path, metavar="FILE", help="write a page with pictures and plots")
    add("--quiet", action="store_true", help="print only errors")
    picture = parser.add_argument_group("what both sides draw (needs the checkpoint; default: the bundle's settings)")
    picture.add_argument("--prompt", metavar="TEXT")
    picture.add_argument("--negative-prompt", metavar="TEXT")
    picture.add_argument("--seed", type=int, metavar="N")
    picture.add_argument("--steps", dest="num_inference_steps", type=int, metavar="N")
    picture.add_argument("--guidance-scale", type=float, metavar="X")
    picture.add_argument("--width", type=int, metavar="PIXELS")
    picture.add_argument("--height", type=int, metavar="PIXELS")
    picture.add_argument("--scheduler", metavar="NAME", help="see sd-run --list-schedulers")
    return parser


PROBE = ("prompt", "negative_prompt", "seed", "num_inference_steps", "guidance_scale", "width", "height", "scheduler")


def main(argv: Sequence[str] | None = None) -> int:
    return run_parsed("sd-verify", build_parser, _run, argv)


def _run(args: argparse.Namespace) -> None:
    from sd_runtime.bundle.bundle import Bundle, find_bundle
    from sd_runtime.cli.report_files import check_report, write_report
    from sd_runtime.sampling import resolve

    from ..progress import mute_libraries
    from .compare import compare, open_pipeline

    if args.quiet:
        mute_libraries()

    for path in (args.json, args.html):
        if path is not None:
            check_report(path)
    if args.scheduler is not None:
        resolve(args.scheduler).reference_class()  # refused at once where diffusers has none
    with open_pipeline(Bundle.open(find_bundle(args.bundle)), args.device) as pipeline:
        checkpoint = _checkpoint(args, pipeline.bundle)
        reference = _reference(args, pipeline, checkpoint)
        report = compare(pipeline, reference)
        if args.bisect:
            report = replace(report, drift=_bisect(pipeline.bundle, checkpoint, reference, report))
    if not args.quiet:
        print(report.table())
    if args.json is not None:
        write_report(args.json, json.dumps(report.to_json(), indent=1, ensure_ascii=False) + "\n")
    if args.html is not None:
        from .html import page

        write_report(args.html, page(report))
    report.raise_if_broken()


def _checkpoint(args: argparse.Namespace, bundle: Bundle) -> Checkpoint | None:
    """The checkpoint for the reference: the one that was named, or the bundle's own source where it is at hand."""
    if args.against == STORED:
        return None
    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if missing and args.against is None:
        return None
    if missing:
        raise DependencyError(f"--against needs {', '.join(missing)}", remedy='pip install "sd-lean[export]"')
    from sd_runtime.sampling import SchedulerConfig

    from .origin import difference, find_source, open_checkpoint

    if args.against is None:
        return find_source(bundle.manifest)
    told = SchedulerConfig.from_bytes(bundle.read("scheduler/scheduler_config.json")).prediction_type
    known = next((kind for kind in PREDICTION_TYPES if kind == told), None)
    checkpoint = open_checkpoint(args.against, bundle.manifest, known)
    if note := difference(checkpoint, bundle.manifest):
        print(f"sd-verify: {note}", file=sys.stderr)
    return checkpoint


def _reference(args: argparse.Namespace, pipeline: Pipeline, checkpoint: Checkpoint | None) -> Reference:
    """The stored reference, or one computed for the bundle's own settings, changed by the flags."""
    from .probe import full_probe
    from .reference import Reference

    asked = {name: value for name in PROBE if (value := getattr(args, name)) is not None}
    if checkpoint is None:
        if asked:
            remedy = "name the checkpoint with --against MODEL"
            raise UsageError(f"stored reference tensors are for one picture: {', '.join(asked)}", remedy=remedy)
        return Reference.load(pipeline.bundle)
    from .torch_reference import make_reference

    probe = replace(full_probe(pipeline.manifest.defaults, pipeline.scheduler_config.num_train_timesteps), **asked)
    pipeline.check(probe.request(pipeline.manifest.defaults))
    return make_reference(checkpoint, probe, pipeline.manifest.components)


def _bisect(bundle: Bundle, checkpoint: Checkpoint | None, reference: Reference, report: Report) -> Drift | None:
    """Of the first network that is beyond its limit; of the last call of the UNet if none is."""
    if checkpoint is None:
        raise SDError("--bisect needs the checkpoint", remedy="name it with --against MODEL")
    from .bisect import bisect

    rows = {(row.component, row.name): row for row in report.rows}
    cases = [case for case in reference.cases if (case.component, case.name) in rows]
    broken = [case for case in cases if not rows[case.component, case.name].passed]
    chosen = broken or [case for case in cases if case.component == "unet"][-1:] or cases[:1]
    if not chosen:
        return None
    case = chosen[0]
    return bisect(bundle, checkpoint, reference, case, rows[case.component, case.name])
