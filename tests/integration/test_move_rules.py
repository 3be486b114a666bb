"""Rules of a move that nothing else fails on: what is looked at before it, and what a comparison may not miss."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo
from psycopg.types.json import Jsonb

from shardkit.core.errors import PreflightFailed, ReplicationFailed
from shardkit.core.keyrange import POSITION_MAX, POSITION_MIN, Arc, ArcSet
from shardkit.core.move import Phase
from shardkit.core.ring import position
from shardkit.rebalance import preflight
from shardkit.rebalance.progress import Progress
from shardkit.rebalance.waiting import Interrupted
from shardkit.storage import digest, replication
from shardkit.storage.catalog import Catalog
from shardkit.storage.connections import Connection, ShardConnections, connect, value
from tests.fix_postgres import NewCluster
from tests.fix_shards import MakeShards, Shards, fill
from tests.sharded import until

ALL = [Arc(POSITION_MIN, POSITION_MAX)]


def reasons(shards: Shards, source: str = "s1", target: str = "s2") -> list[str]:
    """What the preflight finds."""
    topology = shards.topology()
    with ShardConnections() as connections:
        try:
            preflight.check(topology, topology.named(source), topology.named(target), connections)
        except PreflightFailed as error:
            return list(error.fields["reasons"])
    return []


@contextmanager
def role(connection: Connection, *options: str) -> Iterator[sql.Identifier]:
    """A role of this test alone, which the connection plays."""
    name = sql.Identifier(f"role_{uuid4().hex[:12]}")
    connection.execute(sql.SQL("CREATE ROLE {}").format(name))
    for option in options:
        connection.execute(sql.SQL(option).format(name))
    connection.execute(sql.SQL("SET ROLE {}").format(name))
    try:
        yield name
    finally:
        connection.execute("RESET ROLE")
        connection.execute(sql.SQL("DROP OWNED BY {}").format(name))
        connection.execute(sql.SQL("DROP ROLE {}").format(name))


# --- row security -----------------------------------------------------------------------------------------------------

GRANT = "GRANT SELECT ON ALL TABLES IN SCHEMA public TO {}"


def test_a_digest_that_row_security_would_thin_out_is_an_error(make_shards: MakeShards) -> None:
    shards = make_shards(1)
    one = shards.on("s1")
    fill(one, 10)
    one.execute("ALTER TABLE public.users ENABLE ROW LEVEL SECURITY")
    one.execute("CREATE POLICY half ON public.users USING (id % 2 = 0)")
    columns = ("id", "name", "n")
    with role(one, GRANT):
        assert value(one, "SELECT count(*) FROM public.users") == 5
        with pytest.raises(psycopg.errors.InsufficientPrivilege), digest.snapshot(one):
            digest.by_chunk(one, shards.tables[1], columns, ALL)
    with role(one, GRANT, "ALTER ROLE {} BYPASSRLS"), digest.snapshot(one):
        assert digest.by_chunk(one, shards.tables[1], columns, ALL)[0].rows == 10


def test_the_role_of_the_mover_is_looked_at(make_shards: MakeShards) -> None:
    shards = make_shards(1)
    one = shards.on("s1")
    parts = ("BYPASSRLS", "REPLICATION", "pg_read_all_stats", "session_replication_role")
    with role(one, "GRANT pg_read_all_settings TO {}"):
        found = preflight.server_problems(one)
    assert [part for part in parts if any(part in text for text in found)] == list(parts)
    able = (
        "ALTER ROLE {} BYPASSRLS REPLICATION",
        "GRANT pg_read_all_stats TO {}",
        "GRANT SET ON PARAMETER session_replication_role TO {}",
    )
    with role(one, *able):
        assert preflight.server_problems(one) == []


# --- what servers have to spare ---------------------------------------------------------------------------------------


def test_slots_senders_and_workers_are_counted(make_shards: MakeShards, new_cluster: NewCluster) -> None:
    few = new_cluster(
        settings={"max_replication_slots": 1, "max_wal_senders": 1, "max_logical_replication_workers": 1}
        | {"max_active_replication_origins": 1}
    )
    shards = make_shards(0)
    shards.add("s1", few)
    shards.add("s2", 1)
    assert [text.split(" (")[0] for text in reasons(shards)] == [
        "shard s1: 1 replication slots are free and 3 are needed",
        "shard s1: 1 walsenders are free and 3 are needed",
    ]
    assert [text.split(" (")[0] for text in reasons(shards, "s2", "s1")] == [
        "shard s1: 1 logical replication workers are free and 2 are needed",
        "shard s1: 1 replication origins are free and 3 are needed",
    ]


def test_a_prepared_transaction_is_in_doubt(make_shards: MakeShards) -> None:
    shards = make_shards(2)
    one = shards.on("s1")
    gid = f"doubt {uuid4().hex}"
    one.execute("BEGIN")
    one.execute("INSERT INTO public.users VALUES (1, 'perhaps')")
    one.execute(sql.SQL("PREPARE TRANSACTION {}").format(sql.Literal(gid)))
    assert reasons(shards) == [
        f"shard s1: prepared transaction {gid!r} is in doubt: commit it or roll it back"
    ]
    one.execute(sql.SQL("ROLLBACK PREPARED {}").format(sql.Literal(gid)))
    assert reasons(shards) == []


# --- which server it is -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shard", "field"), [("s1", 0), ("s1", 1), ("s2", 0), ("s2", 1)])
def test_a_copy_begins_again_on_another_system_or_timeline(
    make_shards: MakeShards, shard: str, field: int
) -> None:
    shards = make_shards(2)
    fill(shards.on("s1"), 100)
    stop = threading.Event()

    def stop_there(progress: Progress) -> None:
        if progress.phase is Phase.CATCHING_UP:
            stop.set()

    with pytest.raises(Interrupted):
        shards.move(listener=stop_there, stop=stop)
    with Catalog.open(shards.catalog_url) as catalog:
        job = catalog.running_job()
        assert job is not None
        (row,) = catalog.transfers(job.id)
        identities = row.record["identities"]
        identities[shard][field] = "4711" if field == 0 else identities[shard][field] - 1
        catalog.connection.execute(
            "UPDATE shardkit.transfers SET record = record || %s", (Jsonb({"identities": identities}),)
        )
    phases: list[Phase] = []
    shards.resume(listener=lambda progress: phases.append(progress.phase))
    assert Phase.PREPARING in phases
    shards.assert_clean()


# --- what replication says --------------------------------------------------------------------------------------------


def test_the_lag_of_a_sender_that_knows_no_position_is_not_known(make_shards: MakeShards) -> None:
    shards = make_shards(1)
    mine = shards.on("s1").info
    conninfo = make_conninfo(
        host=mine.host, port=str(mine.port), dbname=mine.dbname, user=mine.user, application_name="just there"
    )
    # The extended protocol is not for walsenders; nothing is sent here anyway.
    with psycopg.connect(conninfo, autocommit=True, replication="database"):
        found = until(lambda: replication.sender(shards.on("s1"), "just there"), "the walsender is there")
    assert found.lag_bytes is None


def test_what_has_come_and_is_being_committed_is_not_applied(make_shards: MakeShards) -> None:
    shards = make_shards(2)
    source, target, name = shards.on("s1"), shards.on("s2"), "shardkit_test_applied"
    table = next(table for table in shards.topology().tables if table.name == "users")
    target.execute(
        "CREATE FUNCTION public.wait() RETURNS trigger LANGUAGE plpgsql AS "
        "'BEGIN PERFORM pg_advisory_xact_lock(4711); RETURN NULL; END'"
    )
    target.execute(
        "CREATE CONSTRAINT TRIGGER at_commit AFTER INSERT ON public.users DEFERRABLE INITIALLY DEFERRED "
        "FOR EACH ROW EXECUTE FUNCTION public.wait(); "
        "ALTER TABLE public.users ENABLE ALWAYS TRIGGER at_commit"
    )
    replication.create_publication(source, name, [table], ArcSet(ALL))
    replication.create_slot(source, name)
    replication.create_subscription_at_rest(target, name, replication.peer_conninfo(source))
    replication.set_enabled(target, name, True)

    def state() -> replication.CopyState:
        found = replication.copy_state(target, name)
        assert found is not None
        return found

    def is_committing() -> bool:
        query = "SELECT wait_event = 'advisory' FROM pg_stat_activity WHERE pid = %s"
        return bool(value(target, query, (state().applier,)))

    def row() -> object:
        return value(target, "SELECT name FROM public.users WHERE id = 1")

    try:
        with connect(shards.topology().named("s2").url) as holder:
            holder.execute("SELECT pg_advisory_lock(4711)")
            source.execute("INSERT INTO public.users VALUES (1, 'one')")
            position = str(value(source, "SELECT pg_current_wal_insert_lsn()::text"))
            until(is_committing, "the row has come")
            # Where nothing else was written, the end of its commit has come: that position, and no further one.
            assert not state().has_applied(position)
            assert row() is None
        replication.emit(source)
        until(lambda: state().has_applied(position), "the row is applied")
        assert row() == "one"
    finally:
        replication.drop_subscription(target, name)
        until(lambda: replication.drop_slot(source, name), "nobody uses the slot")


def test_errors_of_the_first_copy_are_counted(make_shards: MakeShards) -> None:
    shards = make_shards(2)
    fill(shards.on("s1"), 100)
    counted: list[int] = []

    def plant(progress: Progress) -> None:
        if progress.phase is Phase.COPYING and not counted:
            with Catalog.open(shards.catalog_url) as catalog:
                (row,) = catalog.transfers(progress.transfer)
                name = f"shardkit_{catalog.cluster_id().hex[:8]}_{row.id}"
            if not replication.subscription_exists(shards.on("s2"), name):
                key = next(key for key in range(1, 100) if position(key) in ArcSet(row.arcs))
                shards.on("s2").execute(
                    "INSERT INTO public.users VALUES (%s, 'in the way') ON CONFLICT DO NOTHING", (key,)
                )
                return

            def errors() -> int:
                state = replication.copy_state(shards.on("s2"), name)
                return state.errors if state else 0

            counted.append(until(errors, "the error is counted"))

    with pytest.raises(ReplicationFailed, match="again and again"):
        shards.move(listener=plant)
    assert counted[0] > 0
    with connect(shards.topology().named("s2").url) as there:
        assert value(there, "SELECT sum(sync_error_count) FROM pg_stat_subscription_stats") > 0
