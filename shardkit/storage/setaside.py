"""Secondary indexes of a table without rows, *set aside* while a copy fills it: dropped before, built after it.

Only indexes whose absence changes nothing but speed, and which can be made again exactly as they were. The transaction
that drops one writes into ``shardkit.set_aside`` what makes it again, and its row goes when it is there again: so what
is missing is known, whoever was killed where. Building twice is building once. Driven by `rebalance.indexes`, which
says when; a shard owns no arc while an index of it is set aside.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import Any

import psycopg
from psycopg import sql

from shardkit.core.errors import IndexNotBuilt
from shardkit.core.topology import ShardedTable

from .change import claim
from .connections import SHORT, Connection, transaction, value
from .failpoints import failpoint
from .predicate import relation
from .tables import OUR_INDEXES, describe, is_empty

# Nobody may write between the look for rows and the commit; everybody queues behind that, so it is short.
_SETTING_ASIDE = (
    *SHORT,
    ("lock_timeout", "10ms"),
    ("statement_timeout", "500ms"),
    ("row_security", "off"),
    ("synchronous_commit", "on"),
)
_CLEARING = (*SHORT, ("lock_timeout", "10ms"), ("synchronous_commit", "on"))
_CANDIDATES = """
SELECT n.nspname, x.relname, c.relname, pg_get_indexdef(x.oid), coalesce(t.spcname, ''),
       ARRAY(
           SELECT format('ALTER INDEX %%I.%%I ALTER COLUMN %%s SET STATISTICS %%s',
                         n.nspname, x.relname, a.attnum, a.attstattarget)
           FROM pg_attribute a WHERE a.attrelid = x.oid AND a.attstattarget >= 0 ORDER BY a.attnum
       ) || ARRAY(
           SELECT format('COMMENT ON INDEX %%I.%%I IS %%L', n.nspname, x.relname, text)
           FROM obj_description(x.oid, 'pg_class') text WHERE text IS NOT NULL
       )
FROM pg_index i
JOIN pg_class x ON x.oid = i.indexrelid
JOIN pg_class c ON c.oid = i.indrelid
JOIN pg_namespace n ON n.oid = c.relnamespace
LEFT JOIN pg_tablespace t ON t.oid = x.reltablespace
WHERE i.indrelid = %(table)s::regclass
  AND c.relkind = 'r' AND NOT c.relispartition AND x.relkind = 'i' AND NOT x.relispartition
  AND i.indisvalid AND i.indisready AND i.indislive
  AND NOT (i.indisunique OR i.indisprimary OR i.indisexclusion OR i.indisreplident OR i.indisclustered)
  AND NOT starts_with(x.relname, %(ours)s)
  -- Nothing would keep a function from being dropped, or say that an extension has the index.
  AND NOT EXISTS (
      SELECT FROM pg_depend d
      WHERE d.refclassid = 'pg_class'::regclass AND d.refobjid = x.oid
         OR d.classid = 'pg_class'::regclass AND d.objid = x.oid
            AND (d.deptype IN ('e', 'x') OR d.refclassid IN ('pg_proc'::regclass, 'pg_constraint'::regclass)))
  -- Who may drop it may not always make it again.
  AND pg_has_role(c.relowner, 'USAGE') AND has_schema_privilege(n.oid, 'CREATE')
  AND (x.reltablespace = 0 OR has_tablespace_privilege(x.reltablespace, 'CREATE'))
ORDER BY x.oid
"""
_NOTED = """
SELECT schema, name, relation, definition, tablespace, statements, 'CREATE INDEX CONCURRENTLY' || substr(definition, 13)
FROM shardkit.set_aside ORDER BY schema, relation, name
"""
_STATE = """
SELECT i.indisvalid, pg_get_indexdef(i.indexrelid) IS NOT DISTINCT FROM %(definition)s
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace LEFT JOIN pg_index i ON i.indexrelid = c.oid
WHERE n.nspname = %(schema)s AND c.relname = %(name)s
"""
_PROGRESS = """
SELECT phase, (100 * blocks_done / nullif(blocks_total, 0) / 10 * 10)::int FROM pg_stat_progress_create_index
WHERE pid = %s
"""
_REMEDY = """
SELECT concat_ws(' ',
           CASE WHEN NOT there.valid AND there.same THEN format('DROP INDEX CONCURRENTLY %%I.%%I;', schema, name) END,
           CASE WHEN there.same IS NULL OR NOT there.valid AND there.same THEN concat_ws(' ',
               CASE WHEN tablespace <> '' THEN format('SET default_tablespace = %%L;', tablespace) END,
               'CREATE INDEX CONCURRENTLY' || substr(definition, 13) || ';') END,
           CASE WHEN there.same IS DISTINCT FROM false THEN (SELECT string_agg(text || ';', ' ')
                                                             FROM unnest(statements) text) END,
           format('DELETE FROM shardkit.set_aside WHERE (schema, name) = (%%L, %%L);', schema, name))
