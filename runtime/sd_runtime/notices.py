"""What a user should know although it is no error: on stderr, unless the program sets up logging otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .errors import printable

LOGGER = "sd_runtime"


def warn(message: str) -> None:
    """Say `message`, in one line."""
    import logging  # which few programs that import us need

    logging.getLogger(LOGGER).warning("%s", printable(message))


@contextmanager
def muted(quiet: bool) -> Iterator[None]:
    """Drop what `warn` says meanwhile, if `quiet`."""
    import logging

    logger = logging.getLogger(LOGGER)
    before = logger.level
    if quiet:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
