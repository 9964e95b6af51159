"""sd-export build: flags → BuildRequest → build().  Nothing heavy is imported before the flags are known to be good."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from sd_runtime.arguments import ArgumentParser
from sd_runtime.console import run

from .build_plan import ENGINE_PRECISIONS, BuildRequest, parse_batches, parse_size

EPILOG = """examples:
  sd-export build sd15
  sd-export build sd15 --size 512x512 --size 512x768 --size 768x512 --batch 1,2,4

Run it on the machine that will draw: an engine fits one GPU model and one version of TensorRT.  It needs neither torch
nor onnx; with ONNX Runtime installed, every engine is compared with its graph before it is used.  Engines that the
bundle has already are left as they are, and those for other machines stay.
"""


def build_parser() -> ArgumentParser:
    parser = ArgumentParser("sd-export build", "Build TensorRT engines for a bundle, on the GPU at hand.", EPILOG)
    add = parser.add_argument
    add("bundle", type=Path, metavar="BUNDLE", help="a bundle's folder, or the name of an exported model")
    size = "pictures to build an exact engine for; may be repeated (default: the model's own size)"
    add("--size", action="append", metavar="WxH", help=size)
    add("--batch", default="1", metavar="N,M", help="pictures at once, an exact engine for each (default: 1)")
    precision = "of the arithmetic (default: the bundle's); bf16 needs a fp32 bundle and TensorRT 10.15"
    add("--precision", choices=ENGINE_PRECISIONS, help=precision)
    add("--refittable", action="store_true", help="let the weights be exchanged later; somewhat slower")
    add("--no-fallback", action="store_true", help="build no dynamic engine for other sizes and batches")
    add("--workspace", type=float, default=4.0, metavar="GB", help="scratch space of a layer on the GPU (default: 4)")
    add("--quiet", action="store_true", help="print nothing but the bundle's place, notices and errors")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run("sd-export build", lambda: _run(build_parser().parse_args(argv)))


def _run(args: argparse.Namespace) -> None:
    request = BuildRequest(
        bundle=args.bundle,
        sizes=tuple(dict.fromkeys(parse_size(size) for size in args.size or ())),
        batches=parse_batches(args.batch),
        precision=args.precision,
        refittable=args.refittable,
        fallback=not args.no_fallback,
        workspace=args.workspace,
    )
    from .build import build

    print(build(request, quiet=args.quiet))
