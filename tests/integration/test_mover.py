"""Moves on real servers: what is carried, what is refused, what is found, and what can be taken back."""

from __future__ import annotations

import threading
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg import sql

from shardkit.core.errors import (
    JobRunning,
    LeaseHeld,
    MoverSuperseded,
    MoveWaiting,
    NothingToDo,
    PreflightFailed,
    ReplicationFailed,
    VerificationFailed,
)
from shardkit.core.move import Phase
from shardkit.core.ring import position
from shardkit.core.topology import ShardedTable
from shardkit.rebalance.mover import Mover
from shardkit.rebalance.progress import Progress
from shardkit.rebalance.waiting import Interrupted
from shardkit.storage import fence
from shardkit.storage.catalog import Catalog
from shardkit.storage.connections import connect, value
from tests.fix_shards import MakeShards, Shards, fill, owner_of


def job_with_transfers(shards: Shards) -> tuple[int, list[int]]:
    with Mover(shards.catalog_url) as mover:
        job = mover.start("rebalance")
        return job.id, [row.id for row in mover.catalog.transfers(job.id)]


def phases(shards: Shards) -> list[Phase]:
    with Catalog.open(shards.catalog_url) as catalog:
        job = catalog.latest_job()
        assert job is not None
        return [row.phase for row in catalog.transfers(job.id)]


def test_a_move_carries_every_row_to_its_owner(make_shards: MakeShards) -> None:
    shards = make_shards(1)
    fill(shards.on("s1"), 1000)
    before = {table: shards.rows(table)["s1"] for table in shards.tables}
    shards.add("s2", 1)
    shards.add("s3", 2)
    seen: list[Progress] = []
    job = shards.move(listener=seen.append)
    assert job.state == "done"
    shards.assert_clean()
    for table in shards.tables:
        after = shards.rows(table)
        assert all(after.values())
        assert sorted(row for rows in after.values() for row in rows) == before[table]
    assert {progress.phase for progress in seen} >= {
        Phase.COPYING,
        Phase.VERIFYING,
        Phase.PURGING,
        Phase.DONE,
    }
    with Catalog.open(shards.catalog_url) as catalog:
        for row in catalog.transfers(job.id):
            assert row.record["pause_ms"]["total"] > 0
            assert row.record["certificate"]["rows"]["public.users"] == row.record["rows_purged"] / 3


def test_a_second_job_has_nothing_to_do(make_shards: MakeShards) -> None:
    shards = make_shards(2)
    shards.move()
    with Mover(shards.catalog_url) as mover, pytest.raises(NothingToDo):
        mover.start("rebalance")


def test_every_name_and_key_type_is_carried(make_shards: MakeShards) -> None:
    tables = (
        ShardedTable("Weird Schema", 'Ta"ble', "order", "text"),
        ShardedTable("public", "select", "Key", "uuid"),
        ShardedTable("public", "numbers", "group", "int"),
    )
    schema = """
    CREATE SCHEMA "Weird Schema";
    CREATE TABLE "Weird Schema"."Ta""ble" ("order" varchar(40) NOT NULL PRIMARY KEY, "End" int, "user" jsonb);
    CREATE TABLE public."select" ("Key" uuid NOT NULL PRIMARY KEY, "table" bytea, at timestamptz, m money);
    CREATE TABLE public.numbers ("group" smallint NOT NULL, n numeric, PRIMARY KEY ("group"));
    """
    shards = make_shards(1, tables=tables, schema=schema)
    one = shards.on("s1")
    for index in range(300):
        one.execute(
            'INSERT INTO "Weird Schema"."Ta""ble" VALUES (%s, %s, %s)',
            (f"\N{GRINNING FACE}'{index}\\", None, '{"a":1}'),
        )
        one.execute(
            'INSERT INTO public."select" VALUES (%s, %s, now(), 12.5::numeric::money)',
            (UUID(int=index**9), b"\0\xff"),
        )
        one.execute("INSERT INTO public.numbers VALUES (%s, %s)", (index - 150, index / 7))
    before = {table: shards.rows(table)["s1"] for table in tables}
    shards.add("s2", 1)
    shards.move()
    shards.assert_clean()
    for table in tables:
        after = shards.rows(table)
        assert len(after["s2"]) > 50
        assert sorted(map(repr, after["s1"] + after["s2"])) == sorted(map(repr, before[table]))


