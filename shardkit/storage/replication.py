"""Logical replication of arcs: publication and slot on the source, subscription on the target.

All three carry one name, which the caller has stored before anything is made. The slot is made by the mover and not
by CREATE SUBSCRIPTION: that one leaves an orphan when it is killed, and waits for ever between two databases of one
server. Every function looks before it acts, so that each can be run again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from shardkit.core.keyrange import ArcSet
from shardkit.core.topology import ShardedTable

from .connections import Connection, at_once, only, value
from .predicate import relation, within

SLOT_LOCK = 0x736C6F74
"""First key of the advisory locks that makers and droppers of slots hold, a hash of the slot's name the second."""
_PEER_PARAMETERS = (
    "host",
    "hostaddr",
    "port",
    "dbname",
    "user",
    "sslmode",
    "sslrootcert",
    "sslcert",
    "sslkey",
)
# pg_subscription is shared by all databases of a server.
_SUBSCRIPTION = """
SELECT 1 FROM pg_subscription
WHERE subdbid = (SELECT oid FROM pg_database WHERE datname = current_database()) AND subname = %s
"""
_COPY_STATE = """
SELECT s.oid,
       (SELECT count(w.pid) FROM pg_stat_subscription w WHERE w.subid = s.oid),
       a.pid, a.received_lsn::text, s.subenabled,
       (SELECT count(*) FROM pg_subscription_rel r WHERE r.srsubid = s.oid AND r.srsubstate = 'r'),
       (SELECT count(*) FROM pg_subscription_rel r WHERE r.srsubid = s.oid),
       coalesce((SELECT t.apply_error_count + t.sync_error_count
                 FROM pg_stat_subscription_stats t WHERE t.subid = s.oid), 0),
       (SELECT coalesce(jsonb_object_agg(p.relid::regclass::text,
                                         jsonb_build_array(p.tuples_processed, p.bytes_processed)), '{{}}')
        FROM pg_stat_progress_copy p
        JOIN pg_subscription_rel r ON r.srrelid = p.relid AND r.srsubid = s.oid
        WHERE p.datname = current_database())
FROM pg_subscription s
-- Of several that apply in parallel it is the leader alone that has received something.
LEFT JOIN LATERAL (SELECT w.pid, w.received_lsn FROM pg_stat_subscription w WHERE w.subid = s.oid AND w.relid IS NULL
                   ORDER BY w.received_lsn DESC NULLS LAST LIMIT 1) a ON true
WHERE s.subdbid = (SELECT oid FROM pg_database WHERE datname = current_database()) AND s.subname = {}
"""


@dataclass(frozen=True, slots=True)
class CopyState:
    """What the target tells of a subscription: tables by state, workers, the rows and bytes of the copies that run.

    ``applier`` is the process that applies, and ``received`` how far it has read the source's WAL; None without one.
    """

    oid: int
    workers: int
    applier: int | None
    received: str | None
    enabled: bool
    ready: int
    tables: int
    errors: int
    rows: dict[str, int]
    bytes: dict[str, int]

    def has_applied(self, position: str) -> bool:
        """Whether all that was committed on the source before a position of its WAL is applied, and to be seen.

        Messages are applied one after the other, and a worker begins where it, or one before it, ended: what was
        received from beyond the position came after all of it. At the position itself may be the end of a commit that
        has come and is not applied yet.
        """
        return self.received is not None and _bytes(self.received) > _bytes(position)


@dataclass(frozen=True, slots=True)
class SlotState:
    """Whether a slot can be streamed from; else the backend that makes it now, if one does."""

    ready: bool
    maker: int | None


@dataclass(frozen=True, slots=True)
class Sender:
    """What the source tells of its walsender; ``lag_bytes`` is None while it knows no position."""

    state: str
    lag_bytes: int | None


def _bytes(position: str) -> int:
    """A position of the WAL, as PostgreSQL writes it, in bytes."""
    high, low = position.split("/")
    return int(high, 16) << 32 | int(low, 16)


def peer_conninfo(connection: Connection) -> str:
    """How a target connects to the server of this connection: as we did, password included."""
    mine = connection.info.get_parameters()
    kept: dict[str, str] = {name: mine[name] for name in _PEER_PARAMETERS if name in mine}
    kept.setdefault("host", connection.info.host)
    kept.setdefault("port", str(connection.info.port))
    kept.setdefault("dbname", connection.info.dbname)
    kept.setdefault("user", connection.info.user)
    if connection.info.password:
        kept["password"] = connection.info.password
    return make_conninfo("", connect_timeout="10", **kept)


# --- on the source -------------------------------------------------------------------------------------------------


