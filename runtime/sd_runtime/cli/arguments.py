"""argparse whose complaints are ours: a UsageError (one line, exit code 2) instead of a page of usage."""

from __future__ import annotations

import argparse
from typing import NoReturn

from ..errors import UsageError


class ArgumentParser(argparse.ArgumentParser):
    """Abbreviated flags are refused, so that a flag added later can never change what a script means."""

    def __init__(self, program: str, description: str, epilog: str = "") -> None:
        super().__init__(
            prog=program,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, remedy=f"see {self.prog} --help")