def test_a_primary_key_without_the_shard_key_gets_an_identity_for_the_move(make_shards: MakeShards) -> None:
    tables = (
        ShardedTable("public", "notes", "owner", "int"),
        ShardedTable("public", "marks", "owner", "int"),
    )
    schema = """
    CREATE TABLE public.notes (id uuid PRIMARY KEY DEFAULT gen_random_uuid(), owner int NOT NULL, body text);
    CREATE INDEX ON public.notes (owner);
    CREATE TABLE public.marks (owner int NOT NULL, body text);
    CREATE INDEX ON public.marks (owner);
    """
    shards = make_shards(1, tables=tables, schema=schema)
    shards.on("s1").execute(
        "INSERT INTO public.notes (owner, body) SELECT g, 'x' FROM generate_series(1, 500) g"
    )
    shards.on("s1").execute(
        "INSERT INTO public.marks (owner, body) SELECT g, 'x' FROM generate_series(1, 500) g"
    )
    shards.add("s2", 1)
    update = threading.Event()

    def write_in_the_copy(progress: Progress) -> None:
        if progress.phase is Phase.CATCHING_UP and not update.is_set():
            update.set()
            shards.on("s1").execute("UPDATE public.notes SET body = 'y' WHERE owner % 2 = 0")
            shards.on("s1").execute("DELETE FROM public.marks WHERE owner % 2 = 0")

    shards.move(listener=write_in_the_copy)
    assert update.is_set()
    shards.assert_clean()
    notes = shards.rows(tables[0])
    assert sorted(row[2] for rows in notes.values() for row in rows) == ["x"] * 250 + ["y"] * 250
    assert sum(len(rows) for rows in shards.rows(tables[1]).values()) == 250
    assert value(shards.on("s1"), "SELECT relreplident::text FROM pg_class WHERE relname = 'notes'") == "d"


def test_partitioned_tables_are_carried_through_their_root(make_shards: MakeShards) -> None:
    tables = (ShardedTable("public", "events", "user_id", "int"),)
    schema = """
    CREATE TABLE public.events (user_id bigint NOT NULL, day int NOT NULL, what text, PRIMARY KEY (user_id, day))
        PARTITION BY RANGE (day);
    CREATE TABLE public.events_1 PARTITION OF public.events FOR VALUES FROM (0) TO (5);
    CREATE TABLE public.events_2 PARTITION OF public.events FOR VALUES FROM (5) TO (10);
    """
    shards = make_shards(1, tables=tables, schema=schema)
    shards.on("s1").execute(
        "INSERT INTO public.events SELECT u, d, 'x' FROM generate_series(1, 200) u, generate_series(0, 9) d"
    )
    shards.add("s2", 1)
    shards.move()
    shards.assert_clean()
    rows = shards.rows(tables[0])
    assert len(rows["s1"]) + len(rows["s2"]) == 2000
    assert len(rows["s2"]) > 500


def test_numbers_that_moved_are_not_given_out_again(make_shards: MakeShards) -> None:
    tables = (ShardedTable("public", "entries", "owner", "int"),)
    schema = """
    CREATE SEQUENCE public.tickets;
    CREATE TABLE public.entries (
        owner bigint NOT NULL,
        "No" bigint GENERATED BY DEFAULT AS IDENTITY,
        serial bigserial,
        ticket bigint NOT NULL DEFAULT nextval('public.tickets'),
        PRIMARY KEY (owner, "No")
    );
    """
    shards = make_shards(1, tables=tables, schema=schema)
    shards.on("s1").execute("INSERT INTO public.entries (owner) SELECT g % 50 FROM generate_series(1, 500) g")
    shards.add("s2", 1)
    shards.move()
    shards.assert_clean()
    owner = next(key for key in range(50) if owner_of(shards.topology(), key) == "s2")
    given = (
        shards.on("s2")
        .execute('INSERT INTO public.entries (owner) VALUES (%s) RETURNING "No", serial, ticket', (owner,))
        .fetchone()
    )
    assert given is not None
    assert min(given) > 500


# --- content is verified -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sabotage", "table"),
    [
        ("UPDATE public.users SET name = 'planted' WHERE id = {key}", "public.users id="),
        ("DELETE FROM public.posts WHERE user_id = {key} AND id = 1", "public.posts user_id="),
        ("INSERT INTO public.posts VALUES ({key}, 99, 'planted')", "public.posts user_id="),
    ],
)
def test_a_planted_difference_stops_the_move_before_the_cutover(
    make_shards: MakeShards, sabotage: str, table: str
) -> None:
    shards = make_shards(1)
    fill(shards.on("s1"), 300)
    shards.add("s2", 1)
    planted: list[int] = []

    def plant(progress: Progress) -> None:
        if progress.phase is Phase.CATCHING_UP and not planted:
            key = value(shards.on("s2"), "SELECT max(id) FROM public.users")
            if key is None:
                return
            planted.append(key)
            shards.on("s2").execute(sabotage.format(key=key))

    with pytest.raises(VerificationFailed) as caught:
        shards.move(listener=plant)
    assert f"{table}{planted[0]}" in caught.value.message
    assert phases(shards) == [Phase.VERIFYING]
    assert not shards.topology().owned(1)
    # Repaired by whoever planted it, the move goes on.
    with connect(shards.topology().named("s2").url) as there:
        there.execute("SET session_replication_role = replica")
        there.execute("DELETE FROM public.posts WHERE user_id = %s", (planted[0],))
        there.execute("DELETE FROM public.users WHERE id = %s", (planted[0],))
        row = shards.on("s1").execute("SELECT * FROM public.users WHERE id = %s", (planted[0],)).fetchone()
        there.execute("INSERT INTO public.users VALUES (%s, %s, %s)", row)
        for post in shards.on("s1").execute("SELECT * FROM public.posts WHERE user_id = %s", (planted[0],)):
            there.execute("INSERT INTO public.posts VALUES (%s, %s, %s)", post)
    shards.resume()
    shards.assert_clean()


