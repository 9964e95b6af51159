#!/usr/bin/env python3
"""Fits the matrix that previews are made with to the pictures of a bundle's model, and prints it as JSON.

    scripts/fit_preview.py [BUNDLE] [--count 64]

The rows belong under "_preview" in the checkpoint's model_index.json, from where the export takes them; Stable
Diffusion's own latents need none.  The error is that of the previews, in colour levels of 0 … 255, on as many pictures
again that the fit did not see.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

import numpy as np
from demo_data import held_out
from sd_runtime import Pipeline
from sd_runtime.images.preview import fit_preview_matrix, preview

DECIMALS = 3


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", nargs="?", default="out/demo-bundle", metavar="BUNDLE")
    parser.add_argument("--count", type=int, default=64, help="pictures to fit to (default: %(default)s)")
    args = parser.parse_args(arguments)
    chosen = np.random.default_rng(0).permutation(np.array(held_out(), dtype=object))[: 2 * args.count]
    with Pipeline.load(args.bundle, device="cpu") as pipeline:
        result = pipeline([description.caption() for description in chosen], seed=0)
    latents, samples, seen = result.latents, result.samples, args.count
    for name, quadratic in (("linear", False), ("quadratic", True)):
        matrix = fit_preview_matrix(latents[:seen], samples[:seen], quadratic=quadratic).round(DECIMALS)
        shown = np.stack([np.asarray(picture) for picture in preview(latents[seen:], matrix)])
        cells = np.stack([np.asarray(p.reduce(p.width // shown.shape[2])) for p in result.images[seen:]])
        error = np.sqrt(np.mean((shown.astype(float) - cells) ** 2))
        print(f"{name}: off by {error:.0f} levels (root mean square)")
        print(json.dumps([[round(float(value), DECIMALS) for value in row] for row in matrix]))


if __name__ == "__main__":
    main()
