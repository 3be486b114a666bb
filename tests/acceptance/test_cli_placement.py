"""`shard reweight` and `shard remove` as an operator uses them: what they show, refuse, and say to do next."""

from __future__ import annotations

from typing import Any

import pytest

from shardkit.core.topology import HomeTable
from shardkit.storage import membership
from shardkit.storage.connections import connect, value
from tests.acceptance.conftest import Program, contents
from tests.fix_shards import TABLES, MakeShards, Shards, fill

USERS = 200


@pytest.fixture
def two(make_shards: MakeShards, folder: object, monkeypatch: pytest.MonkeyPatch) -> Shards:
    """Two shards that hold half of the rows each."""
    shards = make_shards(2)
    monkeypatch.setenv("SHARDKIT_CATALOG", shards.catalog_url)
    fill(shards.on("s1"), USERS)
    shards.move()
    return shards


def shares(shards: Shards) -> dict[str, tuple[int, int]]:
    """Weight and slots of each shard."""
    topology = shards.topology()
    return {s.name: (s.weight, topology.owned(s.id).width >> 48) for s in topology.shards}


def users(shards: Shards) -> int:
    return sum(
        int(value(shards.on(s.name), "SELECT count(*) FROM public.users")) for s in shards.topology().shards
    )


def test_weights(two: Shards, call: Program) -> None:
    before = contents(two.catalog_url)
    planned = call("shard", "reweight", "s1=300", "--plan-only", "--json").ok().document
    assert contents(two.catalog_url) == before
    assert planned["plan"]["slots_moved"] == planned["plan"]["slots_minimum"] == 16_384
    assert [shard["weight"] for shard in planned["plan"]["shards"]] == [300, 100]
    assert planned["job"] is None
    assert planned["next"] == "the same command without --plan-only."

    call("shard", "reweight", "s1=300").failed(2, "Nobody can be asked here")
    assert contents(two.catalog_url) == before

    done = call("shard", "reweight", "s1=300", "s2=100", "--yes", "--json").ok().document
    assert done["weights"] == [{"name": "s1", "weight": 300}, {"name": "s2", "weight": 100}]
    assert done["job"]["kind"] == "reweight s1=300 s2=100"
    assert done["job"]["state"] == "done"
    assert done["next"] is None
    assert shares(two) == {"s1": (300, 49_152), "s2": (100, 16_384)}
    assert users(two) == USERS
    two.assert_clean()

    # The same proportions in other numbers: recorded, and nothing moves. The same numbers: nothing at all.
    told = call("shard", "reweight", "s1=30", "s2=10")
    assert "The weights are recorded." in told.ok().err
    assert shares(two) == {"s1": (30, 49_152), "s2": (10, 16_384)}
    version = two.topology().version
    call("shard", "reweight", "s1=30", "s2=10").ok()
    assert two.topology().version == version


def test_weights_that_are_none(two: Shards, call: Program) -> None:
    for wrong in ("s1", "s1=", "=5", "s1=-1", "s1=1.5", "s1=x", "s1=٣"):
        call("shard", "reweight", wrong, "--yes").failed(2, "Not NAME=WEIGHT", "a whole number from 0 up")
    call("shard", "reweight", "s1=1", "s1=2", "--yes").failed(2, "Shard s1 is named twice")
    call("shard", "reweight", "s9=1", "--yes").failed(3, "There is no shard 's9'; there are: s1, s2.")
    call("shard", "reweight", "s1=0", "s2=0", "--yes").failed(2, "No shard has a weight above 0")


def test_a_job_that_was_aborted_leaves_the_weights(two: Shards, call: Program, program: Program) -> None:
    assert program("shard", "reweight", "s1=0", "--yes", SHARDKIT_FAILPOINT="copying.poll").code == -9
    call("shard", "reweight", "s1=1", "--yes").failed(3, "unfinished")
    call("shard", "remove", "s1", "--yes").failed(3, "unfinished")
    aborted = call("rebalance", "abort", "--json").ok().document
    assert aborted["job"]["state"] == "aborted"
    assert aborted["next"].startswith("`shardkit rebalance run` gives every shard its share")
    assert shares(two) == {"s1": (0, 32_768), "s2": (100, 32_768)}
    back = call("shard", "reweight", "s1=100", "--yes", "--json").ok().document
    assert back["job"] is None
    assert back["next"] is None
    two.assert_clean()


