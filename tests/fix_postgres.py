"""Fixtures of real PostgreSQL servers: a pool for the whole run, databases and servers of a test's own.

Without a server on this machine the tests that ask for one fail and say how to get one; they are never skipped.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import count
from typing import Any, Protocol

import pytest

from shardkit.core.errors import BinariesNotFound
from shardkit.core.ring import IMPLEMENTATION
from shardkit.dev import Cluster, Clusters, find_binaries

POOL_SIZE = 3


class FreshDatabase(Protocol):
    def __call__(
        self, server_index: int = 0, name: str | None = None, template: str = "template1"
    ) -> str: ...


class NewCluster(Protocol):
    def __call__(self, **options: Any) -> Cluster: ...


def pytest_report_header() -> list[str]:
    try:
        server = str(find_binaries())
    except BinariesNotFound as error:
        server = f"no PostgreSQL: {error.message}"
    return [f"shardkit: ring in {IMPLEMENTATION}", f"shardkit: {server}"]


@pytest.fixture(scope="session")
def servers() -> Iterator[Clusters]:
    """Three running servers, shared by all tests: leave nothing on them. `PGPASSFILE` is set, so their URLs work."""
    with Clusters(POOL_SIZE) as clusters, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PGPASSFILE", str(clusters[0].passfile))
        for name in [name for name in os.environ if name.startswith("PG") and name != "PGPASSFILE"]:
            patch.delenv(name)  # the developer's own PGHOST and the like
        yield clusters


@pytest.fixture
def fresh_database(servers: Clusters) -> Iterator[FreshDatabase]:
    """`fresh_database(server_index=0, name=None, template="template1") -> URL` of a new database.

    All are dropped after the test, whatever still uses them.
    """
    made: list[tuple[Cluster, str]] = []

    def create(server_index: int = 0, name: str | None = None, template: str = "template1") -> str:
        server = servers[server_index]
        database = name or f"fresh_{next(_numbers)}"
        made.append((server, database))
        return server.create_database(database, template)

    yield create
    Cluster.drop_databases(made)


_numbers = count(1)


@pytest.fixture
def new_cluster(servers: Clusters) -> Iterator[NewCluster]:
    """`new_cluster(settings=..., tcp=...) -> Cluster`, running, of this test alone: it may be stopped and crashed."""
    made: list[Cluster] = []

    def start(**options: Any) -> Cluster:
        cluster = Cluster(**options)
        made.append(cluster)
        cluster.start()
        return cluster

    yield start
    for cluster in made:
        cluster.close()