def publication_exists(source: Connection, name: str) -> bool:
    """Whether the publication is there."""
    return value(source, "SELECT 1 FROM pg_publication WHERE pubname = %s", (name,)) is not None


def create_publication(source: Connection, name: str, tables: Iterable[ShardedTable], arcs: ArcSet) -> None:
    """Publish the rows of ``arcs`` of every table, partitioned ones as their root."""
    if publication_exists(source, name):
        return
    filtered = sql.SQL(", ").join(
        sql.SQL("{} WHERE ({})").format(relation(table), within(table, arcs)) for table in tables
    )
    source.execute(
        # Not TRUNCATE: row filters do not apply to it, and it would empty the target of its own rows.
        sql.SQL(
            "CREATE PUBLICATION {} FOR TABLE {} "
            "WITH (publish_via_partition_root = true, publish = 'insert, update, delete')"
        ).format(sql.Identifier(name), filtered)
    )


def drop_publication(source: Connection, name: str) -> None:
    """Drop the publication if it is there."""
    source.execute(sql.SQL("DROP PUBLICATION IF EXISTS {}").format(sql.Identifier(name)))


def slot_exists(source: Connection, name: str) -> bool:
    """Whether the slot is there, be it of use or not."""
    return value(source, "SELECT 1 FROM pg_replication_slots WHERE slot_name = %s", (name,)) is not None


def slot_state(source: Connection, name: str) -> SlotState:
    """Whether the slot, before its subscription uses it, is there, or about to be."""
    row = source.execute(
        "SELECT confirmed_flush_lsn IS NOT NULL AND wal_status IS DISTINCT FROM 'lost', active_pid "
        "FROM pg_replication_slots WHERE slot_name = %s",
        (name,),
    ).fetchone()
    if row is None:
        return SlotState(False, None)
    confirmed, pid = row
    return SlotState(confirmed and pid is None, pid)


def slot_is_lost(source: Connection, name: str) -> bool:
    """Whether nothing can be streamed from a slot any more: it is gone, or outgrew ``max_slot_wal_keep_size``."""
    query = "SELECT 1 FROM pg_replication_slots WHERE slot_name = %s AND wal_status IS DISTINCT FROM 'lost'"
    return value(source, query, (name,)) is None


def create_slot(source: Connection, name: str) -> None:
    """Make the slot, which is not there. Waits for every transaction that writes on the server now; a creation that is
    cancelled leaves nothing."""
    source.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", (name,))


def drop_slot(source: Connection, name: str) -> bool:
    """Drop the slot; False if it is still in use, which ends by itself soon after the subscription is gone."""
    try:
        with source.transaction():
            source.execute(
                "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = %s",
                (name,),
            )
    except psycopg.errors.ObjectInUse:
        return False
    return True


@contextmanager
def slot_lock(source: Connection, name: str) -> Iterator[bool]:
    """Hold what whoever makes or drops this slot holds; False if another has it.

    A slot is made in no transaction that has written, so not in one with the mover's token. With this lock around
    both, nobody makes a slot between the token and the drop of whoever came later.
    """
    lock = (SLOT_LOCK, name)
    if not value(source, "SELECT pg_try_advisory_lock(%s, hashtext(%s))", lock):
        yield False
        return
    try:
        yield True
    finally:
        with suppress(psycopg.OperationalError):  # the session is gone, and its locks are
            source.execute("SELECT pg_advisory_unlock(%s, hashtext(%s))", lock)


def blocker(connection: Connection, pid: int | None) -> str | None:
    """Whom a backend waits for, in words; None if it waits for nobody."""
    row = connection.execute(
        """
        SELECT b.pid, a.usename, a.application_name, extract(epoch FROM clock_timestamp() - a.xact_start)::float8,
               a.query, (SELECT gid FROM pg_prepared_xacts ORDER BY prepared LIMIT 1)
        FROM unnest(pg_blocking_pids(%s)) b (pid) LEFT JOIN pg_stat_activity a ON a.pid = b.pid
        ORDER BY a.xact_start LIMIT 1
        """,
        (pid,),
    ).fetchone()
    if row is None:
        return None
    blocking, user, application, age, query, gid = row
    if blocking == 0:
        return f"prepared transaction {gid!r}"
    return _session(blocking, user, application, age, query)


def copied_by_blockers(connection: Connection, pid: int) -> int | None:
    """Rows that subscriptions have copied so far into the tables they begin with, where backend ``pid`` waits for them;
    None if it does not."""
    found = value(
        connection,
        """
        SELECT coalesce(sum(p.tuples_processed), 0)::bigint FROM pg_stat_subscription s
        LEFT JOIN pg_stat_progress_copy p ON p.pid = s.pid
        WHERE s.relid IS NOT NULL AND s.pid = ANY(pg_blocking_pids(%s))
        HAVING count(*) > 0
        """,
        (pid,),
    )
    return None if found is None else int(found)


