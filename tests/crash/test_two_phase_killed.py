"""An application killed with SIGKILL at every step of a commit over three shards: all of it is there, or nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from shardkit.storage import indoubt
from shardkit.storage.connections import ShardConnections
from shardkit.storage.indoubt import State
from tests.sharded import ShardedCluster, until

SYNC = """
import sys
import shardkit
from tests.sharded import User
with shardkit.connect(sys.argv[1]) as cluster, cluster.sessionmaker(mode="two_phase").begin() as session:
    session.add_all(User(id=int(key), name="x") for key in sys.argv[2:])
"""
ASYNC = """
import asyncio, sys
import shardkit
from tests.sharded import User
async def main():
    cluster = shardkit.connect(sys.argv[1])
    async with cluster.async_sessionmaker(mode="two_phase").begin() as session:
        session.add_all(User(id=int(key), name="x") for key in sys.argv[2:])
asyncio.run(main())
"""
UNDECIDED = ["noted", "preparing:1", "prepared:1", "preparing:2", "prepared:2", "deciding"]
DECIDED = ["decided", "finishing:1", "finished:1", "finishing:2", "finished:2", "forgotten"]

USERS = "SELECT id FROM public.users"
LEFT = {
    "prepared": "SELECT gid FROM pg_prepared_xacts WHERE database = current_database()",
    "decisions": "SELECT gid FROM shardkit.decision",
    "fences": r"SELECT relation::regclass FROM pg_locks l JOIN pg_class c ON c.oid = l.relation "
    r"WHERE c.relname ~ '^fence_' AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())",
}

both = pytest.mark.parametrize("program", [SYNC, ASYNC], ids=["sync", "async"])


def run(sharded: ShardedCluster, program: str, failpoint: str) -> list[int]:
    """Write a user on each shard, in one transaction, and be killed on the way."""
    keys = [sharded.keys(name, 1)[0] for name in ("s0", "s1", "s2")]
    done = subprocess.run(
        [sys.executable, "-c", program, sharded.catalog_url, *map(str, keys)],
        env={**os.environ, "SHARDKIT_FAILPOINT": failpoint},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == -signal.SIGKILL, f"never passed {failpoint}: {done.stderr}"
    return keys


def recovered(sharded: ShardedCluster) -> list[State]:
    """What became of what was left. A server may need a moment to notice that the application is gone."""
    states: list[State] = []

    def settled() -> bool:
        with ShardConnections("shardkit tests") as shards:
            states[:] = [doubt.state for doubt in indoubt.recover(sharded.topology, shards)]
        return State.LIVE not in states

    until(settled, "the application's connections to end")
    return states


def left(sharded: ShardedCluster) -> dict[str, list[str]]:
    return {what: found for what, query in LEFT.items() if (found := sharded.holding(query))}


@both
@pytest.mark.parametrize("failpoint", [*UNDECIDED, *DECIDED])
def test_killed_at(sharded: ShardedCluster, program: str, failpoint: str) -> None:
    run(sharded, program, f"two_phase.{failpoint}")
    states = recovered(sharded)
    expected = [] if failpoint in UNDECIDED else ["s0", "s1", "s2"]
    assert sharded.holding(USERS) == expected
    assert set(states) <= {State.COMMITTED if expected else State.GIVEN_UP}
    assert until(lambda: not left(sharded), "locks to go") is True
