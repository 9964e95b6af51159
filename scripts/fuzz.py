#!/usr/bin/env python3
"""Feed the readers of files, pictures and prompts with what they should refuse, for as long as one likes.

    scripts/fuzz                        # every target, a minute each
    scripts/fuzz --minutes 60           # an hour in all, shared by the targets
    scripts/fuzz --minutes 5 prompt     # one of them; --list names them
    scripts/fuzz --minutes 5 --atheris graph    # by coverage, of a target that takes bytes: pip install atheris

A failing input is made as small as it can be, printed with its traceback, and saved in --save (default: fuzz-failures).
Other seeds each time.  Exit code 1: something was found.  The tokenizer has a fuzzer against transformers besides:
scripts/fuzz_tokenizer.py.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from fuzz_targets import TARGETS, Target, named
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import HypothesisException

BATCH = 300  # examples between two looks at the clock


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET")
    parser.add_argument("--minutes", type=float, metavar="N", help="in all (default: one for each target)")
    parser.add_argument("--save", type=Path, default=Path("fuzz-failures"), metavar="DIR")
    parser.add_argument("--atheris", action="store_true", help="guide by coverage; one target, which takes bytes")
    parser.add_argument("--list", action="store_true", help="name the targets and end")
    args = parser.parse_args(arguments)
    if args.list:
        print("\n".join(TARGETS))
        return 0
    try:
        targets = named(args.targets)
    except KeyError as error:
        parser.error(f"no target {error}; there are {', '.join(TARGETS)}")
    seconds = 60 * (len(targets) if args.minutes is None else args.minutes) / len(targets)
    if args.atheris:
        return by_coverage(targets, seconds)
    found = sum(run(target, seconds, args.save) for target in targets)
    return 1 if found else 0


def run(target: Target, seconds: float, save: Path) -> int:
    """Random examples until the time is up; the number of failures, at most one."""
    started, count = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)

        last: list[Any] = []  # the input that failed, after it was made smaller

        def check(value: Any) -> None:
            nonlocal count
            count += 1
            last[:] = [value]
            with np.errstate(all="ignore"):
                target.check(value, folder)

        batch = settings(
            max_examples=BATCH,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate, Phase.shrink),
        )
        fuzzed = batch(given(target.inputs())(check))
        try:
            while time.monotonic() - started < seconds:
                fuzzed()
        except HypothesisException:  # of the strategy, not of the reader
            raise
        except Exception:
            report(target, last[0], save)
            return 1
    print(f"{target.name}: {count} inputs in {time.monotonic() - started:.0f} s, all taken or refused", flush=True)
    return 0


def report(target: Target, value: Any, save: Path) -> None:
    """Print what was found, and keep the input."""
    data = value if isinstance(value, bytes) else repr(value).encode("utf-8", "backslashreplace")
    save.mkdir(parents=True, exist_ok=True)
    path = save / f"{target.name.replace(' ', '-')}-{hashlib.sha256(data).hexdigest()[:12]}"
    path.write_bytes(data)
    print(f"{target.name}: {path}\n{traceback.format_exc()}", file=sys.stderr, flush=True)


def by_coverage(targets: Sequence[Target], seconds: float) -> int:
    """Coverage-guided, by atheris, which ends the process itself."""
    try:
        import atheris
    except ImportError:
        print("scripts/fuzz: --atheris needs the package atheris: pip install atheris", file=sys.stderr)
        return 2
    (target,) = targets
    with tempfile.TemporaryDirectory() as place:
        atheris.instrument_all()
        atheris.Setup([sys.argv[0], f"-max_total_time={seconds:.0f}"], lambda data: target.check(data, Path(place)))
        atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
