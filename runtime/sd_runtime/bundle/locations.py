"""Where things are kept on this machine: one data directory per user, which SD_LEAN_HOME moves.

$SD_LEAN_HOME, or else the platform's user data directory (on Linux ~/.local/share/sd-lean)
└── bundles/<name>/     what sd-export writes without --output, and where sd-run --model <name> looks
"""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import UsageError

HOME_VARIABLE = "SD_LEAN_HOME"


def data_home() -> Path:
    """The data directory; it need not exist yet.  UsageError: the variable names the home of nobody who is here."""
    if chosen := os.environ.get(HOME_VARIABLE):
        try:
            return Path(chosen).expanduser().absolute()
        except RuntimeError as error:
            accepted = "a folder; there is no user of that name"
            raise UsageError(HOME_VARIABLE, got=chosen, accepted=accepted) from error
    import platformdirs

    return Path(platformdirs.user_data_dir("sd-lean", appauthor=False))


def cache_home() -> Path:
    """Where what can be made again is kept, under the data directory if that was moved; it need not exist yet."""
    if os.environ.get(HOME_VARIABLE):
        return data_home() / "cache"
    import platformdirs

    return Path(platformdirs.user_cache_dir("sd-lean", appauthor=False))


def bundle_home() -> Path:
    """The folder of the user's bundles, one folder a bundle (names that start with a dot are not bundles)."""
    return data_home() / "bundles"
