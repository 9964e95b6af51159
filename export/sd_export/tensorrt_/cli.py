"""sd-export build: flags → BuildOptions → build().  Nothing heavy is imported before the flags are known to be good."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sd_runtime.cli.arguments import ArgumentParser
from sd_runtime.cli.console import run

from .plan import ENGINE_PRECISIONS, BuildOptions, parse_batches, parse_size

if TYPE_CHECKING:
    from sd_runtime.bundle.manifest import EnginePrecision

EPILOG = """examples:
  sd-export build sd15
  sd-export build sd15 --size 512x512 --size 512x768 --size 768x512 --batch 1,2,4

Run it on the machine that will draw: an engine fits one GPU model and one version of TensorRT.  It needs neither torch
nor onnx; with ONNX Runtime installed, every engine is compared with its graph before it is used.  Engines that the
bundle has already are left as they are without --force, and those for other machines stay.
"""


def build_parser() -> ArgumentParser:
    parser = ArgumentParser("sd-export build", "Build TensorRT engines for a bundle, on the GPU at hand.", EPILOG)
    add = parser.add_argument
    add("bundle", type=Path, metavar="BUNDLE", help="a bundle's folder, or the name of an exported model")
    add_engine_flags(add)
    precision = "of the arithmetic (default: the bundle's); bf16 needs a fp32 bundle and TensorRT 10.15"
    add("--precision", choices=ENGINE_PRECISIONS, help=precision)
    add("--force", action="store_true", help="build anew what the bundle has already")
    add("--quiet", action="store_true", help="print nothing but the bundle's place, notices and errors")
    return parser


def add_engine_flags(add: Callable[..., object]) -> None:
    """Which engines to build: the flags that `sd-export --tensorrt` has, too."""
    size = "pictures to build an exact engine for; may be repeated (default: the model's own size)"
    add("--size", action="append", metavar="WxH", help=size)
    add("--batch", default="1", metavar="N,M", help="pictures at once, an exact engine for each (default: 1)")
    add("--refittable", action="store_true", help="let the weights be exchanged later; somewhat slower")
    add("--no-fallback", action="store_true", help="build no dynamic engine for other sizes and batches")
    add("--workspace", type=float, default=4.0, metavar="GB", help="scratch space of a layer on the GPU (default: 4)")


def build_options(args: argparse.Namespace, bundle: Path, precision: EnginePrecision | None) -> BuildOptions:
    """What those flags ask for.  UsageError: one of them is wrong."""
    return BuildOptions(
        bundle=bundle,
        sizes=tuple(dict.fromkeys(parse_size(size) for size in args.size or ())),
        batches=parse_batches(args.batch),
        precision=precision,
        refittable=args.refittable,
        fallback=not args.no_fallback,
        workspace=args.workspace,
    )


def main(argv: Sequence[str] | None = None) -> int:
    return run("sd-export build", lambda: _run(build_parser().parse_args(argv)))


def _run(args: argparse.Namespace) -> None:
    options = build_options(args, args.bundle, args.precision)
    from .build import build

    print(build(options, force=args.force, quiet=args.quiet))
