#!/usr/bin/env python3
"""Makes the pictures of docs/gallery.md by running the commands that stand there.

    scripts/gallery_pictures.py [BUNDLE]

The page's shell blocks run as they are, in this folder, with sd-run drawing by BUNDLE and replacing what is there.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/gallery.md"
BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PICTURE = re.compile(r"\]\((pictures/[\w./-]+\.png)\)")
LARGEST = 950_000  # bytes, all pictures together

SD_RUN = """
sd-run() {
    "$PYTHON" -c 'import sys; from sd_runtime.cli.run import main; sys.exit(main())' "$@" --model "$MODEL" --overwrite
}
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", nargs="?", default="out/demo-bundle", metavar="BUNDLE")
    args = parser.parse_args(arguments)
    page = PAGE.read_text(encoding="utf-8")
    commands = SD_RUN + "".join(BLOCK.findall(page))
    path = ":".join([str(ROOT / "runtime"), *sys.path])
    environment = os.environ | {"PYTHON": sys.executable, "MODEL": str(Path(args.bundle).resolve()), "PYTHONPATH": path}
    subprocess.run(["bash", "-euc", commands], cwd=ROOT, env=environment, check=True)
    sizes = {picture: (PAGE.parent / picture).stat().st_size for picture in sorted(set(PICTURE.findall(page)))}
    for picture, size in sizes.items():
        print(f"{size:>8} {picture}")
    print(f"{sum(sizes.values()):>8} bytes in all, at most {LARGEST}")
    return 0 if sum(sizes.values()) <= LARGEST else 1


if __name__ == "__main__":
    sys.exit(main())
