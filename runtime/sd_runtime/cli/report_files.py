"""Files of reports take the place of the last run's, whole or not at all; devices and pipes are written to."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ..errors import SDError
from ..images.files import check_destination, write_file


def check_report(path: Path) -> None:
    """Raise, before the work, what `write_report` would: a folder's name, a folder that is missing or read-only."""
    if not _is_stream(path):
        check_destination(_target(path), overwrite=True)


def write_report(path: Path, text: str) -> None:
    """Write `text` in UTF-8.  UsageError for an impossible name; SDError for what the system refuses."""
    if not _is_stream(path):
        write_file(_target(path), text.encode(), overwrite=True)
        return
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SDError(f"cannot write '{path}': {error.strerror}") from error


def _is_stream(path: Path) -> bool:
    """/dev/stdout and the like, which nothing may replace."""
    try:
        mode = path.stat().st_mode
    except OSError:  # there is nothing yet, or `check_destination` says what is wrong
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def _target(path: Path) -> Path:
    """What a link leads to, so that the link stays one."""
    return Path(os.path.realpath(path))
