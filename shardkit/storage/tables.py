"""What a table is on a server, as far as a move and a declaration must know; and how two of them differ."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import psycopg
from psycopg import sql

from shardkit.core.topology import DeclaredTable, KeyType, ShardedTable

from .connections import Connection, value
from .predicate import relation

IDENTITY_INDEX = "shardkit_identity_"
"""How the names of the indexes begin that `storage.replicaidentity` makes for the time of a job."""

# typname of the key column -> family; bpchar pads with spaces that its hash ignores, so it is none of them.
KEY_FAMILIES: dict[str, KeyType] = {
    "int2": "int",
    "int4": "int",
    "int8": "int",
    "text": "text",
    "varchar": "text",
    "uuid": "uuid",
}


_CONSTANT = re.compile(r"[-+]?\d+(\.\d*)?|TRUE|FALSE|NULL|E?'([^'\\]|'')*'|ARRAY\[\]", re.IGNORECASE)
_CAST = re.compile(r"::[\w \"\.\[\]\(\),]+$")
# PostgreSQL's own words in the input of dates and times.
_MOMENT = re.compile(r"'\s*(now|today|tomorrow|yesterday)\s*'", re.IGNORECASE)


def is_constant(default: str) -> bool:
    """Whether a default, as SQL, is the same value wherever and whenever it is evaluated; False if unknown."""
    bare = default.strip()
    while (stripped := _CAST.sub("", bare).strip()) != bare:
        bare = stripped
    return bool(_CONSTANT.fullmatch(bare)) and not _MOMENT.fullmatch(bare)


@dataclass(frozen=True, slots=True)
class Column:
    """A column; ``type`` as ``format_type`` prints it, ``generated`` and ``identity`` as in ``pg_attribute``."""

    name: str
    type: str
    base: str
    not_null: bool
    default: str | None
    identity: str
    generated: str
    deterministic: bool


@dataclass(frozen=True, slots=True)
class Table:
    """A table as the server describes it. ``constraints`` and ``indexes`` are definitions without names.

    A primary key that is DEFERRABLE identifies no row while rows are carried: ``primary_key`` is empty then, and
    ``deferrable_key`` true.

    ``rows_estimate`` is the server's, from its statistics or, where there are none, from the size of the table.
    """

    kind: str
    persistence: str
    identity: str
    identity_columns: frozenset[str]
    columns: tuple[Column, ...]
    constraints: frozenset[str]
    indexes: frozenset[str]
    primary_key: tuple[str, ...]
    rows_estimate: float
    bytes: int
    deferrable_key: bool = False

    def row_identity(self, key: str) -> tuple[str, ...]:
        """Columns that say which row it is, ``key`` first: those of the primary key or of an index that was chosen as
        replica identity; ``key`` alone, which many rows share, where there is neither."""
        chosen = sorted(self.identity_columns) if self.identity == "i" else ()
        return (key, *(name for name in self.primary_key or chosen if name != key))

    def column(self, name: str) -> Column | None:
        """The column of this name."""
        return next((column for column in self.columns if column.name == name), None)


_TABLE = """
SELECT c.oid, c.relkind::text, c.relpersistence::text, c.relreplident::text, c.reltuples::float8,
       coalesce((SELECT sum(pg_table_size(relid)) FROM pg_partition_tree(c.oid)), pg_table_size(c.oid))::bigint
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = %s AND c.relname = %s AND c.relkind IN ('r', 'p', 'f', 'v', 'm')
"""
_COLUMNS = """
SELECT a.attname, format_type(a.atttypid, a.atttypmod), t.typname, a.attnotnull, pg_get_expr(d.adbin, d.adrelid),
       a.attidentity::text, a.attgenerated::text, coalesce(l.collisdeterministic, true)
FROM pg_attribute a
JOIN pg_type t ON t.oid = a.atttypid
LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
LEFT JOIN pg_collation l ON l.oid = a.attcollation
WHERE a.attrelid = %s AND a.attnum > 0 AND NOT a.attisdropped
ORDER BY a.attname
"""
# NOT NULL constraints ('n', from PostgreSQL 18 on) are columns' properties before; compared there.
_CONSTRAINTS = """
SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conrelid = %s AND contype IN ('c', 'f', 'p', 'u', 'x')
"""
_INDEXES = """
SELECT pg_get_indexdef(i.indexrelid), quote_ident(c.relname), starts_with(c.relname, %(ours)s),
       i.indisprimary, i.indisreplident, i.indimmediate,
       ARRAY(SELECT a.attname::text FROM unnest(i.indkey) WITH ORDINALITY k(attnum, place)
             JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum ORDER BY k.place)
FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
WHERE i.indrelid = %(oid)s AND i.indisvalid
"""


_PARTS = """
SELECT n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.oid = %(name)s::regclass OR c.oid IN (SELECT relid FROM pg_partition_tree(%(name)s::regclass))
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
_UNIQUE = """
SELECT x.relname, string_agg(a.attname, ', ' ORDER BY k.place)
FROM pg_index i JOIN pg_class x ON x.oid = i.indexrelid
CROSS JOIN unnest(i.indkey::int2[]) WITH ORDINALITY k (attnum, place)
LEFT JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum
WHERE i.indrelid = %(name)s::regclass AND i.indisunique AND NOT i.indisprimary AND k.place <= i.indnkeyatts
  AND NOT starts_with(x.relname, %(ours)s)
GROUP BY i.indexrelid, x.relname
HAVING NOT bool_or(coalesce(a.attname = %(key)s, false))
   AND NOT (count(*) = 1 AND bool_and(coalesce(a.atttypid = 'uuid'::regtype, false)))
ORDER BY 1
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
_SHAPE = """
WITH RECURSIVE tree AS (
    SELECT to_regclass(name)::oid AS oid, 0::oid AS parent, false AS detaching FROM unnest(%(tables)s::text[]) name
    UNION ALL
    SELECT i.inhrelid, i.inhparent, i.inhdetachpending FROM pg_inherits i JOIN tree t ON t.oid = i.inhparent
)
SELECT md5(string_agg(fact, E'\n' ORDER BY fact)) FROM (
    SELECT concat_ws(' ', t.oid, t.parent, t.detaching, c.relname, c.relkind, c.relpersistence, c.relfilenode)
    FROM tree t LEFT JOIN pg_class c ON c.oid = t.oid
    UNION ALL
    SELECT concat_ws(' ', a.attrelid, a.attnum, a.attname, a.atttypid, a.atttypmod, a.attnotnull, a.attgenerated,
                     a.attisdropped)
    FROM tree t JOIN pg_attribute a ON a.attrelid = t.oid AND a.attnum > 0
    UNION ALL
    -- With xmin: one that was off for a while has missed writes.
    SELECT concat_ws(' ', g.oid, g.tgenabled, g.xmin) FROM tree t JOIN pg_trigger g ON g.tgrelid = t.oid
    WHERE g.tgname ~ %(triggers)s
) AS facts (fact)
"""


def describe(connection: Connection, table: DeclaredTable) -> Table | None:
    """The table as it is on this server; None if it is missing."""
    found = connection.execute(_TABLE, (table.schema, table.name)).fetchone()
    if found is None:
        return None
    oid, kind, persistence, identity, estimate, size = found
    columns = tuple(Column(*row) for row in connection.execute(_COLUMNS, (oid,)))
    constraints = frozenset(row[0] for row in connection.execute(_CONSTRAINTS, (oid,)))
    indexes: set[str] = set()
    primary_key: tuple[str, ...] = ()
    identity_columns: frozenset[str] = frozenset()
    found_indexes = connection.execute(_INDEXES, {"oid": oid, "ours": IDENTITY_INDEX})
    deferrable_key = False
    for definition, name, ours, primary, replica_identity, immediate, names in found_indexes:
        if not ours:  # else it stands on one server alone, for as long as a job runs
            indexes.add(definition.replace(f"INDEX {name} ON", "INDEX ON", 1))
        if primary and not immediate:
            deferrable_key = True  # two rows may have it at once: to replication it is none
            continue
        if primary:
            primary_key = tuple(names)
        if replica_identity or (identity == "d" and primary):
            identity_columns = frozenset(names)
    if identity == "f":
        identity_columns = frozenset(column.name for column in columns)
    return Table(
        kind, persistence, identity, identity_columns, columns, constraints, frozenset(indexes), primary_key,
        estimate if estimate >= 0 else _guessed_rows(connection, table, oid), size, deferrable_key,
    )  # fmt: skip


def parts(connection: Connection, table: ShardedTable) -> list[sql.Identifier]:
    """The table and, of a partitioned one, every table below it."""
    rows = connection.execute(_PARTS, {"name": relation(table).as_string(connection)})
    return [sql.Identifier(schema, name) for schema, name in rows]


def shape(connection: Connection, sharded: Sequence[ShardedTable], transfer: int) -> str:
    """What DDL changes of the tables, a TRUNCATE included, and of the triggers of a transfer on them: two that are
    equal say that nothing of the kind was committed between. Rewriting a table (VACUUM FULL, CLUSTER) changes it too.
    """
    names = [relation(table).as_string(connection) for table in sharded]
    return str(value(connection, _SHAPE, {"tables": names, "triggers": f"^zz_shardkit_{transfer}_"}))


def lock_shape(connection: Connection, sharded: Sequence[ShardedTable]) -> None:
    """Keep the tables, and their partitions, as they are to the end of the caller's transaction."""
    found = sql.SQL(", ").join(map(relation, sharded))
    connection.execute(sql.SQL("LOCK TABLE {} IN ACCESS SHARE MODE").format(found))


