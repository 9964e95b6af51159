"""Errors on a command line: one line on stderr, the right exit code, a traceback only on request."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from sd_runtime.cli.console import run
from sd_runtime.errors import EngineError, OutOfMemoryError, UsageError


def raising(error: BaseException) -> int:
    def command() -> None:
        raise error

    return run("sd-test", command)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UsageError("width", got=513, accepted="multiples of 8"), 2, "--width: got 513, accepted multiples of 8"),
        (EngineError("no engine"), 1, "no engine"),
        (OutOfMemoryError("GPU memory ran out"), 1, "GPU memory ran out"),
        (MemoryError(), 1, "out of memory"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (EngineError("two\nlines"), 1, r"two\nlines"),
        (ValueError("boom"), 1, "unexpected error: ValueError: boom (set SD_DEBUG=1 to see the traceback)"),
    ],
)
def test_one_line_and_a_code(capsys: pytest.CaptureFixture[str], error: BaseException, code: int, line: str) -> None:
    assert raising(error) == code
    assert capsys.readouterr() == ("", f"sd-test: {line}\n")


def test_success(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("sd-test", lambda: print("done")) == 0
    assert capsys.readouterr() == ("done\n", "")


@pytest.mark.parametrize(("value", "shown"), [("1", True), ("0", False), ("", False)])
def test_traceback_on_request(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, value: str, shown: bool
) -> None:
    monkeypatch.setenv("SD_DEBUG", value)
    raising(ValueError("boom"))
    assert ("Traceback" in capsys.readouterr().err) is shown


def test_exit_of_argparse_passes() -> None:
    with pytest.raises(SystemExit):
        raising(SystemExit(0))


CHATTY = """
import sys
from sd_runtime.cli.console import run
sys.exit(run("sd-test", lambda: [print("x" * 1000) for _ in range(10_000)]))
"""


def test_a_reader_that_goes_away_is_no_error() -> None:
    with subprocess.Popen([sys.executable, "-c", CHATTY], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as chatty:
        assert chatty.stdout is not None and chatty.stderr is not None
        chatty.stdout.readline()
        chatty.stdout.close()
        assert chatty.wait(10) == 141
        assert chatty.stderr.read() == b""


SAY = (
    "import os, sys; from sd_runtime.cli.console import run, stdout_errors, tell\nsys.exit(run('sd-test', lambda: {}))"
)


def shell(redirection: str, command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A program whose command is the expression `command`, started by a shell with a redirection."""
    arguments = ["sh", "-c", f'exec "$0" -W error -c "$1" {redirection}', sys.executable, SAY.format(command)]
    environment = os.environ | {"PYTHONUNBUFFERED": ""} | environment
    return subprocess.run(arguments, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_error(closed: str, tmp_path: Path) -> None:
    """And what goes to their numbers does not end in a file that was opened since."""
    path = tmp_path / "picture"
    command = (
        f"[print('out', flush=True), tell('err'), sys.stderr.isatty(), file := open({str(path)!r}, 'w'),"
        " os.write(1, b'x'), os.write(2, b'x'), file.close()]"
    )
    done = shell(closed, command)
    assert done.returncode == 0
    assert done.stdout == ("" if closed.count(">&-") > closed.count("2>&-") else "out\nx")
    assert done.stderr == ("" if "2>&-" in closed else "err\nx")
    assert path.read_bytes() == b""


def test_a_closed_stderr_keeps_the_exit_code() -> None:
    assert shell("2>&-", "1 / 0").returncode == 1


@pytest.mark.parametrize("encoding", ["ascii", "ascii:strict", "latin-1"])
def test_any_name_can_be_printed(encoding: str) -> None:
    done = shell("", r"[print('\u2605'), tell('\u2605')]", PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\\u2605\n", "\\u2605\n")


full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full")


@full
@pytest.mark.parametrize("command", ["print(1)", "exec('with stdout_errors(): print(1, flush=True)')"])
def test_stdout_on_a_full_disk(command: str) -> None:
    done = shell(">/dev/full", command)
    assert done.returncode == 1
    assert done.stderr == "sd-test: stdout cannot be written: No space left on device\n"


@full
@pytest.mark.parametrize(("variable", "value"), [("SD_DEBUG", ""), ("SD_DEBUG", "1")])
def test_stderr_on_a_full_disk_keeps_the_exit_code(variable: str, value: str) -> None:
    usage = "exec('from sd_runtime.errors import UsageError; raise UsageError(chr(97))')"
    assert shell("2>/dev/full", usage, **{variable: value}).returncode == 2
    assert shell("2>/dev/full", "tell('x')", **{variable: value}).returncode == 0
    assert shell("2>/dev/full", "tell('x')", PYTHONUNBUFFERED="1", **{variable: value}).returncode == 0


@full
@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-"])
def test_progress_of_an_export_that_nobody_hears(redirection: str) -> None:
    inside = "from sd_export.progress import Progress\nwith Progress(1) as progress: progress.note(chr(97))"
    assert shell(redirection, f"exec({inside!r})").returncode == 0
    alone = ["sh", "-c", f'exec "$0" -c "$1" {redirection}', sys.executable, f"{inside}\nprint(1)"]
    assert subprocess.run(alone, capture_output=True, text=True).stdout == "1\n"
