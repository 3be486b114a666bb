"""A move that keeps its sources, from the command line: undone, or finalised."""

from __future__ import annotations

from shardkit.storage.connections import value
from tests.acceptance.conftest import USERS, Program
from tests.fix_shards import Shards

COUNT = "SELECT count(*) FROM public.users"


def test_a_move_is_rolled_back_and_made_again(two: Shards, call: Program) -> None:
    call("rebalance", "rollback").failed(3, "No source keeps moved rows")
    assert call("rebalance", "plan", "--keep-source", "--json").ok().document["problems"] == []
    kept = call("rebalance", "run", "--keep-source", "--yes", "--json").ok().document
    assert (kept["job"]["state"], kept["job"]["keep_source"]) == ("kept", True)
    assert "`shardkit rebalance finalize`" in kept["next"]
    assert "`shardkit rebalance rollback`" in kept["next"]
    (transfer,) = kept["job"]["transfers"]
    assert transfer["phase"] == "kept"
    assert transfer["live"]["enabled"] is True
    assert transfer["live"]["wal_retained"] >= 0
    assert value(two.on("s1"), COUNT) == USERS

    call("rebalance", "run", "--yes").failed(3, "still keep the moved rows", "shardkit rebalance finalize")
    call("rebalance", "abort").failed(3, "Nothing of job 1 is under way", "shardkit rebalance rollback")
    call("rebalance", "pause").failed(3, "No mover works on job 1", "shardkit rebalance finalize")
    watched = call("rebalance", "status", "--watch").ok().out
    assert "Job 1 (rebalance): kept" in watched
    assert "The source keeps the rows until `rebalance finalize`" in watched
    assert "of WAL retained" in watched
    looked = call("doctor").ok().out
    assert "the sources of job 1 keep the moved rows" in looked

    back = call("rebalance", "rollback", "--json").ok()
    assert back.document["job"]["state"] == "rolled back"
    assert "shardkit shard reweight" in back.document["next"]
    (transfer,) = back.document["job"]["transfers"]
    assert transfer["pause_back_ms"]["total"] > 0
    assert "s1 -> s2: Comparing the rows on both sides, to go back." in back.err
    two.assert_clean()
    assert value(two.on("s2"), COUNT) == 0
    call("rebalance", "rollback").failed(3, "No source keeps moved rows")
    call("doctor").ok()

    call("rebalance", "run", "--keep-source", "--yes").ok()
    done = call("rebalance", "finalize", "--json").ok().document
    assert (done["job"]["state"], done["next"]) == ("done", None)
    two.assert_clean()
    assert 0 < value(two.on("s2"), COUNT) < USERS
    call("rebalance", "finalize").failed(3, "No source keeps moved rows")


def test_what_would_stand_in_the_way_back_is_found_before_a_row_moves(two: Shards, call: Program) -> None:
    two.on("s1").execute("DROP TABLE shardkit.opened")
    plan = call("rebalance", "plan", "--keep-source", "--json").ok().document
    assert len(plan["problems"]) == 1
    assert "to go back, shard s1" in plan["problems"][0]
    call("rebalance", "run", "--keep-source", "--yes").failed(3, "to go back, shard s1")
    assert call("rebalance", "plan", "--json").ok().document["problems"] == []


def test_locked_steps_keep_no_source(two: Shards, call: Program) -> None:
    refused = call("rebalance", "run", "--mode", "locked", "--keep-source", "--yes")
    refused.failed(3, "rows leave shard s1 in locked steps, which keep no source")
    call("rebalance", "status").ok()
    assert (
        call("rebalance", "run", "--mode", "locked", "--yes", "--json").ok().document["job"]["state"]
        == "done"
    )
    two.assert_clean()
