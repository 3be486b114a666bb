"""One unit of work through a sync and through an async session: the same function, run by either."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import pytest

from shardkit import ShardCluster, ShardSession
from shardkit.storage.engines import Engines

Kind = Literal["sync", "async"]
T = TypeVar("T")

both_kinds = pytest.mark.parametrize("kind", ["sync", "async"])


class Both:
    """Runs functions of a `ShardSession` by the session of one kind, which is closed after them."""

    def __init__(self, kind: Kind, cluster: ShardCluster) -> None:
        self.kind = kind
        self.cluster = cluster

    @property
    def engines(self) -> Engines:
        return self.cluster.engines if self.kind == "sync" else self.cluster.async_engines

    def run(self, work: Callable[[ShardSession], T], mode: Any = "single", **options: Any) -> T:
        if self.kind == "sync":
            with self.cluster.sessionmaker(mode=mode, **options)() as session:
                return work(session)

        async def main() -> T:
            try:
                async with self.cluster.async_sessionmaker(mode=mode, **options)() as session:
                    found: T = await session.run_sync(work)
                    return found
            finally:
                self.checked_out = self._checked_out()
                await self.cluster.adispose()

        return asyncio.run(main())

    checked_out = 0
    """Connections of the async pools that were still in use at the end of the last run."""

    def _checked_out(self) -> int:
        return sum(engine.pool.checkedout() for engine in self.engines._shards.values())  # type: ignore[attr-defined]

    def in_use(self) -> int:
        """Connections that are in use now that all sessions are closed."""
        return self._checked_out() if self.kind == "sync" else self.checked_out
