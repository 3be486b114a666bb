"""Running a mover from a command."""

from __future__ import annotations

from shardkit.cli.running import carry
from shardkit.rebalance.mover import Mover
from shardkit.storage.catalog import Catalog, Job
from tests.fix_shards import MakeShards, fill


def test_a_job_that_outlived_its_catalog_connection_is_told_as_done(make_shards: MakeShards) -> None:
    shards = make_shards(2)
    fill(shards.on("s1"), 20)

    def move(mover: Mover) -> Job:
        mover.start("rebalance")
        job = mover.run()
        with Catalog.open(shards.catalog_url) as catalog:
            pid = mover.catalog.connection.info.backend_pid
            catalog.connection.execute("SELECT pg_terminate_backend(%s, 5000)", (pid,))
        return job

    assert carry(shards.catalog_url, move, parallel=1, patience=30.0)["state"] == "done"
