"""Indexes on the position of a table's key, for the time of a transfer that moves rows in steps.

Each step reads, compares and deletes the rows of a narrow range of positions; without an index it would scan the
whole table each time. They are built without blocking writers, on each heap of a table, under names that a later
mover knows.
"""

from __future__ import annotations

from psycopg import sql

from shardkit.core.topology import ShardedTable

from .change import claim
from .connections import SHORT, Connection, transaction, value
from .predicate import position
from .purge import leaves
from .tables import POSITION_INDEX


def _names(
    connection: Connection, transfer: int, index: int, table: ShardedTable
) -> list[tuple[sql.Identifier, str]]:
    """Each heap of table number ``index``, and the name of its index, by oid: their order is not stable."""
    named = []
    for leaf in leaves(connection, table):
        oid = value(connection, "SELECT %s::regclass::oid", (leaf.as_string(connection),))
        named.append((leaf, f"{POSITION_INDEX}{transfer}_{index}_{oid}"))
    return named


def build(connection: Connection, transfer: int, index: int, table: ShardedTable, token: int) -> None:
    """Build the indexes of one table, outside any transaction; one that an interrupted run left invalid is built
    again."""
    for leaf, name in _names(connection, transfer, index, table):
        valid = value(
            connection,
            "SELECT i.indisvalid FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid "
            "WHERE i.indrelid = %s::regclass AND c.relname = %s",
            (leaf.as_string(connection), name),
        )
        if valid:
            continue
        with transaction(connection, *SHORT, step="locked.prepare_index"):
            claim(connection, token)
        if valid is not None:
            connection.execute(
                sql.SQL("DROP INDEX CONCURRENTLY IF EXISTS {}").format(left(connection, transfer)[name])
            )
        connection.execute(
            sql.SQL("CREATE INDEX CONCURRENTLY {} ON {} (({}))").format(
                sql.Identifier(name), leaf, position(table)
            )
        )


def left(connection: Connection, transfer: int) -> dict[str, sql.Identifier]:
    """The indexes of a transfer that are there, by name, those on former partitions included."""
    rows = connection.execute(
        "SELECT n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
        "WHERE c.relkind = 'i' AND starts_with(c.relname, %s)",
        (f"{POSITION_INDEX}{transfer}_",),
    )
    return {name: sql.Identifier(schema, name) for schema, name in rows}


def drop(connection: Connection, index: sql.Identifier) -> None:
    """Drop one, in the caller's transaction; waits for the table's readers under lock_timeout."""
    connection.execute(sql.SQL("DROP INDEX IF EXISTS {}").format(index))
