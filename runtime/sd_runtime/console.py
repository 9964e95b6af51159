"""What every command line here shares: an error is one line on stderr and an exit code, never a traceback.

    0    done                       1    it failed                   130  interrupted (Ctrl-C)
    2    it was used wrongly        141  the reader of our output went away (SIGPIPE)

SD_DEBUG=1 in the environment shows the traceback of any error.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from .errors import SDError, one_line
from .notices import muted

DEBUG_VARIABLE = "SD_DEBUG"
INTERRUPTED, BROKEN_PIPE = 128 + 2, 128 + 13


def run(program: str, command: Callable[[], None]) -> int:
    """Run `command` and return the process's exit code; whatever it raises is reported on stderr under `program`."""
    try:
        command()
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        return _fail(program, "interrupted", INTERRUPTED)
    except BrokenPipeError:
        # The interpreter flushes stdout once more at exit; let that go nowhere instead of failing again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except SDError as error:
        return _fail(program, one_line(str(error), limit=2000), error.exit_code)
    except MemoryError:
        return _fail(program, "out of memory", 1)
    except Exception as error:
        what = f"{type(error).__name__}: {one_line(str(error), limit=400)}"
        return _fail(program, f"unexpected error: {what} (set {DEBUG_VARIABLE}=1 to see the traceback)", 1)


def run_parsed(
    program: str,
    parser: Callable[[], argparse.ArgumentParser],
    command: Callable[[argparse.Namespace], None],
    argv: Sequence[str] | None,
) -> int:
    """`run` for a command of what `parser` makes of `argv`; its flag --quiet mutes notices, too."""

    def parsed() -> None:
        args = parser().parse_args(argv)
        with muted(args.quiet):
            command(args)

    return run(program, parsed)


def _fail(program: str, message: str, code: int) -> int:
    """Say `message` on stderr, with the traceback first if the user asked for it."""
    if os.environ.get(DEBUG_VARIABLE, "") not in ("", "0"):
        traceback.print_exc()
    print(f"{program}: {message}", file=sys.stderr)
    return code
