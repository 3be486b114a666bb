"""What a move asks of tables beyond their description: what they must not have, who holds them, what was altered.

Asked by the preflight, the mover and the verification. Nothing here changes a table.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from functools import lru_cache
from typing import Any

from psycopg import Cursor, sql

from shardkit.core.topology import ShardedTable

from .connections import Connection, at_once, only, value
from .predicate import relation
from .tables import OUR_INDEXES

_PARTS = """
SELECT n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.oid = %(name)s::regclass OR c.oid IN (SELECT relid FROM pg_partition_tree(%(name)s::regclass))
"""
_SHAPE = """
WITH RECURSIVE tree AS (
    SELECT to_regclass(name)::oid AS oid, 0::oid AS parent, false AS detaching FROM unnest({tables}::text[]) name
    UNION ALL
    SELECT i.inhrelid, i.inhparent, i.inhdetachpending FROM pg_inherits i JOIN tree t ON t.oid = i.inhparent
)
SELECT md5(string_agg(fact, E'\n' ORDER BY fact)) FROM (
    SELECT concat_ws(' ', t.oid, t.parent, t.detaching, c.relname, c.relkind, c.relpersistence, c.relfilenode)
    FROM tree t LEFT JOIN pg_class c ON c.oid = t.oid
    UNION ALL
    SELECT concat_ws(' ', a.attrelid, a.attnum, a.attname, a.atttypid, a.atttypmod, a.attnotnull, a.attgenerated,
                     a.attisdropped, a.attidentity, pg_get_expr(d.adbin, d.adrelid))
    FROM tree t JOIN pg_attribute a ON a.attrelid = t.oid AND a.attnum > 0
    LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
    UNION ALL
    -- With xmin: one that was off for a while has missed writes.
    SELECT concat_ws(' ', g.oid, g.tgenabled, g.xmin) FROM tree t JOIN pg_trigger g ON g.tgrelid = t.oid
    -- Not those of other transfers, which come and go; one of the application's may alter rows that arrive.
    WHERE g.tgname ~ {triggers} OR NOT starts_with(g.tgname, 'zz_shardkit_')
) AS facts (fact)
"""
_UNLOGGED = """
SELECT c.oid::regclass::text FROM pg_class c
WHERE c.relpersistence <> 'p'
  AND (c.oid = %(name)s::regclass OR c.oid IN (SELECT relid FROM pg_partition_tree(%(name)s::regclass)))
ORDER BY 1
"""
# Through domains (as is lo), arrays and composites, however deep.
_OF_THIS_SERVER = """
WITH RECURSIVE parts AS (
    SELECT a.attname, format_type(a.atttypid, a.atttypmod) AS shown, a.atttypid AS type FROM pg_attribute a
    WHERE a.attrelid = %(name)s::regclass AND a.attnum > 0 AND NOT a.attisdropped
    UNION
    SELECT p.attname, p.shown, inner_type FROM parts p JOIN pg_type t ON t.oid = p.type
    CROSS JOIN LATERAL (
        SELECT t.typbasetype UNION ALL SELECT t.typelem
        UNION ALL SELECT a.atttypid FROM pg_attribute a
        WHERE t.typtype = 'c' AND a.attrelid = t.typrelid AND a.attnum > 0 AND NOT a.attisdropped
    ) AS within (inner_type)
    WHERE inner_type <> 0
)
SELECT DISTINCT p.attname::text, p.shown FROM parts p JOIN pg_type t ON t.oid = p.type
WHERE t.typnamespace = 'pg_catalog'::regnamespace AND t.typtype = 'b'
  AND t.typname ~ '^(oid|reg(proc|oper|class|type|role|namespace|config|dictionary|collation).*)$'
ORDER BY 1
"""
_EAGER = """
WITH parts AS (
    SELECT c.oid FROM pg_class c
    WHERE c.oid = %(name)s::regclass OR c.oid IN (SELECT relid FROM pg_partition_tree(%(name)s::regclass))
)
SELECT DISTINCT 'trigger ' || tgname FROM pg_trigger
WHERE tgrelid IN (SELECT oid FROM parts) AND tgenabled IN ('A', 'R') AND NOT tgisinternal
UNION
SELECT DISTINCT 'rule ' || rulename FROM pg_rewrite
WHERE ev_class IN (SELECT oid FROM parts) AND ev_type <> '1' AND ev_enabled IN ('A', 'R')
ORDER BY 1
"""
_UNIQUE = """
SELECT x.relname, string_agg(a.attname, ', ' ORDER BY k.place), i.indisexclusion
FROM pg_index i JOIN pg_class x ON x.oid = i.indexrelid
CROSS JOIN unnest(i.indkey::int2[]) WITH ORDINALITY k (attnum, place)
LEFT JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum
WHERE i.indrelid = %(name)s::regclass AND (i.indisunique OR i.indisexclusion) AND NOT i.indisprimary
  AND k.place <= i.indnkeyatts
  AND NOT starts_with(x.relname, %(ours)s)
GROUP BY i.indexrelid, x.relname, i.indisexclusion
HAVING NOT bool_or(coalesce(a.attname = %(key)s, false))
   AND NOT (count(*) = 1 AND bool_and(coalesce(a.atttypid = 'uuid'::regtype, false)))
ORDER BY 1
"""
_HOLDER = """
SELECT coalesce('prepared transaction ' || quote_literal(x.gid),
                'pid ' || l.pid || ', user ' || a.usename || ', application ' ||
                coalesce(nullif(a.application_name, ''), '-') || ': ' || left(a.query, 80), 'a session')
