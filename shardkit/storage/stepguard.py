"""The triggers that stand on the source's tables while rows move in steps under the fence.

A step locks the fence, so nobody behind it writes meanwhile. Whoever goes round the session holds no fence: these
triggers take it in its name, to the end of its transaction, and refuse a row that the shard does not own any more. In
a REPEATABLE READ transaction the names of fences are those of its snapshot, so one that began before a step finds its
fence gone. As those of `storage.sourceguard` they do not act on the mover itself (session_replication_role = replica).
"""

from __future__ import annotations

from psycopg import sql

from shardkit.core.keyrange import ArcSet
from shardkit.core.topology import ShardedTable

from .connections import Connection, value
from .fence import RELATIONS
from .inspection import parts
from .predicate import relation, within

_BODY = sql.SQL("""
DECLARE
    fence text;
    tries integer := 0;
BEGIN
    LOOP
        fence := (SELECT f.relname FROM ({fences}) AS f ORDER BY f.relname LIMIT 1);
        BEGIN
            EXECUTE format('LOCK TABLE shardkit.%I IN ACCESS SHARE MODE', fence);
            EXIT;
        EXCEPTION WHEN undefined_table THEN
            tries := tries + 1;
            IF tries > 100 OR current_setting('transaction_isolation') <> 'read committed' THEN
                RAISE EXCEPTION 'shardkit: rows of %.% have moved since this transaction began',
                    TG_TABLE_SCHEMA, TG_TABLE_NAME USING ERRCODE = 'serialization_failure';
            END IF;
        END;
    END LOOP;
    IF {lost} THEN
        RAISE EXCEPTION 'shardkit: this row of %.% has moved to another shard', TG_TABLE_SCHEMA, TG_TABLE_NAME
            USING ERRCODE = 'SK001', HINT = 'Write through the shardkit session, which knows the owner of a key.';
    END IF;
    RETURN NULL;
END
""")


def _function(transfer: int, index: int) -> sql.Identifier:
    return sql.Identifier("shardkit", f"stand_{transfer}_{index}")


def _trigger(transfer: int, what: str) -> sql.Identifier:
    return sql.Identifier(f"zz_shardkit_{transfer}_{what}")


def installed(connection: Connection, transfer: int, index: int) -> bool:
    """Whether the triggers of a transfer stand on its table number ``index``."""
    name = _function(transfer, index).as_string(connection)
    return value(connection, "SELECT to_regprocedure(%s || '()')", (name,)) is not None


def install(connection: Connection, transfer: int, index: int, table: ShardedTable, arcs: ArcSet) -> None:
    """Make the triggers of one table, in the caller's transaction; waits for the table's writers under lock_timeout."""
    if installed(connection, transfer, index):
        return
    function = _function(transfer, index)
    key = sql.Identifier(table.key)
    lost = sql.SQL(
        "(TG_OP <> 'INSERT' AND NOT shardkit.owned(OLD.{key})) OR (TG_OP <> 'DELETE' AND NOT shardkit.owned(NEW.{key}))"
    ).format(key=key)
    body = _BODY.format(fences=sql.SQL(RELATIONS), lost=lost)
    # Definer: the application's role may write its tables and not lock ours.
    connection.execute(
        sql.SQL(
            "CREATE FUNCTION {}() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER "
            "SET search_path = pg_catalog, pg_temp AS {}"
        ).format(function, sql.Literal(body.as_string(connection)))
    )
    old, new = within(table, arcs, "OLD"), within(table, arcs, "NEW")
    for what, event, condition in (
        ("insert", sql.SQL("INSERT"), new),
        ("update", sql.SQL("UPDATE"), sql.SQL("{} OR {}").format(old, new)),
        ("delete", sql.SQL("DELETE"), old),
    ):
        connection.execute(
            sql.SQL("CREATE TRIGGER {} AFTER {} ON {} FOR EACH ROW WHEN ({}) EXECUTE FUNCTION {}()").format(
                _trigger(transfer, what), event, relation(table), condition, function
            )
        )
    for part in parts(connection, table):
        connection.execute(
            sql.SQL(
                "CREATE TRIGGER {} BEFORE TRUNCATE ON {} FOR EACH STATEMENT "
                "EXECUTE FUNCTION shardkit.refuse_truncate()"
            ).format(_trigger(transfer, "truncate"), part)
        )


def remove(connection: Connection, transfer: int, index: int, table: ShardedTable) -> None:
    """Drop the triggers of one table, in the caller's transaction."""
    if not installed(connection, transfer, index):
        return
    for part in parts(connection, table):
        connection.execute(
            sql.SQL("DROP TRIGGER IF EXISTS {} ON {}").format(_trigger(transfer, "truncate"), part)
        )
    connection.execute(sql.SQL("DROP FUNCTION {}() CASCADE").format(_function(transfer, index)))
