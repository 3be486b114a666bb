"""Moves in steps under the fence: for servers without logical replication, and wherever the operator says so."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest

from shardkit.core.errors import MoveWaiting, PreflightFailed, VerificationFailed
from shardkit.core.keyrange import ArcSet
from shardkit.core.move import Mode, Phase
from shardkit.core.ring import position
from shardkit.core.topology import ShardedTable
from shardkit.rebalance import locked
from shardkit.rebalance.mover import Mover, plan_job
from shardkit.rebalance.progress import Listener, Progress
from shardkit.rebalance.waiting import Interrupted
from shardkit.storage.catalog import Catalog
from shardkit.storage.connections import connect, value
from tests.fix_postgres import NewCluster
from tests.fix_shards import TABLES, FencedWriter, MakeShards, Shards, fill, owner_of

USERS = 400


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locked, "ROWS_A_STEP", 60)


@contextmanager
def writing(shards: Shards, isolation: str = "READ COMMITTED") -> Iterator[list[FencedWriter]]:
    writers = [FencedWriter(shards, number, 3, USERS, isolation) for number in range(3)]
    for writer in writers:
        writer.start()
    try:
        yield writers
    finally:
        for writer in writers:
            writer.ending.set()
        for writer in writers:
            writer.join()
    for writer in writers:
        writer.check()


def two(make_shards: MakeShards) -> Shards:
    shards = make_shards(1)
    fill(shards.on("s1"), USERS)
    shards.add("s2", 1)
    return shards


def after_steps(number: int) -> tuple[threading.Event, Listener]:
    """A stop that comes when so many steps have been made."""
    stop, seen = threading.Event(), {0}

    def listen(progress: Progress) -> None:
        if progress.phase is Phase.COPYING:
            seen.add(progress.rows)
            if len(seen) > number:
                stop.set()

    return stop, listen


@pytest.mark.parametrize(
    "isolation",
    [
        "READ COMMITTED",
        *(pytest.param(level, marks=pytest.mark.slow) for level in ("REPEATABLE READ", "SERIALIZABLE")),
    ],
)
def test_writers_go_on_from_step_to_step(make_shards: MakeShards, isolation: str) -> None:
    shards = two(make_shards)
    version = shards.topology().version
    with writing(shards, isolation) as writers:
        job = shards.move(Mode.LOCKED)
        assert job.state == "done"
        shards.add("s3", 2)
        shards.move(Mode.LOCKED)
    assert sum(writer.refused for writer in writers) > 0, "no writer met a changed fence"
    with Catalog.open(shards.catalog_url) as catalog:
        (first,) = catalog.transfers(job.id)
    assert first.record["steps"] > 3
    assert shards.topology().version > version + first.record["steps"]
    assert first.record["pause_ms"]["total"] >= first.record["pause_ms"]["median"] > 0
    shards.assert_clean()


def test_a_stopped_move_goes_on(make_shards: MakeShards) -> None:
    shards = two(make_shards)
    stop, listen = after_steps(2)
    with writing(shards):
        with pytest.raises(Interrupted):
            shards.move(Mode.LOCKED, stop=stop, listener=listen)
        owned = shards.topology().owned(1)
        assert owned
        assert shards.topology().by_id[1].in_transit, "nothing was left to do"
        shards.resume()
        assert shards.topology().owned(1).issuperset(owned)
    shards.assert_clean()


def test_an_abort_takes_the_steps_back(make_shards: MakeShards) -> None:
    shards = two(make_shards)
    before = shards.topology()
    stop, listen = after_steps(2)
    with writing(shards):
        with pytest.raises(Interrupted):
            shards.move(Mode.LOCKED, stop=stop, listener=listen)
        assert shards.topology().owned(1)
        with Mover(shards.catalog_url, patience=30.0) as mover:
            assert mover.abort().state == "aborted"
    after = shards.topology()
    assert (after.tokens, after.owners) == (before.tokens, before.owners)
    assert not shards.rows(TABLES[1])["s2"]
    shards.assert_clean()


def test_a_server_without_logical_replication_is_moved_from_by_itself(
    make_shards: MakeShards, new_cluster: NewCluster
) -> None:
    shards = make_shards(0)
    plain = new_cluster(settings={"wal_level": "replica"})
    shards.add("s1", plain)
    fill(shards.on("s1"), USERS)
    shards.add("s2", 1)
    with writing(shards):
        job = shards.move()
    with Catalog.open(shards.catalog_url) as catalog:
        (row,) = catalog.transfers(job.id)
    assert row.record["mode"] == "locked"
    shards.assert_clean()


def _arcs(shards: Shards) -> ArcSet:
    with Mover(shards.catalog_url) as mover:
        _, placement = plan_job(mover.catalog)
    return placement.transfers[0].arcs


SPOIL = """
CREATE FUNCTION public.spoil() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.n := 77; RETURN NEW; END $$;
CREATE TRIGGER spoil BEFORE INSERT ON public.users FOR EACH ROW EXECUTE FUNCTION public.spoil();
ALTER TABLE public.users ENABLE ALWAYS TRIGGER spoil;
"""


@pytest.mark.parametrize("planted", ["a row", "a trigger"])
def test_what_somebody_changed_on_the_target_is_named(
    make_shards: MakeShards, monkeypatch: pytest.MonkeyPatch, planted: str
) -> None:
    """By going round the session, between two steps."""
    shards = two(make_shards)
    arcs = _arcs(shards)
    moving = next(user for user in range(USERS + 1, 9 * USERS) if position(user) == max(_places(arcs)))
    original = locked.LockedCopier._step
    steps = 0

    def step(self: locked.LockedCopier, *given: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == 2 and planted == "a row":
            shards.on("s2").execute("INSERT INTO public.users VALUES (%s, 'planted')", (moving,))
        elif steps == 2:
            shards.on("s2").execute(SPOIL)
        original(self, *given)

    monkeypatch.setattr(locked.LockedCopier, "_step", step)
    if planted == "a row":
        with pytest.raises(VerificationFailed, match=rf"public.users .*\b{moving}\b") as raised:
            shards.move(Mode.LOCKED)
        assert raised.value.exit_code == 4
    else:
        with pytest.raises(PreflightFailed, match="trigger spoil"):
            shards.move(Mode.LOCKED)
    monkeypatch.setattr(locked.LockedCopier, "_step", original)
    shards.on("s2").execute("DROP FUNCTION IF EXISTS public.spoil CASCADE")
    shards.resume()
    assert len(shards.rows(TABLES[1])["s1"]) + len(shards.rows(TABLES[1])["s2"]) == USERS
    shards.assert_clean()


def _places(arcs: ArcSet) -> list[int]:
    """The positions within the arcs of users that there are not."""
    return [place for user in range(USERS + 1, 9 * USERS) if (place := position(user)) in arcs]


def test_whoever_goes_round_the_session_is_refused_what_has_moved(make_shards: MakeShards) -> None:
    shards = two(make_shards)
    stop, listen = after_steps(0)
    with pytest.raises(Interrupted):
        shards.move(Mode.LOCKED, stop=stop, listener=listen)
    assert not shards.topology().owned(1)
    stop, listen = after_steps(1)
    with connect(shards.topology().named("s1").url) as old, old.transaction(force_rollback=True):
        old.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        old.execute("SELECT 1 FROM public.users LIMIT 1")
        with pytest.raises(Interrupted):
            shards.resume(stop=stop, listener=listen)
        topology = shards.topology()
        moved = next(user for user in range(1000, 9000) if owner_of(topology, user) == "s2")
        with pytest.raises(psycopg.errors.SerializationFailure, match="have moved"):
            old.execute("INSERT INTO public.users VALUES (%s, 'late')", (moved,))
    with connect(shards.topology().named("s1").url) as beside:
        with pytest.raises(psycopg.Error, match="has moved to another shard") as raised:
            beside.execute("INSERT INTO public.users VALUES (%s, 'late')", (moved,))
        assert raised.value.sqlstate == "SK001"
        staying = next(user for user in range(1000, 9000) if owner_of(topology, user) == "s1")
        beside.execute("INSERT INTO public.users VALUES (%s, 'in time')", (staying,))
    shards.resume()
    shards.assert_clean()


def test_a_writer_beside_the_session_holds_the_next_step_up(make_shards: MakeShards) -> None:
    """It has written a row that has not moved yet, and may commit: so no step may be decided before it ends."""
    shards = two(make_shards)
    stop, listen = after_steps(1)
    with pytest.raises(Interrupted):
        shards.move(Mode.LOCKED, stop=stop, listener=listen)
    topology = shards.topology()
    waiting = next(user for user in range(1, USERS) if position(user) in topology.by_id[1].in_transit)
    with connect(topology.named("s1").url) as beside:
        with beside.transaction():
            beside.execute("UPDATE public.users SET n = 7 WHERE id = %s", (waiting,))
            with pytest.raises(MoveWaiting, match="pid"):
                shards.resume(patience=1.0)
        shards.resume()
    assert value(shards.on("s2"), "SELECT n FROM public.users WHERE id = %s", (waiting,)) == 7
    shards.assert_clean()


def test_odd_tables_and_keys(make_shards: MakeShards) -> None:
    """Quoted names, a reserved word as key, text keys, generated and identity columns, partitions, another schema."""
    schema = """
    CREATE SCHEMA "Odd";
    CREATE TABLE "Odd"."Select" (
        "from" text NOT NULL, "ID" bigint GENERATED ALWAYS AS IDENTITY, body text,
        twice text GENERATED ALWAYS AS (body || body) STORED, PRIMARY KEY ("from", "ID"));
    CREATE TABLE public.parts ("order" bigint NOT NULL, day integer NOT NULL, PRIMARY KEY ("order", day))
        PARTITION BY RANGE (day);
    CREATE TABLE public.parts_1 PARTITION OF public.parts FOR VALUES FROM (0) TO (10);
    CREATE TABLE public.parts_2 PARTITION OF public.parts FOR VALUES FROM (10) TO (20);
    CREATE UNLOGGED TABLE public.bare (k uuid NOT NULL, v double precision);
    """
    tables = (
        ShardedTable("Odd", "Select", "from", "text"),
        ShardedTable("public", "bare", "k", "uuid"),
        ShardedTable("public", "parts", "order", "int"),
    )
    shards = make_shards(1, schema=schema, tables=tables)
    s1 = shards.on("s1")
    s1.execute(
        """
        INSERT INTO "Odd"."Select" ("from", body)
            SELECT 'k\N{GRINNING FACE}' || g, E'tab\\t' || g FROM generate_series(1, 300) g;
        INSERT INTO public.parts SELECT -g, g % 20 FROM generate_series(1, 300) g;
        INSERT INTO public.bare SELECT gen_random_uuid(), 'NaN' FROM generate_series(1, 300);
        """
    )
    before = {table: sorted(map(str, shards.rows(table)["s1"])) for table in tables}
    shards.add("s2", 1)
    shards.move(Mode.LOCKED)
    for table in tables:
        rows = shards.rows(table)
        assert rows["s1"]
        assert rows["s2"]
        assert sorted(map(str, rows["s1"] + rows["s2"])) == before[table]
    shards.assert_clean()


def test_what_logical_replication_cannot_carry_is_refused_to_it_alone(make_shards: MakeShards) -> None:
    schema = "CREATE UNLOGGED TABLE public.bare (k uuid NOT NULL PRIMARY KEY)"
    shards = make_shards(2, schema=schema, tables=(ShardedTable("public", "bare", "k", "uuid"),))
    with pytest.raises(PreflightFailed, match="unlogged"):
        shards.move(Mode.LOGICAL)
    with Mover(shards.catalog_url) as mover:
        mover.abort()
    shards.move(Mode.LOCKED)
    shards.assert_clean()
