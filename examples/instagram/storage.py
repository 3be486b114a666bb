"""Where the application meets its storage: the lines that differ between one database and many.

`SHARDKIT_CATALOG` names the catalog of a sharded cluster, `DATABASE_URL` one plain database.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, TypeVar

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session

import shardkit

P = ParamSpec("P")
T = TypeVar("T")


class Storage:
    """Runs operations, each in a transaction of its own, which is run again after what passes.

    ``close`` closes its connections.
    """

    def __init__(
        self, sessions: async_sessionmaker[Any], close: Callable[[], Coroutine[Any, Any, None]]
    ) -> None:
        self.close = close
        self._retrying = shardkit.retrying(sessions)

    async def run(
        self, operation: Callable[Concatenate[Session, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """What an operation returns, committed."""

        @self._retrying
        async def unit(session: AsyncSession) -> T:
            return await session.run_sync(operation, *args, **kwargs)

        return await unit()


def sharded(catalog_url: str) -> Storage:
    """Over the shards of a catalog."""
    cluster = shardkit.connect(catalog_url)

    async def close() -> None:
        await cluster.adispose()
        cluster.dispose()

    return Storage(cluster.async_sessionmaker(mode="two_phase", expire_on_commit=False), close)


def plain(url: str) -> Storage:
    """On one database."""
    engine = create_async_engine(driver_url(url))
    return Storage(async_sessionmaker(engine, expire_on_commit=False), engine.dispose)


def driver_url(url: str) -> str:
    """A URL as libpq has it, as SQLAlchemy wants it."""
    return url.replace("postgresql://", "postgresql+psycopg://", 1)


def from_environment() -> Storage:
    """What the environment names."""
    catalog, database = os.environ.get("SHARDKIT_CATALOG"), os.environ.get("DATABASE_URL")
    if catalog:
        return sharded(catalog)
    if database:
        return plain(database)
    raise LookupError(
        "Set SHARDKIT_CATALOG to the URL of a catalog, or DATABASE_URL to that of one database."
    )
