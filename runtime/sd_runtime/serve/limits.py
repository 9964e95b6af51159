"""What a service takes on, and how it says that it is."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UsageError


@dataclass(frozen=True)
class Limits:
    """What a service takes on.

    requests    in the service at once; more are refused with the time after which to try again
    rows        of the UNet in one evaluation; None: as many as it takes
    hang_after  seconds after which an evaluation that has not come back is taken to hang
    """

    requests: int = 64
    rows: int | None = None
    hang_after: float = 60.0

    def __post_init__(self) -> None:
        for name, least in (("requests", 1), ("rows", 2), ("hang_after", 0.001)):
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise UsageError(name, got=value, accepted=f"{least} or more")


@dataclass(frozen=True)
class Status:
    """How a service is: `waiting` and `running` requests, whether new ones are taken, and why not."""

    waiting: int
    running: int
    ready: bool
    why: str = ""
