"""The replica identity of a moving table: it must hold the shard key, or the row filter refuses every UPDATE.

A primary key with the shard key in it is best. Else a unique index (shard key, primary key) is built without blocking
writers; a table without a primary key gets FULL. What was there before is stored on the shard and set back when the
job is over.
"""

from __future__ import annotations

import hashlib

from psycopg import sql

from shardkit.core.topology import ShardedTable

from .change import claim
from .connections import SHORT, Connection, transaction, value
from .failpoints import failpoint
from .predicate import relation
from .tables import IDENTITY_INDEX, describe

# ALTER TABLE waits for every reader, and every reader behind it waits too.
_SETTINGS = (*SHORT, ("lock_timeout", "10ms"), ("synchronous_commit", "on"))


def _index(table: ShardedTable) -> str:
    # One a table, in 63 bytes, which a table's name may fill: the oid would do, but is another after a restore.
    return IDENTITY_INDEX + hashlib.sha256(str(table).encode()).hexdigest()[:16]


def fits(connection: Connection, table: ShardedTable) -> bool:
    """Whether the table's replica identity holds the shard key already."""
    found = describe(connection, table)
    return found is not None and table.key in found.identity_columns


def prepare_index(connection: Connection, table: ShardedTable, token: int) -> None:
    """Build the unique index, outside any transaction; one that an interrupted run left invalid is built again.

    Not for two callers at once: each would take the other's unfinished index for one that was left.
    """
    found = describe(connection, table)
    if found is None or not found.primary_key or table.key in found.identity_columns:
        return
    name = sql.Identifier(table.schema, _index(table))
    valid = connection.execute(
        "SELECT i.indisvalid FROM pg_index i WHERE i.indexrelid = to_regclass(%s)",
        (name.as_string(connection),),
    ).fetchone()
    if valid is not None and valid[0]:
        return
    with transaction(connection, *SHORT, step="prepare_index"):
        claim(connection, token)
    connection.execute(sql.SQL("DROP INDEX CONCURRENTLY IF EXISTS {}").format(name))
    columns = [table.key, *(column for column in found.primary_key if column != table.key)]
    failpoint("build_index.before")
    connection.execute(
        sql.SQL("CREATE UNIQUE INDEX CONCURRENTLY {} ON {} ({})").format(
            sql.Identifier(_index(table)), relation(table), sql.SQL(", ").join(map(sql.Identifier, columns))
        )
    )
    failpoint("build_index.after")


def is_changed(connection: Connection, table: ShardedTable) -> bool:
    """Whether `restore` has anything to do."""
    name = relation(table).as_string(connection)
    noted = value(connection, "SELECT 1 FROM shardkit.replica_identity WHERE relation = %s", (name,))
    return noted is not None or _exists(connection, table)


def _exists(connection: Connection, table: ShardedTable) -> bool:
    name = sql.Identifier(table.schema, _index(table)).as_string(connection)
    return value(connection, "SELECT to_regclass(%s)", (name,)) is not None


def use(connection: Connection, table: ShardedTable, token: int) -> None:
    """Switch to the index, or to FULL; remembers what was there. One attempt at the lock."""
    found = describe(connection, table)
    if found is None or table.key in found.identity_columns:
        return
    name = relation(table).as_string(connection)
    with transaction(connection, *_SETTINGS, step="use_identity"):
        claim(connection, token)
        connection.execute(
            """
            INSERT INTO shardkit.replica_identity (relation, kind, index_name)
            SELECT %(name)s::text, c.relreplident, (
                SELECT x.relname FROM pg_index i JOIN pg_class x ON x.oid = i.indexrelid
                WHERE i.indrelid = c.oid AND i.indisreplident)
            FROM pg_class c WHERE c.oid = %(name)s::text::regclass
            ON CONFLICT DO NOTHING
            """,
            {"name": name},
        )
        how: sql.Composable = sql.SQL("FULL")
        if found.primary_key:
            how = sql.SQL("USING INDEX {}").format(sql.Identifier(_index(table)))
        connection.execute(sql.SQL("ALTER TABLE {} REPLICA IDENTITY {}").format(relation(table), how))


def restore(connection: Connection, table: ShardedTable, token: int) -> None:
    """Set back what was there before the job, and drop the index. One attempt at the lock; can be run again."""
    name = relation(table).as_string(connection)
    row = connection.execute(
        "SELECT kind::text, index_name FROM shardkit.replica_identity WHERE relation = %s", (name,)
    ).fetchone()
    unused = sql.SQL("DROP INDEX IF EXISTS {}").format(sql.Identifier(table.schema, _index(table)))
    if row is None:
        if _exists(connection, table):  # it was built, or was being built, and never put to use
            with transaction(connection, *_SETTINGS, step="restore_identity"):
                claim(connection, token)
                connection.execute(unused)
        return
    kind, index = row
    how = {
        "d": sql.SQL("DEFAULT"),
        "n": sql.SQL("NOTHING"),
        "f": sql.SQL("FULL"),
        "i": sql.SQL("USING INDEX {}").format(sql.Identifier(index or "")) if index else sql.SQL("DEFAULT"),
    }[kind]
    with transaction(connection, *_SETTINGS, step="restore_identity"):
        claim(connection, token)  # a slow mover would take it from the next one's publication
        connection.execute(sql.SQL("ALTER TABLE {} REPLICA IDENTITY {}").format(relation(table), how))
        connection.execute(unused)
        connection.execute("DELETE FROM shardkit.replica_identity WHERE relation = %s", (name,))
