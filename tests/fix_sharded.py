"""Fixtures of sharded clusters: one for the whole run, emptied for each test, and an application on it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from itertools import count
from typing import Any, Protocol, TypeVar

import pytest

import shardkit
from shardkit.dev import Clusters
from tests.sharded import ShardedCluster


@pytest.fixture(scope="module")
def _sharded(servers: Clusters) -> Iterator[ShardedCluster]:
    # One a module: what a test finds does not depend on the files before it, whose order is another in each run.
    number = next(_numbers)
    names = [f"module_{number}_{name}" for name in ("catalog", "s0", "s1", "s2")]
    urls = [servers[number % len(servers)].create_database(name) for number, name in enumerate(names)]
    cluster = ShardedCluster(urls[0], urls[1:])
    yield cluster
    cluster.close()


@pytest.fixture
def sharded(_sharded: ShardedCluster) -> ShardedCluster:
    """Three shards, s0 to s2, with the tables of `tests.sharded`, empty. The topology is what other tests left."""
    _sharded.truncate()
    return _sharded


@pytest.fixture
def cluster(sharded: ShardedCluster) -> Iterator[shardkit.ShardCluster]:
    """An application connected to it."""
    with sharded.connect() as connected:
        yield connected


T = TypeVar("T")
_numbers = count(1)


class InSession(Protocol):
    def __call__(self, work: Callable[[shardkit.ShardSession], T], **options: Any) -> T: ...


@pytest.fixture(params=["sync", "async"])
def in_session(request: pytest.FixtureRequest, sharded: ShardedCluster) -> InSession:
    """`in_session(work, **options)`: what work returns, given a session of an application of its own.

    Each test that asks for it runs twice: on a session, and on the one inside an async session, as `run_sync` has it.
    """

    def run(work: Callable[[shardkit.ShardSession], T], **options: Any) -> T:
        with sharded.connect() as cluster:
            if request.param == "sync":
                with cluster.sessionmaker(**options)() as session:
                    return work(session)

            async def main() -> T:
                try:
                    async with cluster.async_sessionmaker(**options)() as session:
                        found: T = await session.run_sync(work)
                        return found
                finally:
                    await cluster.adispose()

            return asyncio.run(main())

    return run


@pytest.fixture
async def async_cluster(sharded: ShardedCluster) -> AsyncIterator[shardkit.ShardCluster]:
    """An application for asyncio connected to it."""
    connected = sharded.connect()
    yield connected
    await connected.adispose()
    connected.dispose()
