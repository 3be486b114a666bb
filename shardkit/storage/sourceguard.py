"""The triggers that stand on the source's tables from PREPARE to DONE, and on the target's until the decision.

They refuse what logical replication cannot carry (TRUNCATE, an UPDATE that changes a row's position), note which
moving rows are written, so that the last comparison before the decision looks at those alone, and, from the
decision on, refuse writes to moved rows by anyone who goes round the session. Whoever writes a moving row holds an
advisory lock to the end of its transaction, for which the decision waits: a transaction without the fence could
otherwise commit a write after the last comparison. They are ordinary triggers: a purge, and
the apply of replicated changes, run with session_replication_role = replica and pass them by.

On the target they only note: rows arrive there by replication, which passes them by, so whoever fires one goes round
the session, or a cascade does on both sides; the comparison tells which. A target whose source is to be kept has the
refusals (`install_refusals`) from PREPARE on as well: what it does with the moved rows goes back by replication. From
its opening to a rollback it notes nothing, or notes would pile up while nobody looks.

What a REPEATABLE READ transaction reads is as old as its snapshot, ``shardkit.moved`` included. So it is refused as by
a fence: it locks an empty relation by a name which the decision renames, and names are looked up as they are now.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from psycopg import Cursor, sql

from shardkit.core.keyrange import ArcSet
from shardkit.core.topology import ShardedTable

from .change import claim
from .connections import SHORT, Connection, transaction, value
from .digest import TEXT_FORM, identity_text
from .fence import WRITERS_LOCK
from .inspection import parts
from .predicate import position, relation, within
from .tables import Table, describe

_ALWAYS_ALIKE = {
    "bool",
    "int2",
    "int4",
    "int8",
    "numeric",
    "text",
    "varchar",
    "bpchar",
    "uuid",
    "date",
    "timestamp",
}
"""Types whose form in JSON depends on no setting."""


def _function(transfer: int, index: int) -> sql.Identifier:
    return sql.Identifier("shardkit", f"note_{transfer}_{index}")


def _marker(transfer: int, state: str) -> sql.Identifier:
    """The empty relation whose name says whether the rows of a transfer are ``moving`` or have ``moved``."""
    return sql.Identifier("shardkit", f"{state}_{transfer}")


def _trigger_name(transfer: int, what: str) -> str:
    # 'zz': after the application's own triggers, of which a BEFORE one may still change the key.
    return f"zz_shardkit_{transfer}_{what}"


def _trigger(transfer: int, what: str) -> sql.Identifier:
    return sql.Identifier(_trigger_name(transfer, what))


_BODY = sql.SQL("""
DECLARE
    new_owner text;
    before text;
    after text;
BEGIN
    PERFORM pg_advisory_xact_lock_shared({lock}, {transfer});
    SELECT 'shard ' || m.target INTO new_owner FROM shardkit.moved m WHERE m.transfer_id = {transfer};
    IF new_owner IS NULL AND current_setting('transaction_isolation') <> 'read committed' THEN
        BEGIN
            LOCK TABLE {moving} IN ACCESS SHARE MODE;
        EXCEPTION WHEN undefined_table THEN
            new_owner := 'another shard';
        END;
    END IF;
    IF new_owner IS NOT NULL THEN
        RAISE EXCEPTION 'shardkit: this row of %.% has moved to %', TG_TABLE_SCHEMA, TG_TABLE_NAME, new_owner
            USING ERRCODE = 'SK001', HINT = 'Write through the shardkit session, which knows the owner of a key.';
    END IF;
    IF TG_OP <> 'INSERT' THEN
        before := {before};
        INSERT INTO shardkit.changed VALUES ({transfer}, {index}, before);
    END IF;
    IF TG_OP <> 'DELETE' THEN
        after := {after};
        IF after IS DISTINCT FROM before THEN
            INSERT INTO shardkit.changed VALUES ({transfer}, {index}, after);
        END IF;
    END IF;
    RETURN NULL;
END
""")


_WATCHING = sql.SQL("""
BEGIN
    IF TG_OP <> 'INSERT' AND NOT shardkit.owned(OLD.{key}) THEN
        INSERT INTO shardkit.changed VALUES ({transfer}, {index}, {before});
    END IF;
    IF TG_OP <> 'DELETE' AND NOT shardkit.owned(NEW.{key}) THEN
        INSERT INTO shardkit.changed VALUES ({transfer}, {index}, {after});
    END IF;
    RETURN NULL;
