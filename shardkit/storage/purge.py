"""Deletion of rows that a shard holds but does not own, in batches by place in the heap.

One pass over the table, however many rows go: each batch deletes within a range of blocks. No row of these arcs can
appear behind the pass, since the fence keeps writers of these arcs off this shard.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from psycopg import sql

from shardkit.core.keyrange import ArcSet
from shardkit.core.topology import Fence, ShardedTable

from . import fence as fences
from .change import claim
from .connections import SHORT, Connection, transaction, value
from .failpoints import failpoint
from .predicate import relation, within

BLOCKS_A_BATCH = 512
_SETTINGS = (
    *SHORT,
    ("statement_timeout", "60s"),
    # Neither the application's triggers nor foreign keys may act: these rows live on, elsewhere.
    ("session_replication_role", "replica"),
    ("row_security", "off"),
)
_LEAVES = """
SELECT n.nspname, c.relname FROM pg_partition_tree(%s::regclass) p
JOIN pg_class c ON c.oid = p.relid JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE p.isleaf AND c.relkind = 'r'
"""


class NewerFence(Exception):
    """The shard has taken a newer topology than the one whose guard was asked for."""


def leaves(connection: Connection, table: ShardedTable) -> list[sql.Identifier]:
    """The heaps of a table: itself, or its partitions."""
    name = sql.Identifier(table.schema, table.name).as_string(connection)
    found = [sql.Identifier(schema, leaf) for schema, leaf in connection.execute(_LEAVES, (name,))]
    return found or [sql.Identifier(table.schema, table.name)]


def delete_few(
    connection: Connection, table: ShardedTable, arcs: ArcSet, *, token: int, in_force: Fence
) -> int:
    """Delete every row of ``arcs`` in one statement, by an index on the position; otherwise as `delete_arcs`."""
    with transaction(connection, *_SETTINGS, ("enable_seqscan", "off"), step="locked.delete"):
        claim(connection, token)
        if not fences.guard_newest(connection, in_force):
            raise NewerFence
        return connection.execute(
            sql.SQL("DELETE FROM {} WHERE {}").format(relation(table), within(table, arcs))
        ).rowcount


def delete_arcs(
    connection: Connection,
    table: ShardedTable,
    arcs: ArcSet,
    *,
    token: int,
    in_force: Fence,
    on_batch: Callable[[int], None],
    pause: Callable[[float], None] = time.sleep,
    share: float = 0.5,
    rows_per_second: float | None = None,
) -> int:
    """Delete every row of ``arcs``; the number deleted.

    Each batch writes the mover's token and takes the guard of ``in_force``, the fence of a topology under which this
    shard does not own the arcs; where it is no longer there, ``psycopg.errors.UndefinedTable`` passes through, and
    where a newer one stands beside it, `NewerFence` is raised. Batches run for ``share`` of the time, at most, and
    delete ``rows_per_second``, on average; a small limit makes small batches.
    """
    deleted = 0
    for leaf in leaves(connection, table):
        size = value(
            connection,
            "SELECT pg_relation_size(%s::regclass) / current_setting('block_size')::bigint",
            (leaf.as_string(connection),),
        )
        blocks = BLOCKS_A_BATCH if rows_per_second is None else _blocks(connection, leaf, rows_per_second)
        for first in range(0, size, blocks):
            started = time.monotonic()
            with transaction(connection, *_SETTINGS, step="delete_rows"):
                claim(connection, token)
                if not fences.guard_newest(connection, in_force):
                    raise NewerFence
                gone = connection.execute(
                    sql.SQL("DELETE FROM ONLY {} WHERE ctid >= {}::tid AND ctid < {}::tid AND {}").format(
                        leaf,
                        sql.Literal(f"({first},0)"),
                        sql.Literal(f"({first + blocks},0)"),
                        within(table, arcs),
                    )
                ).rowcount
            took = time.monotonic() - started
            deleted += gone
            on_batch(gone)
            failpoint("purge.batch")
            if gone:
                rest = took * (1 / share - 1)
                if rows_per_second is not None:
                    rest = max(rest, gone / rows_per_second - took)
                pause(rest)
    return deleted


def _blocks(connection: Connection, leaf: sql.Identifier, rows_per_second: float) -> int:
    """Blocks of a batch that holds about as many rows as may go in a second, by the server's statistics."""
    density = value(
        connection,
        "SELECT nullif(greatest(reltuples, 0), 0) / nullif(relpages, 0) FROM pg_class WHERE oid = %s::regclass",
        (leaf.as_string(connection),),
    )
    return max(1, min(BLOCKS_A_BATCH, int(rows_per_second / max(density or 50.0, 1.0))))