FROM pg_locks l
LEFT JOIN pg_stat_activity a ON a.pid = l.pid
-- A prepared transaction has no process; its lock on its own number says which it is.
LEFT JOIN pg_locks t ON l.pid IS NULL AND t.pid IS NULL AND t.locktype = 'transactionid'
    AND t.virtualtransaction = l.virtualtransaction
LEFT JOIN pg_prepared_xacts x ON x.transaction = t.transactionid
WHERE l.locktype = 'relation' AND l.granted AND l.pid IS DISTINCT FROM pg_backend_pid()
  AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
  AND (l.relation = %(name)s::regclass OR l.relation IN (SELECT relid FROM pg_partition_tree(%(name)s::regclass)))
  AND (%(everybody)s OR l.mode NOT IN ('AccessShareLock', 'RowShareLock'))
  AND clock_timestamp() - coalesce(a.xact_start, x.prepared) > make_interval(secs => %(seconds)s)
ORDER BY coalesce(a.xact_start, x.prepared) LIMIT 1
"""
_INDEXED = """
SELECT 1 FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
WHERE i.indrelid = %s::regclass AND i.indisvalid AND i.indpred IS NULL AND a.attname = %s
"""


def parts(connection: Connection, table: ShardedTable) -> list[sql.Identifier]:
    """The table and, of a partitioned one, every table below it."""
    rows = connection.execute(_PARTS, {"name": relation(table).as_string(connection)})
    return [sql.Identifier(schema, name) for schema, name in rows]


def shapes(connections: Sequence[Connection], sharded: Sequence[ShardedTable], transfer: int) -> list[str]:
    """What DDL changes of the tables, a TRUNCATE included, and of the triggers on them, on each of several servers: two
    that are equal say that nothing of the kind was committed between. Rewriting a table (VACUUM FULL, CLUSTER) changes
    it too.
    """
    with at_once(*connections):
        asked = [_ask_shape(connection, sharded, transfer) for connection in connections]
    return [str(only(answer)) for answer in asked]


def shape(connection: Connection, sharded: Sequence[ShardedTable], transfer: int) -> str:
    """The one of `shapes` on one server; also within a transaction that goes on (see `connections.at_once`)."""
    return str(only(_ask_shape(connection, sharded, transfer)))


def _ask_shape(connection: Connection, sharded: Sequence[ShardedTable], transfer: int) -> Cursor[Any]:
    # Prepared, so that it is planned before a cutover asks it.
    return connection.execute(_shape_query(tuple(sharded), transfer), prepare=True)


@lru_cache(maxsize=64)
def _shape_query(sharded: tuple[ShardedTable, ...], transfer: int) -> sql.Composed:
    names = [relation(table).as_string() for table in sharded]
    return sql.SQL(_SHAPE).format(
        tables=sql.Literal(names), triggers=sql.Literal(f"^zz_shardkit_{transfer}_")
    )


def lock_shape(sharded: Sequence[ShardedTable]) -> sql.Composed:
    """What keeps the tables, and their partitions, as they are to the end of the caller's transaction."""
    return sql.SQL("LOCK TABLE {} IN ACCESS SHARE MODE").format(sql.SQL(", ").join(map(relation, sharded)))


def unlogged(connection: Connection, table: ShardedTable) -> list[str]:
    """Names of what of the table, itself or a partition, is not permanent."""
    name = relation(table).as_string(connection)
    return [name for (name,) in connection.execute(_UNLOGGED, {"name": name})]


def of_this_server(connection: Connection, table: ShardedTable) -> list[tuple[str, str]]:
    """Columns, with their types, whose values mean something on this server alone: numbers of large objects, and of
    tables, roles, functions."""
    return connection.execute(_OF_THIS_SERVER, {"name": relation(table).as_string(connection)}).fetchall()


def eager_triggers(connection: Connection, table: ShardedTable) -> list[str]:
    """Triggers and rules of the application's that act even on rows that are copied or purged."""
    return [what for (what,) in connection.execute(_EAGER, {"name": relation(table).as_string(connection)})]


def unique_without_key(connection: Connection, table: ShardedTable) -> list[str]:
    """What the unique and exclusion constraints and indexes mean, in words, that hold on each shard alone: those
    without the shard key. Primary keys, and single UUIDs, are not given twice."""
    name = relation(table).as_string(connection)
    found = connection.execute(_UNIQUE, {"name": name, "key": table.key, "ours": OUR_INDEXES})
    return [
        f"{index} ({columns or 'an expression'}) of {table} "
        f"{'excludes rows' if excludes else 'is unique'} on each shard alone, as {table.key} is not in "
        "it; and while rows move, a value of a row that has moved is still taken on its old shard until that is purged"
        for index, columns, excludes in found
    ]


class Against(Enum):
    """Whose locks DDL waits for: those of writers, or of readers too."""

    WRITERS = "writers"
    EVERYBODY = "everybody"


def holder(connection: Connection, table: ShardedTable, against: Against, seconds: float) -> str | None:
    """A session, in words, whose transaction lasts longer than ``seconds`` and that DDL on the table would wait for."""
    return holder_of(connection, relation(table).as_string(connection), against, seconds)


def holder_of(connection: Connection, name: str, against: Against, seconds: float) -> str | None:
    """The same for a table or a sequence by its name, qualified and quoted."""
    everybody = against is Against.EVERYBODY
    found = value(connection, _HOLDER, {"name": name, "everybody": everybody, "seconds": seconds})
    return None if found is None else str(found)


def is_indexed(connection: Connection, table: ShardedTable, column: str) -> bool:
    """Whether an index of all rows begins with the column."""
    return value(connection, _INDEXED, (relation(table).as_string(connection), column)) is not None
