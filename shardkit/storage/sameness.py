"""Whether reference tables are the same on all shards, however often they are written meanwhile.

The doctor and the audit ask. Changes nothing; holds writers of a table up only where its rows seem to differ, and then
for as long as it takes to read the table once on every shard.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack

import psycopg
from psycopg import sql

from shardkit.core.errors import RetryLater
from shardkit.core.topology import ReferenceTable, Topology

from . import references
from .connections import Connection, transaction
from .digest import Digest
from .predicate import relation

LOOKS = 20
PAUSE = 0.1
_KEEPING_OUT = (("lock_timeout", "1s"), ("statement_timeout", "60s"), ("tcp_user_timeout", "5s"))


def differing(
    topology: Topology, connections: Mapping[int, Connection], table: ReferenceTable
) -> dict[str, Digest | None]:
    """The digest on each shard, by name, if they are not all equal; else nothing.

    Who writes the table commits on one shard after the other, so one look may find it in between: where shards differ,
    the table is locked on all of them, in the order in which writers come, and compared while nobody writes.
    `RetryLater` where writers never let that happen.
    """
    by_name = {topology.by_id[number].name: connections[number] for number in sorted(connections)}
    found = references.digests(by_name, table)
    alone = True
    for _ in range(LOOKS):
        if _equal(found) or None in found.values():  # a missing table is told elsewhere
            return {}
        try:
            with ExitStack() as locks:
                alone = _keep_writers_out(locks, by_name, table)
                found = references.digests(by_name, table)
            if alone:
                return {} if _equal(found) else found
        except psycopg.errors.LockNotAvailable:
            found = references.digests(by_name, table)
        time.sleep(PAUSE)
    if alone:
        raise RetryLater(
            f"The reference table {table} is written on some shard all the time, so it could not be compared.",
            hint="Look for a transaction that wrote it and stays open (`shardkit transactions list`), then try again.",
        )
    return {} if _equal(found) else found


def _equal(found: Mapping[str, Digest | None]) -> bool:
    return len(set(found.values())) <= 1


def _keep_writers_out(locks: ExitStack, by_name: Mapping[str, Connection], table: ReferenceTable) -> bool:
    """Hold the lock that writers take, on every shard; False where this role may not, so that others may write."""
    allowed = True
    for connection in by_name.values():
        locks.enter_context(transaction(connection, *_KEEPING_OUT))
        try:
            with connection.transaction():
                connection.execute(sql.SQL("LOCK TABLE {} IN SHARE MODE").format(relation(table)))
        except psycopg.errors.InsufficientPrivilege:
            allowed = False
    return allowed
