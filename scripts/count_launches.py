"""What a GPU would launch for the networks of a bundle, without one: TensorRT for RTX builds their engines and says.

    scripts/count_launches.py BUNDLE [--form FORM …] [--component NAME …] [--size 512x512] [--batch 1] [--rows-vary]

For every network and form: launches by kind, bytes read and written, fused attentions, and the memory for activations
and weights.  Needs `pip install tensorrt-rtx-cu13`; Stable Diffusion 1.5 takes 6 GB of memory and about 20 s a network.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from sd_export.tensorrt_.launches import FUSED_ATTENTION, Account
from sd_export.tensorrt_.plan import parse_size, ranged
from sd_export.tensorrt_.portable import build_portable
from sd_runtime.bundle.bundle import Bundle
from sd_runtime.bundle.manifest import Graph, ShapeRange
from sd_runtime.engines.tensorrt_.rebuild import rows_a_picture
from sd_runtime.errors import SDError

COMPONENTS = ("unet", "vae_decoder", "vae_encoder", "text_encoder", "taesd", "safety_checker")
SHOWN = 60  # characters of the name of a kind


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument("--form", nargs="+", default=["trt-basic"], help="graphs to build (%(default)s)")
    parser.add_argument("--component", nargs="+", choices=COMPONENTS, default=[*COMPONENTS], metavar="NAME")
    parser.add_argument("--size", default="512x512", metavar="WIDTHxHEIGHT", help="of the picture (%(default)s)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="pictures at once in the UNet")
    parser.add_argument("--rows-vary", action="store_true", help="an engine for up to N pictures; bytes are not known")
    args = parser.parse_args(arguments)
    try:
        manifest = Bundle.open(args.bundle).manifest
        for name in args.component:
            component = manifest.components.get(name)
            graphs = {} if component is None else {form: component.graphs.get(form) for form in args.form}
            rows = args.batch * rows_a_picture(manifest) if name == "unet" else 1
            for form, graph in graphs.items():
                if graph is not None:
                    profile = shapes(graph, *parse_size(args.size), rows, args.rows_vary)
                    report(f"{name} {form}", build_portable(name, args.bundle / graph.path, profile).account)
    except SDError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def shapes(graph: Graph, width: int, height: int, rows: int, rows_vary: bool) -> dict[str, ShapeRange]:
    """One size for every axis, but for the rows if they vary."""
    sides = {"width": width, "height": height, "latent_width": width // 8, "latent_height": height // 8}
    axes = {name: (side, side, side) for name, side in sides.items()}
    axes["batch"] = axes["timesteps"] = (1 if rows_vary else rows, rows, rows)
    found = {}
    for spec in graph.inputs:
        tuned = {axis.symbol: (axis.opt,) * 3 for axis in spec.shape if not isinstance(axis, int)}
        found[spec.name] = ranged(spec, tuned | axes)
    return found


def report(label: str, engine: Account) -> None:
    """The sums in one line, then a line for each kind, the most frequent first."""
    memory = f"{engine.activations / 1e6:.0f} MB of activations, {engine.weights / 1e6:.0f} MB of weights"
    fused = engine.of(FUSED_ATTENTION)
    launches = f"{len(engine.launches)} launches ({engine.moves} of them casts and moves)"
    sums = f"{launches}, {engine.bytes / 1e6:.0f} MB read and written, {fused} fused attentions"
    print(f"{label}: {sums}, {memory}", flush=True)
    kinds = Counter(launch.kind for launch in engine.launches)
    for kind, count in kinds.most_common():
        moved = sum(launch.bytes for launch in engine.launches if launch.kind == kind)
        print(f"  {count:4d} {moved / 1e6:8.1f} MB  {kind if len(kind) <= SHOWN else kind[: SHOWN - 1] + '…'}")


if __name__ == "__main__":
    sys.exit(main())
