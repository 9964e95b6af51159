"""Errors on a command line: one line on stderr, the right exit code, a traceback only on request."""

from __future__ import annotations

import subprocess
import sys

import pytest
from sd_runtime.console import run
from sd_runtime.errors import EngineError, OutOfMemoryError, UsageError


def raising(error: BaseException) -> int:
    def command() -> None:
        raise error

    return run("sd-test", command)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UsageError("width", got=513, accepted="multiples of 8"), 2, "width: got 513, accepted multiples of 8"),
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
from sd_runtime.console import run
sys.exit(run("sd-test", lambda: [print("x" * 1000) for _ in range(10_000)]))
"""


def test_a_reader_that_goes_away_is_no_error() -> None:
    with subprocess.Popen([sys.executable, "-c", CHATTY], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as chatty:
        assert chatty.stdout is not None and chatty.stderr is not None
        chatty.stdout.readline()
        chatty.stdout.close()
        assert chatty.wait(10) == 141
        assert chatty.stderr.read() == b""
