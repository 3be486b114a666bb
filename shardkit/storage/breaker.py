"""The circuit breaker of a shard: whether it is worth asking.

After some failures in a row nobody waits for the shard any more: all are told at once that it does not answer. After a
delay one caller is let through to try; what that one finds holds for all. Driven by `orm.transaction`, one for each
shard and kind of engine. Knows no connection; safe between threads, and never waits, so between tasks as well.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from shardkit.core.errors import ShardUnreachable

FAILURES = 5
SECONDS = 1.0

Clock = Callable[[], float]


class Breaker:
    """Open after ``failures`` in a row, for ``seconds`` until the next probe. Every `admit` is followed by one of
    `succeeded`, `failed` and `gave_up`."""

    def __init__(
        self, name: str, *, failures: int = FAILURES, seconds: float = SECONDS, clock: Clock = time.monotonic
    ) -> None:
        self._name = name
        self._limit = failures
        self._seconds = seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._failures = 0
        self._shut_until = 0.0
        self._probing = False

    def admit(self) -> None:
        """Pass, or `ShardUnreachable` at once."""
        if self._failures < self._limit:
            return
        with self._lock:
            if self._passes():
                return
            left = self._shut_until - self._clock()
            when = "is being tried again now" if self._probing else f"is tried again in {left:.1f} s"
            raise ShardUnreachable(
                f"Shard {self._name} does not answer: it failed {self._failures} times in a row and {when}.",
                shard=self._name,
            )

    def _passes(self) -> bool:
        if self._failures < self._limit:
            return True
        if self._probing or self._clock() < self._shut_until:
            return False
        self._probing = True
        return True

    def succeeded(self) -> None:
        """The shard answered, if only to refuse."""
        if not self._failures:
            return
        with self._lock:
            self._failures = 0
            self._probing = False

    def failed(self) -> None:
        """The shard did not answer."""
        with self._lock:
            self._failures += 1
            self._probing = False
            if self._failures >= self._limit:
                self._shut_until = self._clock() + self._seconds

    def gave_up(self) -> None:
        """The caller was interrupted before it knew; another may try."""
        with self._lock:
            self._probing = False
