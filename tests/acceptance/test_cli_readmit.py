"""`shardkit shard readmit` from outside: what it says, asks and refuses, and what the doctor says before."""

from __future__ import annotations

import signal

from shardkit.storage import readmission
from shardkit.storage.catalog import Catalog
from shardkit.storage.connections import ShardConnections
from shardkit.storage.readmission import Lag
from tests.acceptance.conftest import Program
from tests.fix_backups import BackUp
from tests.fix_shards import Shards
from tests.movers import run_forked


def test_rows_that_came_back(two: Shards, call: Program, program: Program, back_up: BackUp) -> None:
    backup = back_up(two, "s1")
    then = two.topology()
    two.move()
    now = two.topology()
    backup.restore()
    sick = call("doctor")
    assert sick.code == 3
    assert "s1, fence: The shard was restored or failed over to an older state" in sick.out
    assert "`shardkit shard readmit s1` brings it forward." in sick.out
    call("shard", "reweight", "s1=50", "--yes").failed(
        3, "shard s1: it has the fence", "`shardkit shard readmit s1`"
    )

    moved = len(two.rows(two.tables[1])["s2"])
    planned = call("shard", "readmit", "s1", "--dry-run", "--json").ok().document
    assert planned == {
        "shard": "s1",
        "behind": True,
        "held": then.version,
        "in_force": now.version,
        "fences": [then.by_id[0].fence.relation],
        "returned": {"arcs": 1, "rows": {"public.posts": 2 * moved, "public.users": moved}},
        "gained": [],
        "readmitted": False,
        "version": now.version,
        "refusal": None,
        "next": "`shardkit shard readmit s1` brings it forward.",
    }
    assert two.topology() == now
    call("shard", "readmit", "s1").failed(2, "stdin is no terminal", "--yes")
    done = program("shard", "readmit", "s1", "--yes").ok()
    assert f"1 arc came back that others own now: {2 * moved} rows of public.posts, {moved} rows" in done.out
    assert f"Shard s1 has topology {now.version + 1} now." in done.out
    assert "Next: `shardkit verify --repair` removes" in done.out
    assert "No session will see them." in done.err

    call("verify", "--repair", "--yes").ok()
    two.assert_clean()
    call("doctor").ok()
    again = call("shard", "readmit", "s1").ok().out
    assert again == "Shard s1 is not behind: it has the fence that the catalog relies on.\nNothing to do.\n"
    call("shard", "readmit", "s3").failed(3, "There is no shard 's3'")


def test_rows_that_are_gone(two: Shards, call: Program, back_up: BackUp) -> None:
    backup = back_up(two, "s2")
    two.move()
    backup.restore()
    planned = call("shard", "readmit", "s2", "--dry-run")
    assert planned.code == 3
    assert "s1" in planned.out
    assert "gone" in planned.out
    assert "Refused: Shard s2 holds topology" in planned.out
    call("shard", "readmit", "s2", "--yes").failed(
        3, "1 arcs of shard s1, which has deleted them", "--accept-loss"
    )
    done = call("shard", "readmit", "s2", "--yes", "--accept-loss", "--json").ok().document
    assert done["readmitted"] is True
    assert [(each["owner"], each["where"]) for each in done["gained"]] == [("s1", "gone")]
    assert done["next"] == "`shardkit verify` looks at every row."
    call("verify").ok()
    two.assert_clean()


def test_killed_at_each_step_it_is_run_again(two: Shards, call: Program, back_up: BackUp) -> None:
    backup = back_up(two, "s1")
    two.move()
    now = two.topology()
    backup.restore()
    readmit = ("shard", "readmit", "s1", "--yes")
    for point in ("catalog.propose.committed", "change.locked", "closing.commit"):
        assert run_forked("command", two.catalog_url, point, arguments=readmit) == -signal.SIGKILL
        assert two.topology() == now
        assert look(two).is_behind
    assert "interrupted change of topology is settled" in call("rebalance", "resume").ok().out
    assert run_forked("command", two.catalog_url, "closing.committed", arguments=readmit) == -signal.SIGKILL
    assert two.topology() == now  # decided, and not recorded
    resume = ("rebalance", "resume")
    assert (
        run_forked("command", two.catalog_url, "catalog.record.commit", arguments=resume) == -signal.SIGKILL
    )
    with Catalog.open(two.catalog_url) as catalog:
        assert catalog.proposed() is not None
    assert "is not behind" in call(*readmit).ok().out
    with Catalog.open(two.catalog_url) as catalog:
        assert catalog.proposed() is None
    call("verify", "--repair", "--yes").ok()
    two.assert_clean()


def look(shards: Shards) -> Lag:
    with Catalog.open(shards.catalog_url) as catalog, ShardConnections() as connections:
        return readmission.look(catalog, connections, "s1")
