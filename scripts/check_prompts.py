#!/usr/bin/env python3
"""Measures from pixels how often the demo model follows its prompt, with our runtime at the bundle's own settings.

    scripts/check_prompts.py [BUNDLE] [--count 100] [--grid docs/pictures/demo-grid.png]

The prompts are descriptions that no training caption held, in any wording.  A picture's colours are right if most of
its rim has the background's colour and most of what differs from it inside has the shape's; its place is, if the centre
of that colour lies nearest to where the prompt wants it.  The grid shows the first pictures, good or bad.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from demo_data import COLORS, PLACES, Description, held_out
from PIL import Image, ImageDraw, ImageFont
from sd_runtime import Pipeline

RIM = 10 / 128  # share of the picture's side that is surely background
BATCH = 4
COLUMNS, ROWS = 8, 3


@dataclass(frozen=True)
class Finding:
    """What a picture shows: names from COLORS and PLACES."""

    color: str
    ground: str
    place: str


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    chosen = np.random.default_rng(777).permutation(np.array(held_out(), dtype=object))[: args.count]
    descriptions: list[Description] = chosen.tolist()
    pictures = draw(args.bundle, [description.caption() for description in descriptions])
    findings = [look(np.asarray(picture)) for picture in pictures]
    right = report(descriptions, findings)
    if args.grid:
        args.grid.parent.mkdir(parents=True, exist_ok=True)
        shown = list(zip(pictures, descriptions, strict=True))[: COLUMNS * ROWS]
        grid([(picture, description.caption()) for picture, description in shown]).save(args.grid, optimize=True)
        print(args.grid)
    return 0 if right >= args.least else 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", nargs="?", default="out/demo-bundle", metavar="BUNDLE")
    parser.add_argument("--count", type=int, default=100, help="how many prompts (default: %(default)s)")
    parser.add_argument("--least", type=float, default=0.9, metavar="SHARE", help="exit code 1 below it: %(default)s")
    parser.add_argument("--grid", type=Path, metavar="PNG", help="write the first pictures with their prompts")
    return parser.parse_args(arguments)


def draw(bundle: str, prompts: list[str]) -> list[Image.Image]:
    """One picture a prompt at the bundle's default settings; prompt i has seed i."""
    pictures: list[Image.Image] = []
    with Pipeline.load(bundle) as pipe:
        for start in range(0, len(prompts), BATCH):
            batch = prompts[start : start + BATCH]
            pictures += pipe(batch, seed=list(range(start, start + len(batch)))).images
            print(f"\r{len(pictures)}/{len(prompts)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return pictures


def look(pixels: npt.NDArray[np.uint8]) -> Finding:
    """The colours and the place in a picture (H, W, 3), every pixel counted as the nearest of COLORS."""
    names, palette = list(COLORS), np.array(list(COLORS.values()), np.float64)
    distance = ((pixels[:, :, None].astype(np.float64) - palette) ** 2).sum(-1)  # (H, W, colours)
    nearest = distance.argmin(-1)
    margin = round(len(pixels) * RIM)
    rim = np.ones(nearest.shape, bool)
    rim[margin:-margin, margin:-margin] = False
    ground = _commonest(nearest[rim])
    inside = nearest[~rim]
    color = _commonest(inside[inside != ground]) if (inside != ground).any() else ground
    y, x = (float((index + 0.5).mean()) / len(pixels) for index in np.nonzero(nearest == color))
    place = min(PLACES, key=lambda name: (PLACES[name][0] - x) ** 2 + (PLACES[name][1] - y) ** 2)
    return Finding(names[color], names[ground], place)


def report(descriptions: list[Description], findings: list[Finding]) -> float:
    """Print the shares; returns that of pictures with both colours right."""
    pairs = list(zip(descriptions, findings, strict=True))
    color = [d.color == f.color for d, f in pairs]
    ground = [d.ground == f.ground for d, f in pairs]
    both = [c and g for c, g in zip(color, ground, strict=True)]
    place = [d.place == f.place for d, f in pairs]
    rows = (("shape's colour", color), ("background's colour", ground), ("both colours", both), ("place", place))
    for name, right in rows:
        print(f"{name:<20} {sum(right):3d} of {len(right)}")
    for (description, finding), good in zip(pairs, both, strict=True):
        if not good:
            print(f"  {description.caption()!r} became {finding.color} on {finding.ground}")
    return sum(both) / len(both)


def grid(pictures: list[tuple[Image.Image, str]]) -> Image.Image:
    """The pictures in rows of COLUMNS, each with its caption below."""
    width, height = pictures[0][0].size
    gap, line = 8, 13
    cell_width, cell_height = width + gap, height + 3 * line + gap
    rows = -(-len(pictures) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * cell_width + gap, rows * cell_height + gap), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for index, (picture, caption) in enumerate(pictures):
        left, top = gap + index % COLUMNS * cell_width, gap + index // COLUMNS * cell_height
        sheet.paste(picture, (left, top))
        pen.text((left, top + height + 2), textwrap.fill(caption, 24), fill="black", font=font, spacing=1)
    return sheet


def _commonest(values: npt.NDArray[np.int64]) -> int:
    return int(np.bincount(values).argmax())


if __name__ == "__main__":
    sys.exit(main())