def test_a_shard_leaves_and_comes_again(two: Shards, call: Program) -> None:
    url = two.topology().named("s2").url
    planned = call("shard", "remove", "s2", "--plan-only", "--json").ok().document
    assert planned["shards"] == [{"name": "s2", "url": planned["shards"][0]["url"], "left": False}]
    assert planned["plan"]["slots_moved"] == planned["plan"]["slots_minimum"] == 32_768
    call("shard", "remove", "s2").failed(2, "Nobody can be asked here")
    call("shard", "remove", "s2", "s2", "--yes").failed(2, "named twice")

    done = call("shard", "remove", "s2", "--yes", "--json").ok().document
    assert done["shards"][0]["left"] is True
    assert done["job"]["kind"] == "remove s2"
    assert done["job"]["state"] == "done"
    assert done["next"] is None
    assert shares(two) == {"s1": (100, 65_536)}
    assert users(two) == USERS
    with connect(url) as connection:
        assert value(connection, "SELECT count(*) FROM public.users") == 0

    # Nothing stumbles over the name of a shard that is no more.
    assert "s2 -> s1" in call("rebalance", "status").ok().out
    call("status").ok()
    call("doctor").ok()
    told = call("shard", "remove", "s2", "--yes").ok()
    assert "s2 left the cluster. The database stays" in told.out
    call("shard", "remove", "s9", "--yes").failed(3, "There is no shard 's9'; there are: s1.")

    again = call("shard", "add", "new", url, "--yes", "--json").ok().document
    assert again["job"]["state"] == "done"
    assert shares(two) == {"s1": (100, 32_768), "new": (100, 32_768)}
    assert users(two) == USERS
    call("doctor").ok()


def test_several_leave_at_once(two: Shards, call: Program) -> None:
    two.add("s3", 2)
    two.add("s4", 0)
    two.move()
    done = call("shard", "remove", "s4", "s1", "--yes", "--json").ok().document
    assert [entry["left"] for entry in done["shards"]] == [True, True]
    assert done["job"]["slots_moved"] == done["job"]["slots_minimum"] == 32_768
    assert {name: slots for name, (_, slots) in shares(two).items()} == {"s2": 32_768, "s3": 32_768}
    assert users(two) == USERS
    two.tables = TABLES
    two.assert_clean()


def test_a_removal_that_was_aborted_can_be_kept_or_gone_on_with(
    two: Shards, call: Program, program: Program
) -> None:
    assert program("shard", "remove", "s2", "--yes", SHARDKIT_FAILPOINT="copying.poll").code == -9
    assert "`shardkit rebalance resume`" in call("status", "--json").ok().document["next"]
    aborted = call("rebalance", "abort", "--json").ok().document
    assert aborted["next"] == (
        "`shardkit shard remove s2` drains it and lets it leave; `shardkit shard reweight NAME=WEIGHT` keeps it."
    )
    listed: Any = call("shard", "list", "--json").ok().document["shards"]
    assert [(each["name"], each["leaving"]) for each in listed] == [("s1", False), ("s2", True)]
    assert "leaving" in call("shard", "list").ok().out
    assert "shard s2 is to leave" in call("doctor").ok().out
    kept = call("shard", "reweight", "s2=100", "--yes", "--json").ok().document
    assert kept["next"] is None
    assert not two.topology().named("s2").leaving
    # And a drained shard that only waits to be let go.
    call("shard", "reweight", "s2=0", "--yes").ok()
    assert shares(two)["s2"] == (0, 0)
    assert call("status", "--json").ok().document["next"] is None, "weight 0 alone is no wish to leave"
    call("shard", "remove", "s2", "--yes").ok()
    assert shares(two) == {"s1": (100, 65_536)}


def test_all_reasons_against_a_removal_at_once(two: Shards, call: Program) -> None:
    for name in ("s1", "s2"):
        two.on(name).execute("CREATE TABLE public.settings (id integer PRIMARY KEY)")
    with two.writer() as (catalog, shards):
        membership.declare(catalog, shards, [HomeTable("public", "settings", "s2")])
    other = two.on("s2")
    other.execute("BEGIN")
    other.execute("CREATE TABLE public.other ()")
    other.execute("PREPARE TRANSACTION 'somebody''s'")
    version = two.topology().version
    try:
        while value(other, "SELECT clock_timestamp() - prepared < interval '1 s' FROM pg_prepared_xacts"):
            pass
        refused = call("shard", "remove", "s1", "s2", "--yes").failed(
            3,
            "no shard would be left to own the keys",
            "it is the home of public.settings",
            """prepared transaction "somebody's" is in doubt: commit it or roll it back""",
        )
        assert refused.err.count("\n  - ") == 3
    finally:
        other.execute("ROLLBACK PREPARED 'somebody''s'")
    assert two.topology().version == version
    call("shard", "reweight", "s1=0", "--yes").ok()
    call("shard", "remove", "s2", "--yes").failed(3, "no shard that stays has a weight above 0")
