"""What a table is on a server, as far as a move and a declaration must know; and how two of them differ."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import LiteralString

import psycopg
from psycopg import sql
from psycopg.pq import TransactionStatus

from shardkit.core.topology import DeclaredTable, KeyType, ShardedTable

from .connections import Connection, value
from .predicate import relation

OUR_INDEXES = "shardkit_"
"""How the names of all indexes begin that are made for the time of a job: `describe` leaves them out."""
IDENTITY_INDEX = f"{OUR_INDEXES}identity_"
POSITION_INDEX = f"{OUR_INDEXES}position_"

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

    An index that is set aside (`storage.setaside`) is one of its indexes.

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
       coalesce((SELECT sum(pg_table_size(relid)) FROM pg_partition_tree(c.oid)), pg_table_size(c.oid))::bigint,
       to_regclass('shardkit.set_aside') IS NOT NULL
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
# What LOCK says of a name that is none's, or a foreign table's or a materialized view's, and to who may not read it.
_NOT_LOCKED = (
    psycopg.errors.UndefinedTable,
    psycopg.errors.InvalidSchemaName,
    psycopg.errors.WrongObjectType,
    psycopg.errors.InsufficientPrivilege,
)
# A process that hangs does not keep its lock.
_ALONE: LiteralString = (
    "SET LOCAL idle_in_transaction_session_timeout = '2s'; "
    "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY; "
)
_SET_ASIDE = (
    "SELECT definition, quote_ident(name) FROM shardkit.set_aside WHERE (schema, relation) = (%s, %s)"
)


def describe(connection: Connection, table: DeclaredTable) -> Table | None:
    """The table as it is on this server; None if it is missing.

    Another transfer may set its indexes aside meanwhile, or put them back, and anybody may drop one; what is written
    out (pg_get_indexdef) is looked up as it is now, whatever a snapshot shows. So the table is locked against that, as
    by any who reads it, before the snapshot is taken. Who may not read it goes without.
    """
    alone = connection.info.transaction_status is TransactionStatus.IDLE
    snapshot = _ALONE if alone else ""
    lock = sql.SQL(snapshot + "LOCK TABLE ONLY {} IN ACCESS SHARE MODE").format(relation(table))
    locked = False
    try:
        with connection.transaction():
            connection.execute(lock, prepare=False)
            locked = True
            return _describe(connection, table)
    except _NOT_LOCKED:
        if locked:
            raise
    return _describe(connection, table)


def _describe(connection: Connection, table: DeclaredTable) -> Table | None:
    found = connection.execute(_TABLE, (table.schema, table.name)).fetchone()
    if found is None:
        return None
    oid, kind, persistence, identity, estimate, size, is_shard = found
    columns = tuple(Column(*row) for row in connection.execute(_COLUMNS, (oid,)))
    constraints = frozenset(row[0] for row in connection.execute(_CONSTRAINTS, (oid,)))
    indexes: set[str] = set()
    primary_key: tuple[str, ...] = ()
    identity_columns: frozenset[str] = frozenset()
    found_indexes = connection.execute(_INDEXES, {"oid": oid, "ours": OUR_INDEXES})
    deferrable_key = False
    for definition, name, ours, primary, replica_identity, immediate, names in found_indexes:
        if definition is None:
            continue  # dropped meanwhile, where the table could not be locked
        if not ours:  # else it stands on one server alone, for as long as a job runs
            indexes.add(definition.replace(f"INDEX {name} ON", "INDEX ON", 1))
        if primary and not immediate:
            deferrable_key = True  # two rows may have it at once: to replication it is none
            continue
        if primary:
            primary_key = tuple(names)
        if replica_identity or (identity == "d" and primary):
            identity_columns = frozenset(names)
    for definition, name in connection.execute(_SET_ASIDE, (table.schema, table.name)) if is_shard else ():
        indexes.add(definition.replace(f"INDEX {name} ON", "INDEX ON", 1))
    if identity == "f":
        identity_columns = frozenset(column.name for column in columns)
    return Table(
        kind, persistence, identity, identity_columns, columns, constraints, frozenset(indexes), primary_key,
        estimate if estimate >= 0 else _guessed_rows(connection, table, oid), size, deferrable_key,
    )  # fmt: skip


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


def vacuum(connection: Connection, table: DeclaredTable) -> None:
    """Give the place of deleted rows back to the table, outside any transaction; the server looks at it as well.

    It takes no lock that an application would notice: a table, or partition, that somebody else vacuums or alters now
    is passed over, and the file is not shortened.
    """
    connection.execute("SELECT set_config('vacuum_cost_delay', '2ms', false)")  # as autovacuum does it
    connection.execute(sql.SQL("VACUUM (SKIP_LOCKED, TRUNCATE false, ANALYZE) {}").format(relation(table)))


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
