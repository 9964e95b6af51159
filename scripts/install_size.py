#!/usr/bin/env python3
"""Installs this package without any extra into a fresh virtual environment and adds up what it brought.

    scripts/install_size.py [--limit MEGABYTES]

Counted is every file that a distribution's RECORD lists, compiled .pyc files included, but for what the bare
environment held already (pip, and setuptools before Python 3.12).
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
MEGABYTE = 1_000_000
SIZES = """
import importlib.metadata, json
print(json.dumps({
    dist.name: sum(path.stat().st_size for file in dist.files or () if (path := file.locate()).is_file())
    for dist in importlib.metadata.distributions()
}))
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=float, default=110, metavar="MEGABYTES", help="exit code 1 above: %(default)s")
    args = parser.parse_args(arguments)
    sizes = measure()
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        print(f"{name:<20} {size / MEGABYTE:8.1f} MB")
    total = sum(sizes.values()) / MEGABYTE
    print(f"{'together':<20} {total:8.1f} MB, limit {args.limit:g} MB")
    return 0 if total <= args.limit else 1


def measure() -> dict[str, int]:
    """Bytes on disk of each distribution of a base install, built from a copy of this repository's sources."""
    with tempfile.TemporaryDirectory() as folder:
        sources, environment = Path(folder, "sources"), Path(folder, "environment")
        copy_sources(sources)
        venv.create(environment, with_pip=True)
        python = environment / "bin/python"
        bare = distributions(python)
        constraints = REPOSITORY / "scripts/constraints.txt"
        subprocess.run([python, "-m", "pip", "install", "--quiet", "-c", constraints, sources], check=True)
        return {name: size for name, size in distributions(python).items() if name not in bare}


def copy_sources(folder: Path) -> None:
    """What a wheel is built from; a build inside the repository would pick up leftovers of the one before."""
    for name in ("export", "runtime"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, folder)


def distributions(python: Path) -> dict[str, int]:
    listing = subprocess.run([python, "-I", "-c", SIZES], check=True, stdout=subprocess.PIPE)
    sizes: dict[str, int] = json.loads(listing.stdout)
    return sizes


if __name__ == "__main__":
    sys.exit(main())
