"""What shares some arcs with a key: the rows and keys that would go where it goes. Counted, if that takes no time.

Driven by the command that pins; changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import psycopg
from psycopg import sql

from shardkit.core.keyrange import ArcSet
from shardkit.core.topology import ShardedTable

from . import tables
from .connections import Connection, transaction
from .predicate import relation, within

_SECONDS = 1.0
"""For each table: there may be no index on the position, and nobody waits for a scan of it."""


@dataclass(frozen=True, slots=True)
class Sharing:
    """Rows, keys, and some of the keys as text, of all types of keys."""

    rows: int
    keys: int
    some: tuple[str, ...]


def found(
    connection: Connection, listed: Iterable[ShardedTable], arcs: ArcSet, some: int = 10
) -> Sharing | None:
    """What a shard holds of some arcs; None if that could not be counted within seconds."""
    rows = 0
    keys: set[tuple[str, str]] = set()
    try:
        for table in listed:
            if tables.describe(connection, table) is None:
                continue
            query = sql.SQL("SELECT {}::text, count(*) FROM {} WHERE {} GROUP BY 1").format(
                sql.Identifier(table.key), relation(table), within(table, arcs)
            )
            with transaction(connection, ("statement_timeout", f"{int(_SECONDS * 1000)}ms")):
                for key, count in connection.execute(query):
                    keys.add((table.key_type, key))
                    rows += count
    except psycopg.errors.QueryCanceled:
        return None
    return Sharing(rows, len(keys), tuple(key for _, key in sorted(keys)[:some]))