FROM shardkit.set_aside s LEFT JOIN LATERAL (
    SELECT coalesce(i.indisvalid, true) AS valid,
           pg_get_indexdef(i.indexrelid) IS NOT DISTINCT FROM s.definition AS same
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace LEFT JOIN pg_index i ON i.indexrelid = c.oid
    WHERE n.nspname = s.schema AND c.relname = s.name
) AS there ON true
WHERE (schema, name) = (%s, %s)
"""


class State(Enum):
    """What there is under the name of an index that was set aside."""

    MISSING = "missing"
    UNFINISHED = "unfinished"
    """It itself, by a build that was interrupted or that runs."""
    BUILT = "built"
    TAKEN = "taken"
    """Something else, which somebody has made meanwhile."""
    WITHOUT_TABLE = "without table"


@dataclass(frozen=True, slots=True)
class SetAside:
    """An index that is to be there again; ``statement`` builds it, ``statements`` give it what that does not."""

    schema: str
    name: str
    relation: str
    definition: str
    tablespace: str
    statements: tuple[str, ...]
    statement: str

    def __str__(self) -> str:
        return f"{self.schema}.{self.name}"

    @property
    def _identifier(self) -> sql.Identifier:
        return sql.Identifier(self.schema, self.name)


def is_known(connection: Connection) -> bool:
    """Whether this shard can note what is set aside: an older shardkit may have made its tables."""
    return value(connection, "SELECT to_regclass('shardkit.set_aside')") is not None


def noted(connection: Connection) -> list[SetAside]:
    """The indexes of a shard that are set aside."""
    if not is_known(connection):
        return []
    return [
        SetAside(schema, name, table, definition, tablespace, tuple(statements), statement)
        for schema, name, table, definition, tablespace, statements, statement in connection.execute(_NOTED)
    ]


def _candidates(connection: Connection, table: ShardedTable) -> list[tuple[Any, ...]]:
    return connection.execute(
        _CANDIDATES, {"table": relation(table).as_string(connection), "ours": OUR_INDEXES}
    ).fetchall()


# --- before the copy -------------------------------------------------------------------------------------------------


def is_worth_it(connection: Connection, table: ShardedTable) -> bool:
    """Whether the table seems to have no row, and indexes to set aside; asked without a lock that anybody notices.

    Not where it has no primary key: the rows that replication changes meanwhile may then be found by another index.
    """
    found = describe(connection, table)
    if found is None or not found.primary_key or not _candidates(connection, table):
        return False
    return is_empty(connection, table)


def set_aside(connection: Connection, table: ShardedTable, token: int) -> None:
    """Drop the indexes of a table that has no row, and note them; a table with rows is left as it is.

    One attempt at the lock; also where the look for rows would take long, as many dead ones are there, all is left.
    """
    with suppress(psycopg.errors.QueryCanceled), transaction(connection, *_SETTING_ASIDE, step="set_aside"):
        claim(connection, token)
        connection.execute(sql.SQL("LOCK TABLE {} IN ACCESS EXCLUSIVE MODE").format(relation(table)))
        if not is_empty(connection, table):
            return
        for schema, name, table_name, definition, tablespace, statements in _candidates(connection, table):
            if _stored(connection, schema, name) not in (None, definition):
                continue  # somebody made another one of that name
            connection.execute(
                # One that a killed mover has built, and not finished, is noted with more than it has now.
                "INSERT INTO shardkit.set_aside (schema, name, relation, definition, tablespace, statements) "
                "VALUES (%s, %s, %s, %s, %s, %s) ON CONFLICT DO NOTHING",
                (schema, name, table_name, definition, tablespace, statements),
            )
            connection.execute(sql.SQL("DROP INDEX {}").format(sql.Identifier(schema, name)))


def _stored(connection: Connection, schema: str, name: str) -> Any:
    query = "SELECT definition FROM shardkit.set_aside WHERE (schema, name) = (%s, %s)"
    return value(connection, query, (schema, name))


# --- after it --------------------------------------------------------------------------------------------------------


def state(connection: Connection, index: SetAside) -> State:
    """What is there of an index that was set aside."""
    found = connection.execute(
        _STATE, {"schema": index.schema, "name": index.name, "definition": index.definition}
    ).fetchone()
    if found is not None:
        valid, same = found
        return State.TAKEN if not same else State.BUILT if valid else State.UNFINISHED
    table = sql.Identifier(index.schema, index.relation).as_string(connection)
    there = value(connection, "SELECT to_regclass(%s)", (table,)) is not None
    return State.MISSING if there else State.WITHOUT_TABLE


def build(connection: Connection, index: SetAside, token: int) -> None:
    """Build one that is missing, outside any transaction; returns with whatever became of it, see `state`.

    It keeps nobody from writing, and so waits for the transactions that write the table or may read it without. Not
    for two callers of one mover at once. `IndexNotBuilt` where the server refuses.
    """
    with transaction(connection, *SHORT, step="build_set_aside"):
        claim(connection, token)
    failpoint("put_back.before")
    try:
        connection.execute("SELECT set_config('default_tablespace', %s, false)", (index.tablespace,))
        connection.execute(index.statement.encode())  # made by the server, with every name quoted
    except (psycopg.errors.DuplicateTable, psycopg.errors.UniqueViolation, psycopg.errors.DeadlockDetected):
        return  # by what a killed mover left at work; or a deadlock, which leaves it unfinished
    except psycopg.Error as error:
        if _may_pass(error):
            raise
        raise IndexNotBuilt(
            f"The index {index} cannot be built again: {error.diag.message_primary or error}",
            definition=index.definition,
        ) from error
    finally:
        with suppress(psycopg.OperationalError):  # the connection is gone
            connection.execute("RESET default_tablespace")
    failpoint("put_back.after")


def _may_pass(error: psycopg.Error) -> bool:
    """Whether the connection, a lock or an operator ended it, and not the index or the server's disk."""
    if error.sqlstate is None:
        return isinstance(error, psycopg.OperationalError)
    return error.sqlstate.startswith(("08", "57", "25", "55"))