def _guessed_rows(connection: Connection, table: DeclaredTable, oid: int) -> float:
    """Rows as the planner sees them: pages by width. A table that is not partitioned and has less than 10 pages counts
    as one of 10 there."""
    plan = value(connection, sql.SQL("EXPLAIN (FORMAT JSON) SELECT FROM {}").format(relation(table)))
    pages = value(
        connection,
        "SELECT pg_relation_size(oid) / current_setting('block_size')::float8 FROM pg_class "
        "WHERE oid = %s AND relkind = 'r'",
        (oid,),
    )
    return float(plan[0]["Plan"]["Plan Rows"]) * (1.0 if pages is None else min(1.0, pages / 10))


def unique_without_key(connection: Connection, table: ShardedTable) -> list[str]:
    """What the unique constraints and indexes mean, in words, that hold on each shard alone: those without the shard
    key. Primary keys, and single UUIDs, are not given twice."""
    name = relation(table).as_string(connection)
    found = connection.execute(_UNIQUE, {"name": name, "key": table.key, "ours": IDENTITY_INDEX})
    return [
        f"{index} ({columns or 'an expression'}) of {table} is unique on each shard alone, as {table.key} is not in "
        "it; and while rows move, a value of a row that has moved is still taken on its old shard until that is purged"
        for index, columns in found
    ]


class Against(Enum):
    """Whose locks DDL waits for: those of writers, or of readers too."""

    WRITERS = "writers"
    EVERYBODY = "everybody"


def holder(connection: Connection, table: ShardedTable, against: Against, seconds: float) -> str | None:
    """A session, in words, whose transaction lasts longer than ``seconds`` and that DDL on the table would wait for."""
    name = relation(table).as_string(connection)
    everybody = against is Against.EVERYBODY
    found = value(connection, _HOLDER, {"name": name, "everybody": everybody, "seconds": seconds})
    return None if found is None else str(found)


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


def is_empty(connection: Connection, table: DeclaredTable) -> bool:
    """Whether the table has no row."""
    return value(connection, sql.SQL("SELECT 1 FROM {} LIMIT 1").format(relation(table))) is None


def has_equality(connection: Connection, table: DeclaredTable, column: Column) -> bool:
    """Whether values of the column can be compared."""
    query = sql.SQL("SELECT DISTINCT {} FROM {} LIMIT 0").format(sql.Identifier(column.name), relation(table))
    try:
        connection.execute(query)
    except psycopg.errors.UndefinedFunction:
        return False
    return True


def analyze(connection: Connection, table: DeclaredTable) -> None:
    """Have the server look at a table whose rows came or went, so that it plans and estimates well at once."""
    connection.execute(sql.SQL("ANALYZE {}").format(relation(table)))


def key_problems(table: ShardedTable, found: Table | None) -> list[str]:
    """Why the table cannot be sharded by its key as the server has it; empty if it can."""
    if found is None:
        return [f"table {table} does not exist"]
    if found.kind not in ("r", "p"):
        return [f"{table} is no table"]
    key = found.column(table.key)
    if key is None:
        return [f"table {table} has no column {table.key!r}"]
    problems = []
    if KEY_FAMILIES.get(key.base) != table.key_type:
        problems.append(f"key {table}.{table.key} is {key.type}, which is not of the {table.key_type} family")
    if not key.not_null:
        problems.append(f"key {table}.{table.key} is nullable")
    if not key.deterministic:
        problems.append(f"key {table}.{table.key} has a nondeterministic collation")
    if key.identity or (key.default and "nextval" in key.default):
        problems.append(f"key {table}.{table.key} is numbered by each server by itself")
    if found.deferrable_key and table.key not in found.identity_columns:
        problems.append(
            f"the primary key of {table} is DEFERRABLE, so it cannot tell which row a replicated change means "
            "(make it NOT DEFERRABLE, or give the table a REPLICA IDENTITY that holds the shard key)"
        )
    return problems


def differences(table: DeclaredTable, source: Table | None, target: Table | None) -> list[str]:
    """How two servers' versions of a table differ, in words; empty where a move can carry rows between them."""
    if source is None or target is None:
        return [f"table {table} is missing on the {'source' if source is None else 'target'}"]
    found = []
    if source.kind != target.kind:
        found.append(f"table {table} is partitioned on one side only")
    ours = {column.name: column for column in source.columns}
    theirs = {column.name: column for column in target.columns}
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in theirs or name not in ours:
            found.append(f"column {table}.{name} is missing on the {'target' if name in ours else 'source'}")
        elif ours[name] != theirs[name]:
            mine, other = _shown(ours[name]), _shown(theirs[name])
            found.append(f"column {table}.{name} differs: {mine} on the source, {other} on the target")
    for what, here, there in (
        ("constraint", source.constraints, target.constraints),
        ("index", source.indexes, target.indexes),
    ):
        found += [f"{what} of {table} is missing on the target: {text}" for text in sorted(here - there)]
        found += [f"{what} of {table} is missing on the source: {text}" for text in sorted(there - here)]
    return found


def _shown(column: Column) -> str:
    parts = [
        column.type,
        "NOT NULL" if column.not_null else "",
        f"DEFAULT {column.default}" if column.default else "",
    ]
    parts += ["IDENTITY" if column.identity else "", "GENERATED" if column.generated else ""]
    return " ".join(part for part in parts if part)