def oldest_writer(source: Connection) -> str | None:
    """The transaction that slot creation waits for, in words."""
    row = source.execute(
        """
        SELECT pid, usename, application_name, extract(epoch FROM clock_timestamp() - xact_start)::float8, query
        FROM pg_stat_activity
        WHERE backend_xid IS NOT NULL AND pid <> pg_backend_pid()
        ORDER BY xact_start LIMIT 1
        """
    ).fetchone()
    if row is None:
        return None
    pid, user, application, age, query = row
    return _session(pid, user, application, age, query)


def _session(pid: int, user: str, application: str, age: float | None, query: str | None) -> str:
    text = " ".join((query or "").split())[:80]
    return (
        f"pid {pid}, user {user}, application {application or '-'}, transaction {age or 0:.1f} s old: {text}"
    )


def sender(source: Connection, name: str) -> Sender | None:
    """The walsender of a subscription."""
    row = source.execute(
        "SELECT state, pg_wal_lsn_diff(pg_current_wal_insert_lsn(), replay_lsn)::bigint "
        "FROM pg_stat_replication WHERE application_name = %s",
        (name,),
    ).fetchone()
    return Sender(*row) if row else None


def held_up(source: Connection, subscription: int) -> str | None:
    """Why no table of a subscription is being copied, in words, as the source sees it; None if one is.

    The workers of the copies come under names of the server's own, and each waits, as it begins, for the transactions
    that write then.
    """
    workers = source.execute(
        "SELECT pid, wait_event_type IS NOT DISTINCT FROM 'Lock' FROM pg_stat_activity "
        "WHERE backend_type = 'walsender' AND starts_with(application_name, %s)",
        (f"pg_{subscription}_sync_",),
    ).fetchall()
    if not workers:
        return "a worker of the target, of which none has come to copy (max_logical_replication_workers)"
    if not all(waits for _, waits in workers):
        return None
    return blocker(source, workers[0][0]) or "a lock"


def position_now(source: Connection) -> str:
    """The WAL position that everything committed so far lies before; a later record is written, so that the target
    hears of it without delay even if the last commit was asynchronous."""
    with at_once(source):
        asked = ask_position(source)
    return str(only(asked))


def ask_position(source: Connection) -> psycopg.Cursor[Any]:
    """The question of `position_now`, for `connections.at_once`; `connections.only` has the answer."""
    asked = source.execute("SELECT pg_current_wal_insert_lsn()::text")
    emit(source)
    return asked


def emit(connection: Connection) -> None:
    """Commit a record that says nothing: all that was committed before is on disk then, and a walsender has news."""
    connection.execute("SELECT pg_logical_emit_message(true, 'shardkit', '')", prepare=True)


# --- on the target -------------------------------------------------------------------------------------------------


def subscription_exists(target: Connection, name: str) -> bool:
    """Whether the subscription is there."""
    return value(target, _SUBSCRIPTION, (name,)) is not None


def create_subscription(target: Connection, name: str, source_conninfo: str) -> None:
    """Subscribe and start to copy, in the caller's transaction, on the slot that is there already."""
    if subscription_exists(target, name):
        return
    target.execute(
        sql.SQL(
            "CREATE SUBSCRIPTION {name} CONNECTION {conninfo} PUBLICATION {name} "
            "WITH (create_slot = false, slot_name = {slot}, binary = true, copy_data = true, disable_on_error = true)"
        ).format(name=sql.Identifier(name), conninfo=sql.Literal(source_conninfo), slot=sql.Literal(name))
    )


def create_subscription_at_rest(target: Connection, name: str, source_conninfo: str) -> None:
    """Subscribe without a copy, in the caller's transaction, on the slot that is there already; nothing comes before
    `begin_at` and `set_enabled`. It goes on by itself after any error, as nobody may be there to look after it; see
    `set_disabled_by_errors`."""
    if subscription_exists(target, name):
        return
    target.execute(
        sql.SQL(
            "CREATE SUBSCRIPTION {name} CONNECTION {conninfo} PUBLICATION {name} "
            "WITH (enabled = false, create_slot = false, slot_name = {slot}, binary = true, copy_data = false)"
        ).format(name=sql.Identifier(name), conninfo=sql.Literal(source_conninfo), slot=sql.Literal(name))
    )


