"""Fixtures of sharded clusters: one for the whole run, emptied for each test, and an application on it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

import shardkit
from shardkit.dev import Clusters
from tests.sharded import ShardedCluster


@pytest.fixture(scope="session")
def _sharded(servers: Clusters) -> Iterator[ShardedCluster]:
    names = ["session_catalog", "session_s0", "session_s1", "session_s2"]
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


@pytest.fixture
async def async_cluster(sharded: ShardedCluster) -> AsyncIterator[shardkit.ShardCluster]:
    """An application for asyncio connected to it."""
    connected = sharded.connect()
    yield connected
    await connected.adispose()
    connected.dispose()
