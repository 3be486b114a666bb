"""`shardkit transactions`: what a crash left of a commit over three shards, listed and ended."""

from __future__ import annotations

import pytest

from tests.acceptance.conftest import Program
from tests.crash.test_two_phase_killed import USERS, left, run
from tests.sharded import ShardedCluster, until

APPLICATION = """
SELECT FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'shardkit'
"""


@pytest.mark.parametrize(
    ("failpoint", "listed", "ended", "holding"),
    [
        ("two_phase.deciding", "undecided", "rolled back", []),
        ("two_phase.decided", "committed", "committed", ["s0", "s1", "s2"]),
    ],
)
def test_list_and_recover(
    sharded: ShardedCluster, call: Program, failpoint: str, listed: str, ended: str, holding: list[str]
) -> None:
    environment = {"SHARDKIT_CATALOG": sharded.catalog_url}
    nothing = call("transactions", "list", "--json", **environment).ok().document
    assert nothing == {"transactions": [], "unreachable": [], "next": None}
    run(sharded, "write", failpoint)
    until(
        lambda: not sharded.holding(APPLICATION),
        "its end",
    )

    document = call("transactions", "list", "--json", **environment).ok().document
    (entry,) = document["transactions"]
    assert entry["state"] == listed
    assert entry["decided_by"] == "s0"
    assert entry["prepared_on"] == ["s1", "s2"]
    assert "transactions recover" in document["next"]
    shown = call("transactions", "list", **environment).ok().out
    assert entry["transaction"] in shown
    assert listed in shown

    shown = call("transactions", "recover", **environment).ok().out
    assert ended in shown
    assert sharded.holding(USERS) == holding
    assert call("transactions", "recover", "--json", **environment).ok().document == nothing
    assert not left(sharded)
