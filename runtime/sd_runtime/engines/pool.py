"""What was set up for one shape, kept for the next request of that shape."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar

from ..errors import EngineError, OutOfMemoryError


class Closable(Protocol):
    def close(self) -> None: ...


K = TypeVar("K", bound=Hashable)
T = TypeVar("T", bound=Closable)


class Pool(Generic[K, T]):
    """Things that one request at a time may use, by key; several of one key where requests overlap.

    At most `idle` of them are kept while nobody uses them: the ones used last.
    """

    def __init__(self, build: Callable[[K], T], idle: int) -> None:
        self._build, self._limit = build, idle
        self._idle: list[tuple[K, T]] = []
        self._lock = threading.Lock()
        self._closed = False

    @contextmanager
    def borrowed(self, key: K) -> Iterator[T]:
        """One for `key`, given back afterwards; after an EngineError it is in an unknown state and closed instead."""
        thing = self._take(key)
        try:
            yield thing
        except EngineError:
            thing.close()
            raise
        except BaseException:  # the request was cancelled, say: that does no harm
            self._give_back(key, thing)
            raise
        self._give_back(key, thing)

    def _take(self, key: K) -> T:
        with self._lock:
            if self._closed:
                raise EngineError("the pipeline was closed")
            for place in reversed(range(len(self._idle))):
                if self._idle[place][0] == key:
                    return self._idle.pop(place)[1]
        try:
            return self._build(key)
        except OutOfMemoryError:
            if not self._drop(keep=0):
                raise
            return self._build(key)

    def _give_back(self, key: K, thing: T) -> None:
        with self._lock:
            self._idle.append((key, thing))
        self._drop(keep=0 if self._closed else self._limit)

    def _drop(self, keep: int) -> int:
        """Close the idle things that were used longest ago; how many there were."""
        with self._lock:
            count = max(len(self._idle) - keep, 0)
            dropped, self._idle = self._idle[:count], self._idle[count:]
        for _, thing in dropped:
            thing.close()
        return count

    def close(self) -> None:
        """Close what is idle now, and what is in use as it comes back."""
        with self._lock:
            self._closed = True
        self._drop(keep=0)
