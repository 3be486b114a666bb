"""An application killed with SIGKILL at every step of a commit over three shards: all of it is there, or nothing."""

from __future__ import annotations

import asyncio
import signal

import pytest

import shardkit
from shardkit.storage import indoubt
from shardkit.storage.connections import ShardConnections
from shardkit.storage.indoubt import State
from tests.movers import run_forked
from tests.sharded import ShardedCluster, User, until

UNDECIDED = ["noted", "preparing:1", "prepared:1", "preparing:2", "prepared:2", "deciding"]
DECIDED = ["decided", "finishing:1", "finished:1", "finishing:2", "finished:2", "forgotten"]

USERS = "SELECT id FROM public.users"
LEFT = {
    "prepared": "SELECT gid FROM pg_prepared_xacts WHERE database = current_database()",
    "decisions": "SELECT gid FROM shardkit.decision",
    "fences": r"SELECT relation::regclass FROM pg_locks l JOIN pg_class c ON c.oid = l.relation "
    r"WHERE c.relname ~ '^fence_' AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())",
}


def write(catalog_url: str, *keys: str) -> int:
    """The application, in a process of its own: users of several shards, in one transaction."""
    with (
        shardkit.connect(catalog_url) as cluster,
        cluster.sessionmaker(mode="two_phase").begin() as session,
    ):
        session.add_all(User(id=int(key), name="x") for key in keys)
    return 0


def write_async(catalog_url: str, *keys: str) -> int:
    """The same with a loop."""

    async def main() -> None:
        cluster = shardkit.connect(catalog_url)
        async with cluster.async_sessionmaker(mode="two_phase").begin() as session:
            session.add_all(User(id=int(key), name="x") for key in keys)

    asyncio.run(main())
    return 0


both = pytest.mark.parametrize("application", ["write", "write_async"])


def run(sharded: ShardedCluster, application: str, failpoint: str) -> None:
    """Write a user on each shard, and be killed on the way."""
    keys = [str(sharded.keys(name, 1)[0]) for name in ("s0", "s1", "s2")]
    arguments = [f"{__name__}:{application}", sharded.catalog_url, *keys]
    code = run_forked("call", sharded.catalog_url, failpoint, arguments=arguments)
    assert code == -signal.SIGKILL, f"never passed {failpoint}"


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
def test_killed_at(sharded: ShardedCluster, application: str, failpoint: str) -> None:
    run(sharded, application, f"two_phase.{failpoint}")
    states = recovered(sharded)
    expected = [] if failpoint in UNDECIDED else ["s0", "s1", "s2"]
    assert sharded.holding(USERS) == expected
    assert set(states) <= {State.COMMITTED if expected else State.GIVEN_UP}
    assert until(lambda: not left(sharded), "locks to go") is True
