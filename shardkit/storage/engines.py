"""Engines of an application: one pool a shard and replica, guarded, and one for the catalog.

`Engines` makes them when first asked for, sync or async; both kinds are driven through SQLAlchemy's sync facade, the
async one inside SQLAlchemy's greenlets. It reads topologies for the router, and never writes.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from uuid import UUID

import psycopg
from sqlalchemy import Engine, create_engine, event, text
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool
from sqlalchemy.util.concurrency import await_

from shardkit.core.errors import ShardkitError, ShardUnreachable
from shardkit.core.topology import Shard, Topology

from .breaker import FAILURES, SECONDS, Breaker
from .dialect import DRIVER, READ_IDENTITY, unfenced
from .identity import ShardIdentity
from .snapshots import Source
from .topologies import READ_COPY, READ_CURRENT
from .urls import sqlalchemy_url

_CONNECT_SECONDS = 10
"""For shards, where nobody says otherwise: libpq alone would wait for minutes."""

_CATALOG_CONNECT_SECONDS = 3
"""A router asks the catalog while an application waits; the copies on the shards answer as well."""


class Engines:
    """The engines of one process and kind. Safe to share between threads; not across a fork or event loops."""

    def __init__(
        self,
        catalog_url: str,
        *,
        cluster: UUID | None = None,
        is_async: bool = False,
        options: Mapping[str, Any] | None = None,
        breaker_failures: int = FAILURES,
        breaker_seconds: float = SECONDS,
    ) -> None:
        self.is_async = is_async
        self._breakers: dict[tuple[int, str], Breaker] = {}
        self._breaker_failures = breaker_failures
        self._breaker_seconds = breaker_seconds
        self._catalog_url = catalog_url
        self._cluster = cluster
        self._options = dict(options or {})
        self._shards: dict[tuple[int, str], Engine] = {}
        self._readers: dict[tuple[int, str], Engine] = {}
        self._identities: dict[tuple[int, str], ShardIdentity] = {}
        self._turns: dict[int, Iterator[int]] = {}
        self._catalog: Engine | None = None
        self._lock = threading.Lock()

    def shard(self, shard: Shard) -> Engine:
        """The engine of a shard; one for each URL that it has had."""
        return self._engine(shard, shard.url, f"Shard {shard.name}")

    def _engine(self, shard: Shard, url: str, called: str) -> Engine:
        known = self._shards.get((shard.id, url))
        if known is not None:
            return known
        with self._lock:
            known = self._shards.get((shard.id, url))
            if known is None:
                known = self._shards[shard.id, url] = self._make(shard, url, called)
        return known

    def sources(self, shard: Shard) -> list[Source]:
        """The replicas of a shard, each time another one first."""
        listed = [Source(url, is_replica=True) for url in shard.replicas]
        # Of several threads that make a counter, one wins; and each count is given out once.
        turn = next(self._turns.setdefault(shard.id, itertools.count()))
        first = turn % len(listed) if listed else 0
        return listed[first:] + listed[:first]

    def reader(self, shard: Shard, source: Source) -> Engine:
        """The engine for reads that may be old. On the shard itself it has the same pool, and is another to a session,
        so that these reads are transactions of their own."""
        if source.is_replica:
            return self._engine(shard, source.url, f"The {source} of shard {shard.name}")
        known = self._readers.get((shard.id, source.url))
        if known is None:
            known = self._readers.setdefault((shard.id, source.url), self.shard(shard).execution_options())
        return known

    def breaker(self, shard: Shard, source: Source | None = None) -> Breaker:
        """The breaker of a shard, or of one of its replicas; one for each URL that it has had."""
        url = shard.url if source is None else source.url
        known = self._breakers.get((shard.id, url))
        if known is None:
            # Of several threads that make one, one wins: setdefault is atomic.
            name = shard.name if url == shard.url else f"{shard.name} ({source})"
            made = Breaker(name, failures=self._breaker_failures, seconds=self._breaker_seconds)
            known = self._breakers.setdefault((shard.id, url), made)
        return known

    def identity(self, shard: Shard) -> ShardIdentity:
        """What the database of a shard must say it is."""
        known = self._identities.get((shard.id, shard.name))
        if known is None:
            made = ShardIdentity(shard.id, shard.name, self._cluster)
            known = self._identities.setdefault((shard.id, shard.name), made)
        return known

    def _make(self, shard: Shard, stored: str, called: str) -> Engine:
        options = dict(self._options)
        url = sqlalchemy_url(stored).set(drivername=DRIVER)
        arguments: dict[str, Any] = {"fallback_application_name": "shardkit"}
        if "connect_timeout" not in url.query and "PGCONNECT_TIMEOUT" not in os.environ:
            arguments["connect_timeout"] = _CONNECT_SECONDS
        options["connect_args"] = {**arguments, **options.get("connect_args", {})}
        identity = self.identity(shard)
        if self.is_async:
            engine = create_async_engine(url, shard=identity, **options).sync_engine
        else:
            engine = create_engine(url, shard=identity, **options)
        event.listen(engine, "handle_error", _naming_the_lost(shard.name, called))
        return engine

    def pause(self, seconds: float) -> None:
        """Let time pass for whoever calls: this thread, or this task alone."""
        if self.is_async:
            await_(asyncio.sleep(seconds))
        else:
            time.sleep(seconds)

    def run(self, outcome: Any) -> None:
        """Finish what a method of a guarded connection began: nothing if it is sync, awaited if it is not."""
        if self.is_async:
            await_(outcome)

    # --- reading topologies ----------------------------------------------------------------------------------------

    def read_current(self) -> Topology | None:
        """What the catalog holds to be current; None if it cannot be asked, or is another cluster's."""
        try:
            with self._catalog_engine().connect() as connection:
                document = connection.execute(text(READ_CURRENT)).scalar()
                cluster = connection.execute(text("SELECT id FROM shardkit.cluster")).scalar()
        except SQLAlchemyError:
            return None
        if document is None or self._cluster not in (None, cluster):
            return None
        return Topology.from_json(document)

    def read_copy(self, shard: Shard) -> Topology | None:
        """The copy that a shard holds; None if it cannot be asked, or is another cluster's."""
        try:
            with unfenced(), self.shard(shard).connect() as connection:
                document = connection.execute(text(READ_COPY)).scalar()
                self.identity(shard).check(*connection.execute(text(READ_IDENTITY)).one())
        except (SQLAlchemyError, ShardkitError):
            return None
        return Topology.from_json(document) if document is not None else None

    def _catalog_engine(self) -> Engine:
        with self._lock:
            if self._catalog is None:
                url = sqlalchemy_url(self._catalog_url)
                arguments = {
                    "connect_timeout": _CATALOG_CONNECT_SECONDS,
                    "fallback_application_name": "shardkit",
                }
                if self.is_async:
                    self._catalog = create_async_engine(
                        url, poolclass=NullPool, connect_args=arguments
                    ).sync_engine
                else:
                    self._catalog = create_engine(url, poolclass=NullPool, connect_args=arguments)
            return self._catalog

    def dispose(self) -> None:
        """Close the idle connections of all pools; engines are made again when they are asked for."""
        with self._lock:
            engines = list(self._shards.values())
            self._shards.clear()
            self._readers.clear()
        for engine in engines:
            engine.dispose()


def _naming_the_lost(name: str, called: str) -> Callable[[ExceptionContext], ShardUnreachable | None]:
    """A listener for connections lost in a statement: the shard by its name, and that nothing was committed."""

    def name_the_lost(context: ExceptionContext) -> ShardUnreachable | None:
        if not context.is_disconnect or context.statement is None or context.engine is None:
            return None
        if not isinstance(context.original_exception, psycopg.Error):
            return None  # an interruption, after which the connection is given up as well
        reason = (str(context.original_exception).strip().splitlines() or [""])[0]
        return ShardUnreachable(
            f"{called} was lost under a transaction, of which nothing was committed: {reason}",
            hint="Roll back and run the unit of work again.",
            shard=name,
        )

    return name_the_lost
