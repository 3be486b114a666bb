"""The fixtures of `tests.twins`: one pair of a cluster and a plain database for the whole run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import pytest

from shardkit.dev import Clusters
from tests.fix_sharded import InSession
from tests.sharded import ShardedCluster
from tests.twins import Twins, shown


@pytest.fixture(scope="session")
def twins(servers: Clusters) -> Iterator[Twins]:
    """Three shards with rows in transit, and one plain database. Leave the rows as they are."""
    names = ["twins_catalog", "twins_s0", "twins_s1", "twins_s2"]
    urls = [servers[number % len(servers)].create_database(name) for number, name in enumerate(names)]
    made = Twins(ShardedCluster(urls[0], urls[1:]), servers[0].create_database("twins_plain"))
    yield made
    made.close()


class _Applications:
    """One application on the cluster that is sync and one that is async, with its own event loop, for all tests."""

    def __init__(self, sharded: ShardedCluster) -> None:
        self.cluster = sharded.connect()
        self.runner = asyncio.Runner()

    def sync(self, work: Callable[[Any], Any], **options: Any) -> Any:
        with self.cluster.sessionmaker(**options)() as session:
            return work(session)

    def asynchronous(self, work: Callable[[Any], Any], **options: Any) -> Any:
        async def main() -> Any:
            async with self.cluster.async_sessionmaker(**options)() as session:
                return await session.run_sync(work)

        return self.runner.run(main())

    def close(self) -> None:
        self.runner.run(self.cluster.adispose())
        self.runner.close()
        self.cluster.dispose()


@pytest.fixture(scope="session")
def _applications(twins: Twins) -> Iterator[_Applications]:
    made = _Applications(twins.sharded)
    yield made
    made.close()


@pytest.fixture(params=["sync", "async"])
def in_shards(request: pytest.FixtureRequest, _applications: _Applications) -> InSession:
    """As `in_session`, on the cluster of ``twins``, by applications that stay connected."""
    run: Any = _applications.sync if request.param == "sync" else _applications.asynchronous
    return run  # type: ignore[no-any-return]


class Same(Protocol):
    def __call__(self, work: Callable[[Any], Any], *, ordered: bool = True, **options: Any) -> Any: ...


@pytest.fixture
def same(twins: Twins, in_shards: InSession) -> Same:
    """`same(work, ordered=True, **options)`: what work returns, which is the same of shards as of one database.

    Sync and async, as `in_shards` is.
    """

    def run(work: Callable[[Any], Any], *, ordered: bool = True, **options: Any) -> Any:
        expected = twins.plain(lambda session: shown(work(session)))
        found = in_shards(lambda session: shown(work(session)), **options)
        if not ordered:
            expected, found = sorted(expected, key=str), sorted(found, key=str)
        assert found == expected
        return found

    return run
