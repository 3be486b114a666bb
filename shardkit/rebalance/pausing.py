"""The ear of a mover: learns from the catalog that the operator, in another terminal, wants it to stop.

A thread with a connection of its own beside the transfers. It sets the same event as a signal does, so a pause ends
between two steps like a stop; what it was is in `paused`.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from types import TracebackType
from typing import Self

import psycopg

from shardkit.core.errors import CatalogUnreachable
from shardkit.storage.catalog import Catalog

POLL = 0.25
"""Seconds between two looks."""


class Ear:
    """Listens while a job is carried. A context manager."""

    def __init__(self, catalog_url: str, job_id: int, stop: threading.Event) -> None:
        self._url = catalog_url
        self._job = job_id
        self._stop = stop
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="mover's ear", daemon=True)
        self.paused = False

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.set()
        self._thread.join()

    def _listen(self) -> None:
        while not self._ending.is_set():
            # A catalog that is away is the transfers' matter; who pauses then has to wait for it too.
            with suppress(CatalogUnreachable, psycopg.Error), Catalog.open(self._url) as catalog:
                while not self._ending.wait(POLL):
                    if catalog.is_paused(self._job):
                        self.paused = True
                        self._stop.set()
                        return
            self._ending.wait(POLL)