END
""")


def _text_form(found: Table, identity: Sequence[str]) -> sql.Composable:
    """Settings for a function that notes rows, where the text of which row it is depends on those of its caller."""
    types = {column.base for column in found.columns if column.name in identity}
    if types <= _ALWAYS_ALIKE:
        return sql.SQL("")
    return sql.SQL(" ").join(
        sql.SQL("SET {} = {}").format(sql.Identifier(name.lower()), sql.Literal(setting))
        for name, setting in TEXT_FORM
        if name not in ("DateStyle", "row_security")
    ) + sql.SQL(" SET datestyle = 'ISO', 'YMD'")


def installed(source: Connection, transfer: int, index: int) -> bool:
    """Whether the triggers of a transfer stand on its table number ``index``."""
    name = _function(transfer, index).as_string(source)
    return value(source, "SELECT to_regprocedure(%s || '()')", (name,)) is not None


def install(source: Connection, transfer: int, index: int, table: ShardedTable, arcs: ArcSet) -> None:
    """Make the triggers of one table, in the caller's transaction; waits for the table's writers under lock_timeout."""
    install_refusals(source, transfer, table)
    if installed(source, transfer, index):
        return
    found = describe(source, table)
    assert found is not None
    identity = found.row_identity(table.key)
    body = _BODY.format(
        lock=sql.Literal(WRITERS_LOCK),
        transfer=sql.Literal(transfer),
        index=sql.Literal(index),
        before=identity_text(identity, sql.SQL("OLD")),
        after=identity_text(identity, sql.SQL("NEW")),
        moving=_marker(transfer, "moving"),
    )
    source.execute(sql.SQL("CREATE TABLE IF NOT EXISTS {} ()").format(_marker(transfer, "moving")))
    _note(source, transfer, index, table, arcs, body, _text_form(found, identity))


def install_refusals(source: Connection, transfer: int, table: ShardedTable) -> None:
    """Make the triggers of one table that refuse what replication cannot carry, as `install` does."""
    if _refuses(source, transfer, table):
        return
    source.execute(
        sql.SQL(
            "CREATE TRIGGER {} BEFORE UPDATE ON {} FOR EACH ROW WHEN ({} IS DISTINCT FROM {}) "
            "EXECUTE FUNCTION shardkit.refuse_rekey()"
        ).format(_trigger(transfer, "rekey"), relation(table), position(table, "OLD"), position(table, "NEW"))
    )
    # A statement's trigger fires for the table that it names; partitions can be named by themselves.
    for part in parts(source, table):
        source.execute(
            sql.SQL(
                "CREATE TRIGGER {} BEFORE TRUNCATE ON {} FOR EACH STATEMENT "
                "EXECUTE FUNCTION shardkit.refuse_truncate()"
            ).format(_trigger(transfer, "truncate"), part)
        )


def _refuses(source: Connection, transfer: int, table: ShardedTable) -> bool:
    query = "SELECT 1 FROM pg_trigger WHERE tgrelid = %s::regclass AND tgname = %s"
    name = relation(table).as_string(source)
    return value(source, query, (name, _trigger_name(transfer, "rekey"))) is not None


def stands(connection: Connection, transfer: int, index: int, table: ShardedTable) -> bool:
    """Whether any triggers of a transfer stand on its table number ``index``: those that note, or that refuse."""
    return installed(connection, transfer, index) or _refuses(connection, transfer, table)


def watch(
    target: Connection, transfer: int, index: int, table: ShardedTable, arcs: ArcSet, like: Table
) -> None:
    """Make the triggers that note who else writes arriving rows of one table of the target; else as `install`.

    ``like`` is the source's table: which row it is has to read as it does there.
    """
    if installed(target, transfer, index):
        return
    identity = like.row_identity(table.key)
    body = _WATCHING.format(
        key=sql.Identifier(table.key),
        transfer=sql.Literal(transfer),
        index=sql.Literal(index),
        before=identity_text(identity, sql.SQL("OLD")),
        after=identity_text(identity, sql.SQL("NEW")),
    )
    _note(target, transfer, index, table, arcs, body, _text_form(like, identity))


def _note(
    connection: Connection,
    transfer: int,
    index: int,
    table: ShardedTable,
    arcs: ArcSet,
    body: sql.Composed,
    text_form: sql.Composable,
) -> None:
    """Make the function, and the triggers that call it for rows of ``arcs``."""
    function = _function(transfer, index)
    # Definer: the application's role may write its tables and not ours.
    connection.execute(
        sql.SQL(
            "CREATE FUNCTION {}() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER "
            "SET search_path = pg_catalog, pg_temp {} AS {}"
        ).format(function, text_form, sql.Literal(body.as_string(connection)))
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


def remove(source: Connection, transfer: int, index: int, table: ShardedTable) -> None:
    """Drop the triggers of one table, in the caller's transaction."""
    if _refuses(source, transfer, table):
        source.execute(
            sql.SQL("DROP TRIGGER IF EXISTS {} ON {}").format(_trigger(transfer, "rekey"), relation(table))
        )
        for part in parts(source, table):
            source.execute(
                sql.SQL("DROP TRIGGER IF EXISTS {} ON {}").format(_trigger(transfer, "truncate"), part)
            )
    remove_notes(source, transfer, index)


def remove_notes(source: Connection, transfer: int, index: int) -> None:
    """Drop the triggers of table number ``index`` that note, in the caller's transaction."""
    if installed(source, transfer, index):
        source.execute(sql.SQL("DROP FUNCTION {}() CASCADE").format(_function(transfer, index)))


