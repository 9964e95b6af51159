"""sd-bench: flags → Benchmark → measure → table, JSON, plots."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cli.arguments import ArgumentParser
from ..cli.console import run_parsed, tell
from ..cli.flags import add_fields
from ..errors import UsageError

if TYPE_CHECKING:
    from ..bundle.bundle import Bundle
    from ..request import Request
    from .benchmark import Benchmark

PROMPT, SEED = "a large yellow star on a blue background", 1
PICTURE = ("negative_prompt", "num_inference_steps", "guidance_scale", "width", "height", "scheduler")
NAMES = {  # what the flags of this command set, where it is called otherwise
    "rounds": "--rounds",
    "warmup": "--warmup",
    "cold": "--cold",
    "batches": "--batches",
    "rates": "--requests-per-second",
    "duration": "--duration",
    "json": "--json",
    "plot": "--plot",
}
EPILOG = """examples:
  sd-bench demo
  sd-bench bundles/demo --json bench.json --plot bench.svg
  sd-bench demo --requests-per-second 0.5 1 2 4 --duration 60

Of each stage the table shows the median (p50) and the times that 90, 95 and 99 % of the samples stay within.  Latencies
count from when a request was due, so they include waiting.  Other programs on the machine disturb all of it.
"""


def build_parser() -> ArgumentParser:
    parser = ArgumentParser("sd-bench", "Measure what a bundle takes on this machine, in time and memory.", EPILOG)
    add = parser.add_argument
    add("bundle", metavar="BUNDLE", help="a bundle's folder, or the name of an exported model")
    add("--device", default="auto", choices=("auto", "cuda", "cpu"), help="default: cuda where there is one")
    backends = "what runs the networks, in order of preference (default: tensorrt, tensorrt_rtx, onnxruntime)"
    add("--backend", metavar="A,B", help=backends)
    add("--rounds", type=int, default=10, metavar="N", help="measured pictures (default: 10)")
    add("--warmup", type=int, default=2, metavar="N", help="pictures drawn before those (default: 2)")
    add("--cold", type=int, default=3, metavar="N", help="measured new processes of sd-run; 0: none (default: 3)")
    add("--batches", default="1,2,4", metavar="A,B", help="sizes of batches to measure (default: 1,2,4)")
    rates = "measure latency while requests arrive at each of these rates (default: none)"
    add("--requests-per-second", type=float, nargs="+", default=[], metavar="R", help=rates)
    add("--duration", type=float, default=30.0, metavar="SECONDS", help="how long at each rate (default: 30)")
    arrivals = "how requests arrive: at random, or evenly spaced (default: poisson)"
    add("--arrivals", default="poisson", choices=("poisson", "fixed"), help=arrivals)
    add("--json", type=Path, metavar="FILE", help="write every number to a JSON file")
    add("--plot", type=Path, metavar="FILE", help="write plots to an SVG file")
    add("--quiet", action="store_true", help="print only errors")
    add_picture(parser)
    return parser


def add_picture(parser: ArgumentParser) -> None:
    """The flags that `picture` reads."""
    add = parser.add_argument_group("what to draw").add_argument
    add("--prompt", default=PROMPT, metavar="TEXT", help=f"what to draw (default: {PROMPT})")
    add("--seed", type=int, default=SEED, metavar="N", help=f"picture i uses seed + i (default: {SEED})")
    add_fields(add, PICTURE)


def main(argv: Sequence[str] | None = None) -> int:
    return run_parsed("sd-bench", build_parser, _run, argv, NAMES)


def _run(args: argparse.Namespace) -> None:
    check_outputs(args)
    from ..bundle.bundle import Bundle, find_bundle
    from ..cli.report_files import write_report
    from .benchmark import measure

    bundle = Bundle.open(find_bundle(args.bundle))
    results = measure(bundle, _benchmark(args, bundle), notes("sd-bench", args))
    from . import report

    if not args.quiet:
        print(report.table(results))
    if args.json is not None:
        write_report(args.json, json.dumps(report.to_json(results), indent=1) + "\n")
    if args.plot is not None:
        write_report(args.plot, report.plot(results))


def check_outputs(args: argparse.Namespace) -> None:
    """Raise, before minutes of measuring, what writing --json and --plot would."""
    from ..cli.report_files import check_report

    for path in (args.json, args.plot):
        if path is not None:
            check_report(path)
    if args.plot is not None and args.plot.suffix.lower() != ".svg":
        raise UsageError("plot", got=str(args.plot), accepted="a name that ends in .svg")


def picture(args: argparse.Namespace, bundle: Bundle) -> Request:
    """The request that the flags of `add_picture` describe; the rest is the bundle's own."""
    from ..request import make_request

    options: dict[str, Any] = {name: getattr(args, name) for name in ("seed", *PICTURE)}
    return make_request(bundle.manifest.defaults, args.prompt, **options)


def _benchmark(args: argparse.Namespace, bundle: Bundle) -> Benchmark:
    from .benchmark import Benchmark

    return Benchmark(
        picture(args, bundle),
        device=args.device,
        backends=None if args.backend is None else tuple(args.backend.split(",")),
        rounds=args.rounds,
        warmup=args.warmup,
        cold=args.cold,
        batches=_sizes(args.batches),
        rates=tuple(args.requests_per_second),
        duration=args.duration,
        arrivals=args.arrivals,
    )


def _sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(size) for size in text.split(",") if size)
    except ValueError as error:
        raise UsageError("batches", got=text, accepted="numbers such as 1,2,4") from error


def notes(program: str, args: argparse.Namespace) -> Callable[[str], None]:
    """A function that tells someone who waits at a terminal what is being measured."""

    def note(text: str) -> None:
        if not args.quiet and sys.stderr.isatty():
            tell(f"{program}: {text}")

    return note