def test_a_difference_planted_after_the_verification_is_found_in_the_cutover(make_shards: MakeShards) -> None:
    """An UPDATE whose row is missing on the target is skipped by apply without a word: the last look finds it."""
    shards = make_shards(1)
    fill(shards.on("s1"), 300)
    shards.add("s2", 1)
    planted: list[int] = []

    def plant(progress: Progress) -> None:
        if progress.phase is Phase.CUTTING_OVER and not planted:
            planted.append(value(shards.on("s2"), "SELECT max(id) FROM public.users"))
            with connect(shards.topology().named("s2").url) as there:
                there.execute("SET session_replication_role = replica")
                there.execute("DELETE FROM public.users WHERE id = %s", planted)
            shards.on("s1").execute("UPDATE public.users SET n = n + 1 WHERE id = %s", planted)

    with pytest.raises(VerificationFailed, match=r"public.users id="):
        shards.move(listener=plant)
    assert not shards.topology().owned(1)


def test_a_row_in_the_way_of_the_copy_stops_it_with_a_reason(make_shards: MakeShards) -> None:
    shards = make_shards(2)
    fill(shards.on("s1"), 100)
    planted: list[int] = []

    def plant(progress: Progress) -> None:
        if progress.phase is Phase.COPYING and not planted:
            with Catalog.open(shards.catalog_url) as catalog:
                arcs = catalog.transfers(progress.transfer)[0].arcs
            planted.append(next(key for key in range(1, 100) if position(key) in arcs))
            shards.on("s2").execute("INSERT INTO public.users VALUES (%s, 'in the way')", planted)

    with pytest.raises(ReplicationFailed, match="again and again"):
        shards.move(listener=plant)
    assert phases(shards) == [Phase.COPYING]
    shards.on("s2").execute("SET session_replication_role = replica")
    shards.on("s2").execute("DELETE FROM public.users WHERE id = %s", planted)
    shards.resume()
    shards.assert_clean()


# --- refusals ------------------------------------------------------------------------------------------------------