def drop_unfinished(connection: Connection, index: SetAside, token: int) -> None:
    """Drop what an interrupted build left. One attempt at the lock, and none at what is finished meanwhile."""
    with transaction(connection, *_CLEARING, step="drop_unfinished"):
        # In one transaction: it may be another mover by now that finishes it.
        claim(connection, token)
        if state(connection, index) is State.UNFINISHED:
            connection.execute(sql.SQL("DROP INDEX {}").format(index._identifier))


def finish(connection: Connection, index: SetAside, token: int) -> None:
    """Give a built index what it had besides, and forget it; one whose name is taken, or whose table has gone, is
    forgotten alone. One attempt at the lock."""
    with transaction(connection, *_CLEARING, step="put_back"):
        claim(connection, token)
        if state(connection, index) is State.BUILT:
            for statement in index.statements:
                connection.execute(statement.encode())  # made by the server as well
        connection.execute(
            "DELETE FROM shardkit.set_aside WHERE (schema, name) = (%s, %s)", (index.schema, index.name)
        )


def progress(connection: Connection, pid: int) -> str | None:
    """How far backend ``pid`` is with an index, in words; None if it builds none now."""
    found = connection.execute(_PROGRESS, (pid,)).fetchone()
    if found is None:
        return None
    phase, percent = found
    return str(phase) if percent is None else f"{phase}, {min(percent, 100)} %"


# --- where no mover does it ------------------------------------------------------------------------------------------


def remedy(connection: Connection, index: SetAside) -> str:
    """The SQL, outside a transaction, that puts an index back."""
    return str(value(connection, _REMEDY, (index.schema, index.name)) or "")


def put_back(connection: Connection, index: SetAside, token: int) -> None:
    """Put an index back, with nobody to look after it; one attempt at each lock."""
    if state(connection, index) is State.UNFINISHED:
        drop_unfinished(connection, index, token)
    if state(connection, index) is State.MISSING:
        build(connection, index, token)
    if state(connection, index) not in (State.UNFINISHED, State.MISSING):
        finish(connection, index, token)
