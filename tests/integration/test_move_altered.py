"""Tables that are altered, or emptied, while their rows move: what replication does not carry is never decided."""

from __future__ import annotations

from collections.abc import Callable

import psycopg
import pytest
from psycopg import sql

from shardkit.core.errors import PreflightFailed, VerificationFailed
from shardkit.core.move import Phase
from shardkit.core.topology import ShardedTable
from shardkit.rebalance.mover import Mover
from shardkit.rebalance.progress import Progress
from shardkit.storage.connections import connect, value
from tests.fix_shards import MakeShards, Shards, fill

EVENTS = ShardedTable("public", "events", "user_id", "int")
PARTITIONED = """
CREATE TABLE public.events (user_id bigint NOT NULL, day int NOT NULL, what text, PRIMARY KEY (user_id, day))
    PARTITION BY RANGE (day);
CREATE TABLE public.events_1 PARTITION OF public.events FOR VALUES FROM (0) TO (5) PARTITION BY RANGE (day);
CREATE TABLE public."Events 1a" PARTITION OF public.events_1 FOR VALUES FROM (0) TO (5);
CREATE TABLE public.events_2 PARTITION OF public.events FOR VALUES FROM (5) TO (10);
"""
TRIGGERS = "SELECT count(*) FROM pg_trigger WHERE tgname ~ 'shardkit'"


@pytest.fixture
def partitioned(make_shards: MakeShards) -> Shards:
    shards = make_shards(1, tables=(EVENTS,), schema=PARTITIONED)
    shards.on("s1").execute(
        "INSERT INTO public.events SELECT u, d, 'x' FROM generate_series(1, 200) u, generate_series(0, 9) d"
    )
    shards.add("s2", 1)
    return shards


def once(phase: Phase, act: Callable[[], object]) -> Callable[[Progress], None]:
    done: list[object] = []

    def listener(progress: Progress) -> None:
        if progress.phase is phase and not done:
            done.append(True)
            act()

    return listener


def test_a_partition_is_not_truncated_while_its_rows_move(partitioned: Shards) -> None:
    refused: list[str | None] = []

    def truncate() -> None:
        for part in ("events", "events_1", "Events 1a", "events_2"):
            with pytest.raises(psycopg.Error) as caught:
                partitioned.on("s1").execute(
                    sql.SQL("TRUNCATE ONLY {}" if part == "events_2" else "TRUNCATE {}").format(
                        sql.Identifier("public", part)
                    )
                )
            refused.append(caught.value.sqlstate)

    partitioned.move(listener=once(Phase.CUTTING_OVER, truncate))
    assert refused == ["SK003"] * 4
    partitioned.assert_clean()
    assert sum(len(rows) for rows in partitioned.rows(EVENTS).values()) == 2000


@pytest.mark.parametrize(
    "statement",
    [
        "ALTER TABLE public.events DETACH PARTITION public.events_2",
        "ALTER TABLE public.events DETACH PARTITION public.events_2 CONCURRENTLY",
        "DROP TABLE public.events_2",
        "SET session_replication_role = replica; TRUNCATE public.events_2; RESET session_replication_role",
    ],
)
def test_a_partition_that_goes_with_its_rows_stops_the_move(partitioned: Shards, statement: str) -> None:
    with pytest.raises(VerificationFailed):
        partitioned.move(listener=once(Phase.CUTTING_OVER, lambda: partitioned.on("s1").execute(statement)))
    assert not partitioned.topology().owned(1)
    with Mover(partitioned.catalog_url) as mover:
        mover.abort()
    partitioned.assert_clean()
    assert value(partitioned.on("s1"), TRIGGERS) == 0
    assert len(partitioned.rows(EVENTS)["s1"]) == 1000


def test_a_table_that_was_rewritten_is_compared_again_and_moves(make_shards: MakeShards) -> None:
    shards = make_shards(2)
    fill(shards.on("s1"), 100)
    phases: list[Phase] = []
    vacuum = once(Phase.CUTTING_OVER, lambda: shards.on("s1").execute("VACUUM FULL public.users"))

    def listener(progress: Progress) -> None:
        vacuum(progress)
        if phases[-1:] != [progress.phase]:
            phases.append(progress.phase)

    shards.move(listener=listener)
    assert phases.count(Phase.VERIFYING) == 2
    shards.assert_clean()


def test_triggers_that_were_off_for_a_while_are_not_relied_on(make_shards: MakeShards) -> None:
    """An UPDATE that nobody noted is lost on the target: the comparison of all rows finds it."""
    shards = make_shards(2)
    fill(shards.on("s1"), 100)

    def write_unnoted() -> None:
        key = value(shards.on("s2"), "SELECT max(id) FROM public.users")
        with connect(shards.topology().named("s2").url) as there:
            there.execute("SET session_replication_role = replica")
            there.execute("DELETE FROM public.users WHERE id = %s", (key,))
        one = shards.on("s1")
        one.execute("ALTER TABLE public.users DISABLE TRIGGER ALL")
        one.execute("UPDATE public.users SET n = 5 WHERE id = %s", (key,))
        one.execute("ALTER TABLE public.users ENABLE TRIGGER ALL")

    with pytest.raises(VerificationFailed, match=r"public.users id="):
        shards.move(listener=once(Phase.CUTTING_OVER, write_unnoted))
    assert not shards.topology().owned(1)


def test_a_table_altered_during_the_move_stops_it_with_the_reason(make_shards: MakeShards) -> None:
    shards = make_shards(2)
    fill(shards.on("s1"), 100)
    alter = once(
        Phase.CUTTING_OVER, lambda: shards.on("s1").execute("ALTER TABLE public.users ADD COLUMN extra int")
    )
    with pytest.raises(PreflightFailed, match=r"public\.users\.extra is missing on the target"):
        shards.move(listener=alter)
    shards.on("s2").execute("ALTER TABLE public.users ADD COLUMN extra int")
    shards.resume()
    shards.assert_clean()


def test_the_target_keeps_its_own_rows_when_the_source_is_emptied_by_force(make_shards: MakeShards) -> None:
    """A TRUNCATE knows no row filter, so it is not published."""
    shards = make_shards(2)
    fill(shards.on("s1"), 100)
    shards.move()
    own = shards.rows(shards.tables[1])["s1"]

    def empty() -> None:
        with connect(shards.topology().named("s2").url) as there:
            there.execute("SET session_replication_role = replica; TRUNCATE public.users, public.posts")

    with Mover(shards.catalog_url, listener=once(Phase.CATCHING_UP, empty)) as mover:
        mover.start("rebalance", {0: 300, 1: 100})
        with pytest.raises(VerificationFailed):
            mover.run()
    held = shards.rows(shards.tables[1])["s1"]
    assert len(held) > len(own)
    assert set(held) >= set(own)