def test_preflight_names_every_reason_at_once(
    make_shards: MakeShards, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = make_shards(2)
    shards.on("s2").execute("ALTER TABLE public.posts ALTER COLUMN body TYPE varchar(10)")
    shards.on("s2").execute("ALTER TABLE public.users ADD COLUMN extra int")
    shards.on("s1").execute("ALTER TABLE public.posts SET UNLOGGED")
    monkeypatch.delenv("SHARDKIT_ALLOW_FSYNC_OFF")
    with pytest.raises(PreflightFailed) as caught:
        shards.move()
    message = caught.value.message
    for part in ("public.posts.body differs", "public.users.extra is missing", "unlogged", "fsync is off"):
        assert part in message
    assert not shards.topology().by_id[1].in_transit
    assert phases(shards) == [Phase.PREPARING]


def test_one_mover_at_a_time(make_shards: MakeShards) -> None:
    shards = make_shards(2)
    with Mover(shards.catalog_url), pytest.raises(LeaseHeld, match="pid"):
        Mover(shards.catalog_url).__enter__()


def test_one_job_at_a_time(make_shards: MakeShards) -> None:
    shards = make_shards(2)
    job_with_transfers(shards)
    with Mover(shards.catalog_url) as mover, pytest.raises(JobRunning):
        mover.start("rebalance")


def test_a_mover_that_lost_its_lease_changes_nothing(make_shards: MakeShards) -> None:
    shards = make_shards(2)
    fill(shards.on("s1"), 100)
    stolen = threading.Event()

    def steal(progress: Progress) -> None:
        if progress.phase is Phase.COPYING and not stolen.is_set():
            stolen.set()
            with Catalog.open(shards.catalog_url) as catalog:
                catalog.connection.execute("UPDATE shardkit.lease SET token = token + 1")

    with pytest.raises(MoverSuperseded):
        shards.move(listener=steal)
    assert not shards.topology().owned(1)
    shards.resume()
    shards.assert_clean()


def test_a_long_transaction_postpones_the_cutover_and_is_named(make_shards: MakeShards) -> None:
    shards = make_shards(2)
    fill(shards.on("s1"), 100)
    holder: list[psycopg.Connection[tuple[object, ...]]] = []

    def hold(progress: Progress) -> None:
        if progress.phase is Phase.VERIFYING and not holder:
            fence = shards.topology().by_id[0].fence.relation
            holder.append(connect(shards.topology().named("s1").url, application="long report"))
            holder[0].execute(f'BEGIN; LOCK TABLE shardkit."{fence}" IN ACCESS SHARE MODE')

    with pytest.raises(MoveWaiting, match="long report"):
        shards.move(listener=hold, patience=2.0)
    assert phases(shards) == [Phase.CUTTING_OVER]
    holder[0].close()
    shards.resume()
    shards.assert_clean()


# --- the source's triggers -----------------------------------------------------------------------------------------


def test_what_replication_cannot_carry_is_refused_while_arcs_move(make_shards: MakeShards) -> None:
    shards = make_shards(2)
    fill(shards.on("s1"), 100)
    refused: list[str] = []

    def try_it(progress: Progress) -> None:
        if progress.phase is Phase.CATCHING_UP and not refused:
            for statement in (
                "TRUNCATE public.posts",
                "UPDATE public.posts SET user_id = user_id + 1 WHERE id = 1",
            ):
                with pytest.raises(psycopg.Error) as caught:
                    shards.on("s1").execute(statement)
                refused.append(str(caught.value.sqlstate))
        if progress.phase is Phase.PURGING and len(refused) == 2:
            topology = shards.topology()
            key = next(key for key in range(1, 100) if owner_of(topology, key) == "s2")
            with pytest.raises(psycopg.Error) as caught:
                shards.on("s1").execute("INSERT INTO public.posts VALUES (%s, 77, 'lost')", (key,))
            refused.append(str(caught.value.sqlstate))

    shards.move(listener=try_it)
    assert refused == ["SK003", "SK002", "SK001"]
    shards.assert_clean()


# --- taking it back ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", [Phase.PREPARING, Phase.COPYING, Phase.CATCHING_UP, Phase.CUTTING_OVER])
def test_abort_leaves_both_sides_as_they_were(make_shards: MakeShards, phase: Phase) -> None:
    shards = make_shards(2)
    fill(shards.on("s1"), 200)
    before = {table: shards.rows(table) for table in shards.tables}
    stop = threading.Event()

    def stop_there(progress: Progress) -> None:
        if progress.phase is phase:
            stop.set()

    with pytest.raises(Interrupted):
        shards.move(listener=stop_there, stop=stop)
    with Mover(shards.catalog_url) as mover:
        assert mover.abort().state == "aborted"
    shards.assert_clean()
    assert {table: shards.rows(table) for table in shards.tables} == before
    shards.move()
    shards.assert_clean()


@pytest.mark.parametrize("phase", [None, Phase.CATCHING_UP])
@pytest.mark.parametrize("decided", [True, False])
def test_a_move_ends_what_a_crash_left_in_doubt(
    make_shards: MakeShards, phase: Phase | None, decided: bool
) -> None:
    """A part of a transaction over several shards: prepared before the move begins, or before its cutover."""
    shards = make_shards(1)
    fill(shards.on("s1"), 50)
    shards.add("s2", 1)
    topology = shards.topology()
    gid = f"shardkit_{topology.named('s1').id}_{uuid4().hex}"
    left: list[str] = []

    def leave() -> None:
        left.append(gid)
        with connect(topology.named("s1").url) as connection:
            if decided:
                connection.execute("INSERT INTO shardkit.decision VALUES (%s, 'commit', '{0}')", (gid,))
            connection.execute("BEGIN")
            fence.guard(connection, shards.topology().named("s1").fence)
            connection.execute("INSERT INTO public.users VALUES (1000001, 'in doubt', 0)")
            connection.execute(sql.SQL("PREPARE TRANSACTION {}").format(sql.Literal(f"{gid}_0")))

    def listener(progress: Progress) -> None:
        if progress.phase is phase and not left:
            leave()

    if phase is None:
        leave()
    assert shards.move(listener=listener).state == "done"
    assert left
    shards.assert_clean()
    found = [shard.name for shard in topology.shards if shards.on(shard.name).execute(
        "SELECT FROM public.users WHERE id = 1000001").fetchone() is not None]  # fmt: skip
    assert len(found) == decided
    assert (
        shards.on("s1").execute("SELECT gid FROM pg_prepared_xacts WHERE gid = %s", (f"{gid}_0",)).fetchall()
        == []
    )
