"""sd-export: flags → ExportOptions → export(); `sd-export build` is handed on.  Nothing heavy is imported before the
flags are known to be good."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sd_runtime.cli.arguments import ArgumentParser
from sd_runtime.cli.console import run
from sd_runtime.errors import UsageError

from .choices import PREDICTION_TYPES
from .networks.registry import SELECTABLE
from .options import PRECISIONS, ExportOptions
from .progress import mute_libraries
from .tensorrt_ import cli as build_cli
from .tensorrt_.cli import LIBRARY_NAMES, add_engine_flags, build_options
from .tensorrt_.plan import BuildOptions, require_half

EPILOG = """examples:
  sd-export --model demo
  sd-export --model stable-diffusion-v1-5/stable-diffusion-v1-5 --precision fp16
  sd-export --model my-model.safetensors --output bundles/my-model
  sd-export --model demo --tensorrt --size 128x128 --batch 1,2
  sd-export --model demo --precision fp16 --tensorrt rtx
  sd-export build demo                     builds TensorRT engines for a bundle; see sd-export build --help

The model goes where sd-run finds it by name, unless --output says otherwise: to bundles/ under $SD_LEAN_HOME, by
default the user data directory.  A bundle that is complete and made from the same files is left as it is.
"""


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        "sd-export", "Export a Stable Diffusion checkpoint to a bundle that sd-run draws with.", EPILOG
    )
    add = parser.add_argument
    model = "demo, a Hugging Face id, a folder in diffusers layout, or a single file (.safetensors)"
    add("--model", required=True, metavar="MODEL", help=model)
    add("--output", type=Path, metavar="BUNDLE", help="folder to write (default: the model's name among your bundles)")
    add("--precision", default="fp32", choices=PRECISIONS, help="of weights and arithmetic (default: fp32)")
    add("--revision", metavar="REV", help="branch, tag or commit on the hub")
    everything = f"export only these (default: all that the model has of {','.join(SELECTABLE)})"
    predicts = "what the UNet predicts, where the checkpoint does not say: SD 2.x and v models as single files"
    add("--prediction-type", choices=PREDICTION_TYPES, help=predicts)
    pickles = "convert .bin and .ckpt, in a process that loads nothing but weights"
    add("--allow-pickle", action="store_true", help=pickles)
    add("--components", metavar="A,B", help=everything)
    add("--vae", metavar="MODEL", help="another VAE: a hub id, a folder, or a .safetensors file")
    add("--taesd", metavar="MODEL", help="add a tiny decoder for sd-run --fast-decoder: a hub id or a folder")
    engines = "then build engines, as sd-export build does: for the GPU at hand, or with rtx for all RTX GPUs"
    add("--tensorrt", nargs="?", const="gpu", choices=LIBRARY_NAMES, help=engines)
    add("--no-verify", action="store_true", help="do not compare the bundle with torch; its manifest will say so")
    add("--force", action="store_true", help="replace a bundle that is something else, or damaged")
    add("--quiet", action="store_true", help="print nothing but the bundle's place, notices and errors")
    add_to_group = parser.add_argument_group("engines, with --tensorrt").add_argument
    add_engine_flags(add_to_group)
    bf16 = "of their arithmetic, from a fp32 bundle and with TensorRT 10.15 (default: the bundle's)"
    add_to_group("--engine-precision", choices=("bf16",), help=bf16)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["build"]:
        return build_cli.main(arguments[1:])
    return run("sd-export", lambda: _run(build_parser().parse_args(arguments)))


def _run(args: argparse.Namespace) -> None:
    options = ExportOptions(
        model=args.model,
        output=args.output,
        precision=args.precision,
        revision=args.revision,
        components=tuple(args.components.split(",")) if args.components is not None else None,
        vae=args.vae,
        taesd=args.taesd,
        verify=not args.no_verify,
        force=args.force,
        prediction_type=args.prediction_type,
        allow_pickle=args.allow_pickle,
    )
    engines = _engines(args)
    if args.quiet:
        mute_libraries()
    if args.tensorrt:
        from .tensorrt_.build import require_library

        require_library(engines)  # before the export takes its minutes
    from .exporter import export

    bundle = export(options, quiet=args.quiet)
    if args.tensorrt:
        from .tensorrt_.build import build

        build(replace(engines, bundle=bundle), quiet=args.quiet)
    print(bundle)


def _engines(args: argparse.Namespace) -> BuildOptions:
    """Which engines to build, but for the bundle; UsageError before anything is exported."""
    engines = build_options(args, Path(), args.engine_precision, args.tensorrt or "gpu")
    if engines.turing:
        require_half(args.precision, args.model)
    if not args.tensorrt and engines != BuildOptions(Path()):
        raise UsageError("flags for engines", accepted="only together with --tensorrt")
    if engines.precision is not None and args.precision != "fp32":
        got = f"with --precision {args.precision}"
        raise UsageError(f"--engine-precision {engines.precision}", got=got, accepted="a fp32 bundle")
    return engines
