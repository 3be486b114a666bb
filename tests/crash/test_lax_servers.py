"""Servers that acknowledge commits before they are flushed: what the protocol stands on is flushed all the same."""

from __future__ import annotations

from shardkit.storage import membership
from shardkit.storage.catalog import Catalog
from tests.fix_postgres import NewCluster

LAX = {"fsync": "on", "synchronous_commit": "off", "wal_writer_delay": "10s", "wal_writer_flush_after": "0"}


def test_a_token_is_never_given_twice(new_cluster: NewCluster) -> None:
    server = new_cluster(settings=LAX)
    url = server.create_database("catalog")
    membership.initialise(url)
    with Catalog.open(url) as catalog:
        catalog.connection.execute("CHECKPOINT")
        first = catalog.take_lease()
        server.kill()
    server.start()
    with Catalog.open(url) as catalog:
        assert catalog.take_lease() > first
