"""How long calls take, by stage: a hint for the report; sd-bench measures."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
QUICK = 0.25  # seconds below which a call is made once more, for the first often prepares something


class Stopwatch:
    """`seconds` holds the fastest call of each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, stage: str, call: Callable[[], T], *, again: bool = True) -> T:
        """What `call` returns; with `again`, a quick call is repeated once."""
        started = time.perf_counter()
        result = call()
        took = time.perf_counter() - started
        self.seconds[stage] = min(took, self.seconds.get(stage, took))
        return self(stage, call, again=False) if again and took < QUICK else result
