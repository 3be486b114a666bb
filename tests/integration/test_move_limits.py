"""What a job may cost its servers, and that it leaves no dead rows behind."""

from __future__ import annotations

import time

import pytest

from shardkit.core.errors import WalBudgetExceeded
from shardkit.core.move import Phase
from shardkit.dev import Standby
from shardkit.rebalance.limits import Limits
from shardkit.rebalance.progress import Progress
from shardkit.storage.catalog import Catalog
from shardkit.storage.connections import value
from tests.fix_postgres import NewCluster
from tests.fix_shards import MakeShards, fill
from tests.sharded import until


def test_a_purge_keeps_to_its_rate(make_shards: MakeShards) -> None:
    shards = make_shards(2)
    fill(shards.on("s1"), 400)
    entered: dict[Phase, float] = {}
    job = shards.move(
        limits=Limits(rows_per_second=400.0),
        listener=lambda progress: entered.setdefault(progress.phase, time.monotonic()) and None,
    )
    shards.assert_clean()
    with Catalog.open(shards.catalog_url) as catalog:
        assert catalog.job(job.id).options["rows_per_second"] == 400.0
        (transfer,) = catalog.transfers(job.id)
    deleted = transfer.record["rows_purged"]
    assert deleted > 400
    assert entered[Phase.DONE] - entered[Phase.PURGING] >= deleted / 400.0


def test_a_purged_table_is_vacuumed(make_shards: MakeShards) -> None:
    shards = make_shards(2)
    fill(shards.on("s1"), 200)
    shards.move()
    vacuumed = "SELECT count(*) FROM pg_stat_user_tables WHERE vacuum_count > 0"
    until(lambda: value(shards.on("s1"), vacuumed) == 2, "the vacuum of both tables")


def test_a_copy_that_holds_back_too_much_wal_is_given_up(make_shards: MakeShards) -> None:
    shards = make_shards(2)
    fill(shards.on("s1"), 200)
    with pytest.raises(WalBudgetExceeded) as caught:
        shards.move(limits=Limits(wal_retained=1))
    assert (caught.value.exit_code, caught.value.fields["shard"]) == (5, "s1")
    slots = "SELECT 1 FROM pg_replication_slots WHERE database = current_database()"
    assert value(shards.on("s1"), slots) is None
    phases: list[Phase] = []
    shards.resume(
        limits=Limits(wal_retained=1 << 40), listener=lambda progress: phases.append(progress.phase)
    )
    assert Phase.PREPARING in phases
    shards.assert_clean()
    assert sum(len(rows) for rows in shards.rows(shards.tables[1]).values()) == 200


def test_a_purge_waits_for_a_standby(make_shards: MakeShards, new_cluster: NewCluster) -> None:
    primary = new_cluster()
    shards = make_shards(0)
    shards.add("s1", primary)
    fill(shards.on("s1"), 200)
    shards.add("s2", 1)
    standby = Standby(primary)
    standby.start()
    waited: list[str] = []

    def listener(progress: Progress) -> None:
        if progress.phase is Phase.VERIFYING and not progress.rows:
            standby.pause()
        if progress.waiting_for and "--max-lag" in progress.waiting_for:
            waited.append(progress.waiting_for)
            standby.resume()

    try:
        shards.move(limits=Limits(lag=2000), listener=listener)
    finally:
        standby.close()
    assert waited[0].startswith("the deletion on shard s1 waits for a standby")
    shards.assert_clean()
