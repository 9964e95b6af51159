"""What a user should know although it is no error: on stderr, unless the program sets up logging otherwise."""

from __future__ import annotations

LOGGER = "sd_runtime"


def warn(message: str) -> None:
    import logging  # which few programs that import us need

    logging.getLogger(LOGGER).warning(message)