def remove_strays(source: Connection, transfer: int) -> None:
    """Drop the triggers on what was a partition and was detached, when those of all tables are gone."""
    strays = source.execute(
        """
        SELECT n.nspname, c.relname, t.tgname FROM pg_trigger t
        JOIN pg_class c ON c.oid = t.tgrelid JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE t.tgname ~ %s AND NOT t.tgisinternal AND t.tgparentid = 0
        """,
        (f"^zz_shardkit_{transfer}_",),
    ).fetchall()
    for schema, name, trigger in strays:
        source.execute(
            sql.SQL("DROP TRIGGER {} ON {}").format(sql.Identifier(trigger), sql.Identifier(schema, name))
        )


def forget_changes(source: Connection, transfer: int, token: int) -> None:
    """Drop what was noted and committed so far: what is compared from now on sees those writes."""
    with transaction(source, *SHORT, step="forget_changes"):
        claim(source, token)
        source.execute("DELETE FROM shardkit.changed WHERE transfer_id = %s", (transfer,))


def take_changes(source: Connection, transfer: int, token: int, limit: int) -> list[tuple[int, str]]:
    """Take the rows noted so far, as (table number, `digest.identity_text`), without repetition; about ``limit`` at
    most.

    `MoverSuperseded` where another mover compares now: a note that went to the wrong one would never be looked at.
    """
    with transaction(source, *SHORT, step="take_changes"):
        claim(source, token)
        rows = source.execute(
            """
            WITH taken AS (
                DELETE FROM shardkit.changed
                WHERE ctid = ANY (ARRAY(SELECT ctid FROM shardkit.changed WHERE transfer_id = %s LIMIT %s))
                RETURNING relation, key
            )
            SELECT DISTINCT relation, key FROM taken
            """,
            (transfer, limit),
        )
        return [(index, key) for index, key in rows]


def peek_changes(source: Connection, transfer: int, limit: int | None = None) -> list[tuple[int, str]]:
    """The rows noted so far, ``limit`` at most if one is given, left where they are."""
    return read_changes(ask_changes(source, transfer, limit))


def ask_changes(source: Connection, transfer: int, limit: int | None = None) -> Cursor[Any]:
    """The question of `peek_changes`, for `connections.at_once`; `read_changes` has the answer."""
    return source.execute(
        "SELECT DISTINCT relation, key FROM shardkit.changed WHERE transfer_id = %s LIMIT %s",
        (transfer, limit),
    )


def read_changes(answer: Cursor[Any]) -> list[tuple[int, str]]:
    """The answer of `ask_changes`."""
    return [(index, key) for index, key in answer]


def noted_among(source: Connection, transfer: int, rows: Collection[tuple[int, str]]) -> set[tuple[int, str]]:
    """Which of these rows are noted."""
    found = source.execute(
        """
        SELECT DISTINCT relation, key FROM shardkit.changed
        JOIN unnest(%s::int[], %s::text[]) AS asked (relation, key) USING (relation, key)
        WHERE transfer_id = %s
        """,
        ([index for index, _ in rows], [key for _, key in rows], transfer),
    )
    return {(index, key) for index, key in found}


def wait_for_writers(transfer: int) -> sql.Composed:
    """What waits, as long as ``lock_timeout`` allows, for every transaction that wrote a moving row, behind the fence
    or not; those that are about to write one wait for the caller's transaction."""
    return sql.SQL("SELECT pg_advisory_xact_lock({}, {})").format(
        sql.Literal(WRITERS_LOCK), sql.Literal(transfer)
    )


def set_moved(transfer: int, target: str) -> sql.Composed:
    """What refuses writes to the moved rows, from the caller's commit on; part of the decision."""
    moving, moved = _marker(transfer, "moving"), sql.Identifier(f"moved_{transfer}")
    return sql.SQL(
        "INSERT INTO shardkit.moved (transfer_id, target) VALUES ({}, {}) ON CONFLICT DO NOTHING; "
        "ALTER TABLE IF EXISTS {} RENAME TO {}"
    ).format(sql.Literal(transfer), sql.Literal(target), moving, moved)


def set_back(source: Connection, transfer: int) -> None:
    """From the caller's commit on, take writes to the rows again, which have come back; part of that opening."""
    source.execute("DELETE FROM shardkit.moved WHERE transfer_id = %s", (transfer,))
    moved, moving = _marker(transfer, "moved"), sql.Identifier(f"moving_{transfer}")
    source.execute(sql.SQL("ALTER TABLE IF EXISTS {} RENAME TO {}").format(moved, moving))


def clear(source: Connection, transfer: int) -> None:
    """Drop what a transfer left in shardkit's own tables of the source."""
    source.execute("DELETE FROM shardkit.changed WHERE transfer_id = %s", (transfer,))
    source.execute("DELETE FROM shardkit.moved WHERE transfer_id = %s", (transfer,))
    for state in ("moving", "moved"):
        source.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(_marker(transfer, state)))