def begin_at(target: Connection, name: str, position: str) -> None:
    """Let a subscription at rest begin at a position of the source's WAL: what was committed before is passed over.

    One that has gone beyond it stays where it is.
    """
    target.execute(
        """
        SELECT pg_replication_origin_advance(origin, %(at)s::pg_lsn)
        FROM (SELECT 'pg_' || oid AS origin FROM pg_subscription
              WHERE subdbid = (SELECT oid FROM pg_database WHERE datname = current_database()) AND subname = %(name)s) s
        WHERE coalesce(pg_replication_origin_progress(origin, false), '0/0') < %(at)s::pg_lsn
        """,
        {"name": name, "at": position},
    )


def may_begin_at(target: Connection) -> bool:
    """Whether the role may do `begin_at`."""
    return bool(
        value(
            target,
            "SELECT has_function_privilege('pg_replication_origin_advance(text, pg_lsn)', 'EXECUTE') "
            "AND has_function_privilege('pg_replication_origin_progress(text, boolean)', 'EXECUTE')",
        )
    )


def retained(source: Connection, name: str) -> int | None:
    """Bytes of WAL that the source keeps for a slot; None if there is none, or it is of no use any more."""
    found = value(
        source,
        "SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), restart_lsn)::bigint FROM pg_replication_slots "
        "WHERE slot_name = %s AND wal_status IS DISTINCT FROM 'lost'",
        (name,),
    )
    return None if found is None else int(found)


def probe_subscription(target: Connection, name: str, source_conninfo: str) -> None:
    """Let the target connect to the source and forget it; raises what the server says where it cannot."""
    with target.transaction(force_rollback=True):
        target.execute(
            sql.SQL(
                "CREATE SUBSCRIPTION {} CONNECTION {} PUBLICATION {} "
                "WITH (enabled = false, create_slot = false, slot_name = NONE, copy_data = false)"
            ).format(sql.Identifier(name), sql.Literal(source_conninfo), sql.Identifier(name))
        )


def set_enabled(target: Connection, name: str, enabled: bool) -> None:
    """Enable or disable the subscription if it is there; allowed inside a transaction."""
    if subscription_exists(target, name):
        target.execute(
            sql.SQL("ALTER SUBSCRIPTION {} {}").format(
                sql.Identifier(name), sql.SQL("ENABLE" if enabled else "DISABLE")
            )
        )


def set_source(target: Connection, name: str, source_conninfo: str) -> None:
    """Where the subscription finds its publisher, if it is there; allowed inside a transaction."""
    if subscription_exists(target, name):
        target.execute(
            sql.SQL("ALTER SUBSCRIPTION {} CONNECTION {}").format(
                sql.Identifier(name), sql.Literal(source_conninfo)
            )
        )


def set_disabled_by_errors(target: Connection, name: str, disabled: bool) -> None:
    """Whether an error, a lost connection among them, disables the subscription, so that a mover can see it; else the
    server tries again and again."""
    is_so = f"{_SUBSCRIPTION} AND subdisableonerr = %s"
    if subscription_exists(target, name) and value(target, is_so, (name, disabled)) is None:
        target.execute(
            sql.SQL("ALTER SUBSCRIPTION {} SET (disable_on_error = {})").format(
                sql.Identifier(name), sql.Literal(disabled)
            )
        )


def drop_subscription(target: Connection, name: str) -> None:
    """Drop the subscription without its slot, so that a dead source does not matter; the mover drops the slot."""
    if not subscription_exists(target, name):
        return
    set_enabled(target, name, False)
    target.execute(sql.SQL("ALTER SUBSCRIPTION {} SET (slot_name = NONE)").format(sql.Identifier(name)))
    target.execute(sql.SQL("DROP SUBSCRIPTION {}").format(sql.Identifier(name)))


def copy_state(target: Connection, name: str) -> CopyState | None:
    """How far the subscription is; None if there is none."""
    return read_copy_state(ask_copy_state(target, name))


def ask_copy_state(target: Connection, name: str) -> psycopg.Cursor[Any]:
    """The question of `copy_state`, for `connections.at_once`; `read_copy_state` has the answer."""
    return target.execute(sql.SQL(_COPY_STATE).format(sql.Literal(name)), prepare=True)


def read_copy_state(answer: psycopg.Cursor[Any]) -> CopyState | None:
    """The answer of `ask_copy_state`."""
    row = answer.fetchone()
    if row is None:
        return None
    oid, workers, applier, received, enabled, ready, tables, errors, running = row
    return CopyState(
        oid, workers, applier, received, enabled, ready, tables, errors,
        {name: counts[0] for name, counts in running.items()},
        {name: counts[1] for name, counts in running.items()},
    )  # fmt: skip
