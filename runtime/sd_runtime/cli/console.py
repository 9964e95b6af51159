"""What every command line here shares: an error is one line on stderr and an exit code, never a traceback.

    0    done                       1    it failed                   130  interrupted (Ctrl-C)
    2    it was used wrongly        141  the reader of our output went away (SIGPIPE)
    129  SIGHUP: the terminal was closed                             143  SIGTERM

These two signals end the work as Ctrl-C does, so that temporary files go; a second one ends the process at once.
SD_DEBUG=1 in the environment shows the traceback of any error.
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TextIO

from ..errors import SDError, one_line, printable
from ..notices import muted
from .flags import in_flags

DEBUG_VARIABLE = "SD_DEBUG"
INTERRUPTED, BROKEN_PIPE = 128 + 2, 128 + 13


def run(program: str, command: Callable[[], None], names: Mapping[str, str] | None = None) -> int:
    """Run `command` and return the process's exit code; whatever it raises is reported on stderr under `program`, with
    arguments called as its command line calls them: `names`, else the flags of their names."""
    _prepare_streams()
    received: list[int] = []
    try:
        with _stoppable(received):
            command()
            with stdout_errors():
                sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        if received:
            return _fail(program, f"stopped by {signal.Signals(received[0]).name}", 128 + received[0])
        return _fail(program, "interrupted", INTERRUPTED)
    except BrokenPipeError:
        _discard(sys.stdout)
        return BROKEN_PIPE
    except SDError as error:
        return _fail(program, one_line(in_flags(error, names), limit=2000), error.exit_code)
    except MemoryError:
        return _fail(program, "out of memory", 1)
    except Exception as error:
        what = f"{type(error).__name__}: {one_line(str(error), limit=400)}"
        return _fail(program, f"unexpected error: {what} (set {DEBUG_VARIABLE}=1 to see the traceback)", 1)
    finally:
        try:
            sys.stderr.flush()
        except OSError:
            _discard(sys.stderr)


@contextmanager
def _stoppable(received: list[int]) -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise KeyboardInterrupt, and note which it was.

    Not where our caller ignores them, as nohup does, or has its own way with them."""

    def stop(number: int, _: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)
        raise KeyboardInterrupt

    numbers = [number for name in ("SIGTERM", "SIGHUP") if (number := getattr(signal, name, None)) is not None]
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    handled = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]
    try:
        for number in handled:
            signal.signal(number, stop)
        yield
    finally:
        for number in handled:
            signal.signal(number, signal.SIG_DFL)


def run_parsed(
    program: str,
    parser: Callable[[], argparse.ArgumentParser],
    command: Callable[[argparse.Namespace], None],
    argv: Sequence[str] | None,
    names: Mapping[str, str] | None = None,
) -> int:
    """`run` for a command of what `parser` makes of `argv`; its flag --quiet mutes notices, too."""

    def parsed() -> None:
        args = parser().parse_args(argv)
        with muted(args.quiet), warnings_in_lines(program, args.quiet):
            command(args)

    return run(program, parsed, names)


@contextmanager
def stdout_errors() -> Iterator[None]:
    """Around writing to stdout.  SDError: it cannot be written; what follows is dropped, so that this is said once."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        _discard(sys.stdout)
        raise SDError(f"stdout cannot be written: {error.strerror}") from error


def tell(message: str) -> None:
    """Write a line to stderr; where that fails, nobody listens, and the work goes on."""
    with suppress(OSError):
        print(printable(message), file=sys.stderr)


def say(line: object) -> None:
    """Write a line to stdout, at once.  SDError: it cannot be written."""
    with stdout_errors():
        print(printable(str(line)), flush=True)


@contextmanager
def warnings_in_lines(program: str, quiet: bool) -> Iterator[None]:
    """Python's warnings, which libraries raise over files, as lines of `program`; none of them if `quiet`."""

    def show(message: Warning | str, category: type[Warning], *place: object, **line: object) -> None:
        tell(f"{program}: {category.__name__}: {message}")

    with warnings.catch_warnings():
        if quiet:
            warnings.simplefilter("ignore")
        warnings.showwarning = show
        yield


def _prepare_streams() -> None:
    """Let every name be printed, and everything go nowhere that goes to a stream that our caller closed."""
    if sys.stdout is None or sys.stderr is None:
        # The next file to be opened would get the number of the closed stream, and what libraries write to that one.
        while (nowhere := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        sys.stdout = sys.stdout or os.fdopen(nowhere, "w", closefd=False)
        sys.stderr = sys.stderr or os.fdopen(nowhere, "w", closefd=False)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _discard(stream: TextIO) -> None:
    """The interpreter flushes its streams once more at exit; let that go nowhere instead of failing again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _fail(program: str, message: str, code: int) -> int:
    """Say `message` on stderr, with the traceback first if the user asked for it."""
    if os.environ.get(DEBUG_VARIABLE, "") not in ("", "0"):
        for line in traceback.format_exc().splitlines():
            tell(line)
    tell(f"{program}: {message}")
    return code
