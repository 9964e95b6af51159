"""sd-export build: flags → BuildOptions → build().  Nothing heavy is imported before the flags are known to be good."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sd_runtime.cli.arguments import ArgumentParser
from sd_runtime.cli.console import run

from .plan import ENGINE_PRECISIONS, BuildOptions, parse_batches, parse_size

if TYPE_CHECKING:
    from sd_runtime.bundle.manifest import EngineLibrary, EnginePrecision

LIBRARY_NAMES: Mapping[str, EngineLibrary] = {"gpu": "tensorrt", "rtx": "tensorrt_rtx"}

EPILOG = """examples:
  sd-export build sd15
  sd-export build sd15 --size 512x512 --size 512x768 --size 768x512 --batch 1,2,4
  sd-export build sd15 --for rtx           on any machine, with TensorRT for RTX

Run it on the machine that will draw: an engine fits one GPU model and one version of TensorRT.  With ONNX Runtime
installed, every engine is compared with its graph before it is used.  With --for rtx it runs anywhere, without a GPU:
TensorRT for RTX makes engines for every GeForce RTX, RTX PRO, A10, L4 or L40S.  Neither torch nor onnx is needed.
Engines that the bundle has already are left as they are without --force, and those for other targets stay.
"""


def build_parser() -> ArgumentParser:
    parser = ArgumentParser("sd-export build", "Build TensorRT engines for a bundle.", EPILOG)
    add = parser.add_argument
    add("bundle", type=Path, metavar="BUNDLE", help="a bundle's folder, or the name of an exported model")
    place = "for the GPU at hand (gpu, the default), or with TensorRT for RTX for all that it knows (rtx)"
    add("--for", dest="library", choices=LIBRARY_NAMES, default="gpu", help=place)
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
    add(
        "--refittable", action="store_true", help="let weights be exchanged later (TensorRT 10.2 or newer; not for rtx)"
    )
    fallback = "a dynamic engine for other sizes and batches, too (default: yes, but not for rtx)"
    add("--fallback", action=argparse.BooleanOptionalAction, default=None, help=fallback)
    workspace = "scratch space of a layer on the GPU (default: as much as the library takes)"
    add("--workspace", type=float, metavar="GB", help=workspace)
    add("--turing", action="store_true", help="for rtx: engines for GPUs of compute capability 7.5, too (fp16 only)")


def build_options(
    args: argparse.Namespace, bundle: Path, precision: EnginePrecision | None, library: str
) -> BuildOptions:
    """What those flags ask for; `library`: one of LIBRARY_NAMES.  UsageError: one of them is wrong."""
    return BuildOptions(
        bundle=bundle,
        sizes=tuple(dict.fromkeys(parse_size(size) for size in args.size or ())),
        batches=parse_batches(args.batch),
        precision=precision,
        refittable=args.refittable,
        fallback=args.fallback,
        workspace=args.workspace,
        library=LIBRARY_NAMES[library],
        turing=args.turing,
    )


def main(argv: Sequence[str] | None = None) -> int:
    return run("sd-export build", lambda: _run(build_parser().parse_args(argv)))


def _run(args: argparse.Namespace) -> None:
    options = build_options(args, args.bundle, args.precision, args.library)
    from .build import build

    print(build(options, force=args.force, quiet=args.quiet))
