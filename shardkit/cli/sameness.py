"""Whether reference tables are the same on all shards; part of the doctor's examination. Changes nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import psycopg
from psycopg import sql

from shardkit.core.topology import ReferenceTable, Topology
from shardkit.storage import references
from shardkit.storage.connections import Connection, transaction
from shardkit.storage.digest import Digest
from shardkit.storage.predicate import relation

LOOKS = 20
PAUSE = 0.1


def differing(
    topology: Topology, connections: Mapping[int, Connection], table: ReferenceTable
) -> dict[str, Digest | None]:
    """The digest on each shard, by name, if they are not all equal; else nothing.

    Who writes the table commits on one shard after the other, so one look may find it in between: where shards differ,
    writers are kept out at the shard where they come first, and the others are given time to commit.
    """
    by_name = {topology.by_id[shard_id].name: connection for shard_id, connection in connections.items()}
    found = references.digests(by_name, table)
    if _equal(found) or None in found.values():  # a missing table is told elsewhere
        return {}
    with _writers_kept_out(connections[min(connections)], table):
        for _ in range(LOOKS):
            found = references.digests(by_name, table)
            if _equal(found):
                return {}
            time.sleep(PAUSE)
    return found


def _equal(found: Mapping[str, Digest | None]) -> bool:
    return len(set(found.values())) <= 1


@contextmanager
def _writers_kept_out(connection: Connection, table: ReferenceTable) -> Iterator[None]:
    """Hold the lock that writers take first; go on without it where it cannot be had soon, or by this role."""
    with transaction(connection, ("lock_timeout", "1s")):
        try:
            with connection.transaction():
                connection.execute(sql.SQL("LOCK TABLE {} IN SHARE MODE").format(relation(table)))
        except (psycopg.errors.LockNotAvailable, psycopg.errors.InsufficientPrivilege):
            pass
        yield
