"""A slot that the source gave up because it held back too much WAL: the copy begins again."""

from __future__ import annotations

import threading

import pytest

from shardkit.core.errors import ReplicationFailed
from shardkit.core.move import Phase
from shardkit.rebalance.progress import Progress
from shardkit.rebalance.waiting import Interrupted
from shardkit.storage.connections import Connection, value
from tests.fix_postgres import NewCluster
from tests.fix_shards import MakeShards, Shards, fill

SMALL = {"max_slot_wal_keep_size": "1MB", "min_wal_size": "32MB", "max_wal_size": "32MB"}
DISABLE = """
DO $$ DECLARE name text; BEGIN
    SELECT subname INTO STRICT name FROM pg_subscription
    WHERE subdbid = (SELECT oid FROM pg_database WHERE datname = current_database());
    EXECUTE format('ALTER SUBSCRIPTION %I DISABLE', name);
END $$
"""
STATUS = "SELECT wal_status FROM pg_replication_slots"


def lose_the_slot(source: Connection, target: Connection) -> None:
    target.execute(DISABLE)
    source.execute("CREATE TABLE public.ballast (x text)")
    for _ in range(20):
        source.execute("INSERT INTO public.ballast SELECT repeat('x', 1000) FROM generate_series(1, 5000)")
        source.execute("SELECT pg_switch_wal()")
        source.execute("CHECKPOINT")
        if value(source, STATUS) == "lost":
            return
    raise AssertionError("the slot outlived its budget")


@pytest.fixture
def shards(make_shards: MakeShards, new_cluster: NewCluster) -> Shards:
    made = make_shards(0)
    made.add("s1", new_cluster(settings=SMALL))
    fill(made.on("s1"), 300)
    made.add("s2", 1)
    return made


def copied_again(shards: Shards) -> None:
    phases: list[Phase] = []
    shards.resume(listener=lambda progress: phases.append(progress.phase))
    assert Phase.PREPARING in phases
    shards.assert_clean()
    assert sum(len(rows) for rows in shards.rows(shards.tables[1]).values()) == 300


def test_a_slot_lost_between_two_movers_begins_the_copy_again(shards: Shards) -> None:
    stop = threading.Event()

    def stop_there(progress: Progress) -> None:
        if progress.phase is Phase.CATCHING_UP:
            stop.set()

    with pytest.raises(Interrupted):
        shards.move(listener=stop_there, stop=stop)
    lose_the_slot(shards.on("s1"), shards.on("s2"))
    copied_again(shards)


def test_a_slot_lost_under_a_mover_stops_it_with_the_reason(shards: Shards) -> None:
    told: list[Progress] = []

    def lose(progress: Progress) -> None:
        if progress.phase is Phase.CUTTING_OVER:
            told.append(progress)
            if len(told) == 2:  # within the phase, whose beginning looks for the slot
                lose_the_slot(shards.on("s1"), shards.on("s2"))

    with pytest.raises(ReplicationFailed, match="too much WAL"):
        shards.move(listener=lose)
    copied_again(shards)
