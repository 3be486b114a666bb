"""What a running transfer tells: the facts that bars, ``rebalance status`` and ``--json`` are made of."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from shardkit.core.move import Phase, sentence


@dataclass(frozen=True, slots=True)
class Progress:
    """One transfer at one moment.

    Rows and bytes count what the phase does: rows copied while copying, compared while verifying, deleted while
    purging; the expected numbers are the server's estimates. ``rate`` is rows a second of this phase, ``lag_bytes`` the
    WAL that the target has still to apply, ``waiting_for`` the reason of a wait.
    """

    transfer: int
    source: str
    target: str
    phase: Phase
    rows: int = 0
    rows_expected: int = 0
    bytes: int = 0
    bytes_expected: int = 0
    lag_bytes: int | None = None
    waiting_for: str | None = None
    began: float = field(default_factory=time.monotonic)

    @property
    def sentence(self) -> str:
        """What the transfer does now, for an operator."""
        return sentence(self.phase)

    @property
    def rate(self) -> float:
        """Rows a second since the phase began."""
        return self.rows / max(time.monotonic() - self.began, 1e-3)

    @property
    def seconds_left(self) -> float | None:
        """Time left of the phase by rate and estimate; None while there is nothing to judge by."""
        if not self.rows or not self.rows_expected:
            return None
        return max(0, self.rows_expected - self.rows) / max(self.rate, 1e-3)

    def as_dict(self) -> dict[str, Any]:
        """The progress for ``--json``."""
        return {
            "transfer": self.transfer,
            "source": self.source,
            "target": self.target,
            "phase": self.phase.value,
            "sentence": self.sentence,
            "rows": self.rows,
            "rows_expected": self.rows_expected,
            "bytes": self.bytes,
            "bytes_expected": self.bytes_expected,
            "rate": round(self.rate, 1),
            "seconds_left": None if self.seconds_left is None else round(self.seconds_left, 1),
            "lag_bytes": self.lag_bytes,
            "waiting_for": self.waiting_for,
        }


Listener = Callable[[Progress], None]
SECONDS_BETWEEN_REPORTS = 0.5


class Reporter:
    """A listener that passes on what it hears, and lets a transfer's progress be stored, at most once in a while."""

    def __init__(self, listener: Listener, store: Callable[[dict[str, Any]], None]) -> None:
        self._listener = listener
        self._store = store
        self._stored_at: float | None = None
        self._phase: Phase | None = None

    def __call__(self, progress: Progress) -> None:
        """Take the progress of the transfer."""
        self._listener(progress)
        now = time.monotonic()
        due = self._stored_at is None or now - self._stored_at >= SECONDS_BETWEEN_REPORTS
        if due or progress.phase is not self._phase:
            self._stored_at, self._phase = now, progress.phase
            self._store(progress.as_dict())


class Tracker:
    """The progress of one transfer as it goes; tells its listener of every change. Used by one thread."""

    def __init__(self, transfer: int, source: str, target: str, phase: Phase, listener: Listener) -> None:
        self.now = Progress(transfer, source, target, phase)
        self._listener = listener

    def enter(self, phase: Phase, **values: Any) -> None:
        """A phase begins, and counting with it."""
        self.now = replace(
            self.now, phase=phase, rows=0, bytes=0, rows_expected=0, bytes_expected=0, waiting_for=None,
            began=time.monotonic(),
        )  # fmt: skip
        self.update(**values)

    def update(self, **values: Any) -> None:
        """Some values changed."""
        self.now = replace(self.now, **values)
        self._listener(self.now)
