"""sd-bench: flags → Plan → measure → table, JSON, plot."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..cli.arguments import ArgumentParser
from ..cli.console import run_parsed
from ..errors import UsageError

if TYPE_CHECKING:
    from ..bundle.bundle import Bundle
    from .benchmark import Plan

PROMPT = "a large yellow star on a blue background"
EPILOG = """examples:
  sd-bench demo
  sd-bench bundles/demo --against diffusers --json bench.json --plot bench.svg
  sd-bench demo --requests-per-second 0.5 1 2 4 --duration 60

Ratios are the peer's median by ours: above 1, ours is the better.  Latencies count from when a request was due.
"""


def build_parser() -> ArgumentParser:
    parser = ArgumentParser("sd-bench", "Measure what a bundle takes on this machine, in time and memory.", EPILOG)
    add = parser.add_argument
    add("bundle", metavar="BUNDLE", help="a bundle's folder, or the name of an exported model")
    add("--device", default="auto", choices=("auto", "cuda", "cpu"), help="default: cuda where there is one")
    add("--against", choices=("diffusers",), help="measure this, too, in the same run (needs it installed)")
    add("--checkpoint", metavar="MODEL", help="what it loads (default: what the bundle was made from)")
    add("--rounds", type=int, default=10, metavar="N", help="measured pictures (default: 10)")
    add("--warmup", type=int, default=2, metavar="N", help="pictures drawn before (default: 2)")
    add("--cold", type=int, default=3, metavar="N", help="new processes to start; 0: none (default: 3)")
    add("--batches", default="1,2,4", metavar="A,B", help="pictures drawn together (default: 1,2,4)")
    add("--requests-per-second", type=float, nargs="+", default=[], metavar="R", help="latency at these rates")
    add("--duration", type=float, default=30.0, metavar="SECONDS", help="of each rate (default: 30)")
    add("--arrivals", default="poisson", choices=("poisson", "fixed"), help="of requests (default: poisson)")
    add("--json", type=Path, metavar="FILE", help="write every number")
    add("--plot", type=Path, metavar="FILE", help="write plots, .svg")
    add("--quiet", action="store_true", help="print only errors")
    picture = parser.add_argument_group("what is drawn (default: the bundle's settings)")
    picture.add_argument("--prompt", default=PROMPT, metavar="TEXT")
    picture.add_argument("--seed", type=int, default=1, metavar="N")
    picture.add_argument("--steps", dest="num_inference_steps", type=int, metavar="N")
    picture.add_argument("--guidance-scale", type=float, metavar="X")
    picture.add_argument("--width", type=int, metavar="PIXELS")
    picture.add_argument("--height", type=int, metavar="PIXELS")
    picture.add_argument("--scheduler", metavar="NAME", help="see sd-run --list-schedulers")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run_parsed("sd-bench", build_parser, _run, argv)


def _run(args: argparse.Namespace) -> None:
    _check_outputs(args)
    from ..bundle.bundle import Bundle, find_bundle
    from ..cli.reports import write_report
    from .benchmark import measure

    bundle = Bundle.open(find_bundle(args.bundle))
    results = measure(bundle, _plan(args, bundle), lambda text: _note(args, text))
    from . import report

    if not args.quiet:
        print(report.table(results))
    if args.json is not None:
        write_report(args.json, json.dumps(report.to_json(results), indent=1) + "\n")
    if args.plot is not None:
        write_report(args.plot, report.plot(results))


def _check_outputs(args: argparse.Namespace) -> None:
    """Before minutes are spent: that the files can be written."""
    from ..cli.reports import check_report

    for path in (args.json, args.plot):
        if path is not None:
            check_report(path)
    if args.plot is not None and args.plot.suffix.lower() != ".svg":
        raise UsageError("plot", got=str(args.plot), accepted="a name that ends in .svg")


def _plan(args: argparse.Namespace, bundle: Bundle) -> Plan:
    from ..request import make_request
    from .benchmark import Plan
    from .comparison import find_checkpoint

    request = make_request(
        bundle.manifest.defaults,
        args.prompt,
        seed=args.seed,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        width=args.width,
        height=args.height,
        scheduler=args.scheduler,
    )
    return Plan(
        request,
        device=args.device,
        rounds=args.rounds,
        warmup=args.warmup,
        cold=args.cold,
        batches=_sizes(args.batches),
        rates=tuple(args.requests_per_second),
        duration=args.duration,
        arrivals=args.arrivals,
        peer=find_checkpoint(args.checkpoint, bundle.manifest) if args.against is not None else None,
    )


def _sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(size) for size in text.split(",") if size)
    except ValueError as error:
        raise UsageError("batches", got=text, accepted="numbers such as 1,2,4") from error


def _note(args: argparse.Namespace, text: str) -> None:
    """On a terminal, what is being measured."""
    if not args.quiet and sys.stderr.isatty():
        print(f"sd-bench: {text}", file=sys.stderr)
