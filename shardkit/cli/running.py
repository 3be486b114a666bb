"""Running a mover from a command: its bars, and a stop by SIGINT or SIGTERM that leaves a job to resume."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, overload

from shardkit.core.errors import MoverStopped
from shardkit.core.move import STILL
from shardkit.rebalance.limits import Limits
from shardkit.rebalance.mover import Mover
from shardkit.rebalance.waiting import Interrupted
from shardkit.storage.catalog import Catalog, Job

from . import jobs
from .bars import Bars

PARALLEL = 2
PATIENCE = 120.0


@overload
def carry(
    catalog_url: str,
    act: Callable[[Mover], Job],
    *,
    parallel: int,
    patience: float,
    limits: Limits | None = None,
) -> dict[str, Any]: ...


@overload
def carry(
    catalog_url: str,
    act: Callable[[Mover], Job | None],
    *,
    parallel: int,
    patience: float,
    limits: Limits | None = None,
) -> dict[str, Any] | None: ...


def carry(
    catalog_url: str,
    act: Callable[[Mover], Job | None],
    *,
    parallel: int,
    patience: float,
    limits: Limits | None = None,
) -> dict[str, Any] | None:
    """Let a mover ``act`` under the lease; the job's document, if there is one. `MoverStopped` if a signal, or
    `rebalance pause`, ended it."""
    with Bars() as bars, _stoppable(bars) as stop:
        mover = Mover(
            catalog_url, parallel=parallel, patience=patience, listener=bars, stop=stop, limits=limits
        )
        try:
            with mover:
                job = act(mover)
            if job is None:
                return None
            # Not by the mover's connection: the catalog's server may have restarted since.
            with Catalog.open(catalog_url) as catalog:
                return {**jobs.describe(catalog, job), "mover": None}
        except Interrupted as error:
            where = [
                f"{progress.source} -> {progress.target} is {progress.phase.value}"
                for progress in bars.latest.values()
                if progress.phase not in STILL
            ]
            raise MoverStopped(
                f"{'Paused' if mover.paused else 'Stopped'} between two steps: "
                f"{', '.join(where) or 'nothing was begun'}.",
                transfers=where,
                paused=mover.paused,
            ) from error


@contextmanager
def _stoppable(bars: Bars) -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; the second ends the process at once."""
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            bars.show_cursor()
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        stop.set()
        bars.say(
            "Stopping after the current step (once more to stop at once; the job can be resumed either way)."
        )

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
