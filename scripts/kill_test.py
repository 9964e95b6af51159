#!/usr/bin/env python3
"""Kill sd-export and sd-run at random moments, again and again, and look at what they leave.

    scripts/kill_test [--minutes 5] [--seed 0] [export] [save] [prompts]

    export    a bundle is the old one, complete, or the new one, complete; the next export removes what was left
    save      a picture is the old file or a complete new one; what a killed process left goes with the next that saves
    prompts   a prompts file that is started again draws what is missing, and nothing that is there is spoilt

SIGKILL, SIGTERM and SIGHUP take turns; after the latter two no temporary file is left and the exit code is 137, 143 or
129 (or 0: it was done).  Needs the bundle of scripts/demo.  Exit code 1: something was wrong.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image
from sd_runtime.bundle.bundle import Bundle
from sd_runtime.errors import BundleError

REPOSITORY = Path(__file__).resolve().parents[1]
DEMO = REPOSITORY / "out/demo-bundle"
EXPORT = "import sys; from sd_export.cli import main; sys.exit(main())"
RUN = "import sys; from sd_runtime.cli.run import main; sys.exit(main())"
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP)


class WrongError(Exception):
    """What was left is not what may be left."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND")
    parser.add_argument("--minutes", type=float, default=5.0, metavar="N", help="in all (default: 5)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    if not DEMO.is_dir():
        parser.error("the demo model is not exported yet: run scripts/demo")
    if unknown := set(args.kinds) - set(KINDS):
        parser.error(f"no kind {unknown.pop()}; there are {', '.join(KINDS)}")
    kinds, chance, wrong = args.kinds or [*KINDS], random.Random(args.seed), 0
    for kind in kinds:
        with tempfile.TemporaryDirectory() as place:
            try:
                kills = KINDS[kind](Path(place), chance, 60 * args.minutes / len(kinds))
                print(f"{kind}: {kills} kills, nothing wrong", flush=True)
            except WrongError as error:
                print(f"{kind}: {error}", file=sys.stderr, flush=True)
                wrong += 1
    return 1 if wrong else 0


def kill(command: list[str], most: float, chance: random.Random) -> tuple[int, signal.Signals]:
    """Start a program and kill it within `most` seconds; its exit code, and the signal."""
    how = chance.choice(SIGNALS)
    process = subprocess.Popen(
        [sys.executable, "-c", *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=REPOSITORY
    )
    try:
        process.wait(chance.uniform(0, most))
    except subprocess.TimeoutExpired:
        process.send_signal(how)
    code = process.wait(120)
    if code not in (0, -how, 128 + how):
        raise WrongError(f"exit code {code} after {how.name}")
    return code, how


def leftovers(folder: Path) -> list[str]:
    return sorted(
        path.name for path in folder.iterdir() if path.name.startswith(".") and not path.name.endswith(".lock")
    )


def exports(folder: Path, chance: random.Random, seconds: float) -> int:
    target, kills = folder / "bundle", 0
    command = [EXPORT, "--model", "demo", "--output", str(target), "--quiet", "--force", "--no-verify"]
    length, started = _seconds(command), time.monotonic()
    while time.monotonic() - started < seconds:
        precision = chance.choice(("fp32", "fp16"))  # another bundle than the one that is there, half of the time
        _, how = kill([*command, "--precision", precision], length, chance)
        kills += 1
        try:
            Bundle.open(target).verify(Bundle.open(target).manifest.files)
        except BundleError as error:
            raise WrongError(f"after {how.name}: {error}") from error
        if how is not signal.SIGKILL and leftovers(folder):
            raise WrongError(f"{how.name} left {leftovers(folder)}")
    _run(command)
    if leftovers(folder):
        raise WrongError(f"the next export left {leftovers(folder)}")
    return kills


def saves(folder: Path, chance: random.Random, seconds: float) -> int:
    picture, kills = folder / "x.png", 0
    command = [RUN, "a star", f"--model={DEMO}", "--steps=2", f"--output={picture}", "--overwrite", "--quiet"]
    length, started = _seconds(command), time.monotonic()
    while time.monotonic() - started < seconds:
        _, how = kill([*command, f"--seed={kills}"], 1.2 * length, chance)
        kills += 1
        _complete(picture, how)
        if how is not signal.SIGKILL and leftovers(folder):
            _run(command)  # what an earlier one left
            if leftovers(folder):
                raise WrongError(f"{how.name} left {leftovers(folder)}")
    return kills


def prompts(folder: Path, chance: random.Random, seconds: float) -> int:
    lines, kills, started = folder / "lines.txt", 0, time.monotonic()
    lines.write_text("".join(f"a star, number {number}\n" for number in range(12)))
    while time.monotonic() - started < seconds:
        out = folder / f"round-{kills}"
        out.mkdir()
        pattern = f"--output={out}/p-{{index}}.png"
        command = [RUN, f"--prompts-file={lines}", f"--model={DEMO}", "--steps=2", "--seed=1", pattern, "--quiet"]
        for _ in range(3):
            _, how = kill(command, 2.0, chance)
            kills += 1
            for picture in out.glob("p-*.png"):
                _complete(picture, how)
        _run(command)
        if len(list(out.glob("p-*.png"))) != 12 or leftovers(out):
            raise WrongError(f"started again: {sorted(path.name for path in out.iterdir())}")
    return kills


def _complete(picture: Path, how: signal.Signals) -> None:
    """WrongError: a picture that is there and cannot be read to its end."""
    if picture.exists():
        try:
            with Image.open(picture) as image:
                image.load()
        except OSError as error:
            raise WrongError(f"after {how.name}: {picture.name} is not whole ({error})") from error


def _seconds(command: list[str]) -> float:
    started = time.monotonic()
    _run(command)
    return time.monotonic() - started


def _run(command: list[str]) -> None:
    subprocess.run([sys.executable, "-c", *command], check=True, cwd=REPOSITORY, capture_output=True)


KINDS: dict[str, Callable[[Path, random.Random, float], int]] = {"export": exports, "save": saves, "prompts": prompts}

if __name__ == "__main__":
    sys.exit(main())
