"""A change that is interrupted between two shards: the fence is ahead of the catalog, the router ahead of a shard."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
from sqlalchemy import select

import shardkit
from shardkit.core.errors import TopologyUnsettled, UndeclaredTable
from shardkit.core.keyrange import Arc, ArcSet
from shardkit.core.ring import position
from shardkit.core.topology import Topology
from tests.sharded import ShardedCluster, User, until


@dataclass
class Interrupted:
    """A cutover that has decided on s0 and not yet opened s1; the catalog knows nothing of it."""

    key: int
    stays: int
    """A key that s0 keeps."""
    resume: threading.Event


@pytest.fixture
def interrupted(sharded: ShardedCluster) -> Iterator[Interrupted]:
    key, stays = sharded.keys("s0", 2)
    sharded.admin("s0").execute(
        "INSERT INTO public.users (id, name, score) VALUES (%s, 'moved', 0), (%s, 'stays', 0)", (key, stays)
    )
    with _interrupted(sharded, key) as resume:
        yield Interrupted(key, stays, resume)


@contextmanager
def _interrupted(sharded: ShardedCluster, key: int) -> Iterator[threading.Event]:
    arcs = ArcSet([Arc(position(key), position(key))])
    source, target = sharded.topology.named("s0").id, sharded.topology.named("s1").id
    decided, resume = threading.Event(), threading.Event()

    def wait(moment: str) -> None:
        if moment == "decided":  # and no transaction is open, which a server would end before long
            decided.set()
            assert resume.wait(60)

    def move() -> None:
        with sharded.lease() as catalog:
            sharded.mark(catalog, target, arcs)
            sharded.cut_over(catalog, source, target, arcs, clock=wait)
            sharded.purge(catalog, source, arcs)
            sharded.drain(catalog)

    with ThreadPoolExecutor(1) as mover:
        moving = mover.submit(move)
        assert decided.wait(20)
        try:
            yield resume
        finally:
            resume.set()
            moving.result(30)


def test_the_copy_of_the_shard_is_believed(sharded: ShardedCluster, interrupted: Interrupted) -> None:
    """Even by an application that starts now, with what the catalog says."""
    with sharded.connect() as cluster, cluster.sessionmaker()() as session:
        recorded = cluster.topology.version
        assert session.get_one(User, interrupted.stays).name == "stays"
        assert cluster.topology.version == recorded + 1
        assert sharded.topology.version == recorded


def test_who_waits_for_an_opening_asks_that_shard_alone_at_first(
    sharded: ShardedCluster, interrupted: Interrupted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every session of every process waits then: the catalog, of which each would be a client, knows no more."""
    asked: list[int] = []
    pauses: list[float] = []
    with sharded.connect() as cluster, cluster.sessionmaker()() as session:
        recorded, read_current = cluster.topology.version, cluster.engines.read_current

        def pause(seconds: float) -> None:
            pauses.append(seconds)
            if len(pauses) == 5:
                interrupted.resume.set()
                opened = "SELECT FROM shardkit.topology WHERE version > %s"
                until(lambda: sharded.query("s1", opened, recorded), "the shard is open")

        def read() -> Topology | None:
            asked.append(len(pauses))
            return read_current()

        monkeypatch.setattr(cluster.engines, "pause", pause)
        monkeypatch.setattr(cluster.engines, "read_current", read)
        assert session.get_one(User, interrupted.key).name == "moved"
    assert (len(pauses), asked) == (5, [])


def test_a_router_ahead_of_a_shard_waits_for_it(sharded: ShardedCluster, interrupted: Interrupted) -> None:
    with sharded.connect() as cluster, ThreadPoolExecutor(1) as thread:

        def read() -> str:
            with cluster.sessionmaker()() as session:
                return session.get_one(User, interrupted.key).name

        recorded = cluster.topology.version
        reading = thread.submit(read)
        until(lambda: cluster.topology.version > recorded, "the router has learned of the decision")
        assert not reading.done()
        interrupted.resume.set()
        assert reading.result(20) == "moved"


def test_its_patience_ends(sharded: ShardedCluster, interrupted: Interrupted) -> None:
    with sharded.connect(settle_seconds=0.2) as cluster, cluster.sessionmaker()() as session:
        with pytest.raises(TopologyUnsettled, match="s1") as raised:
            session.get(User, interrupted.key)
        assert raised.value.retryable
        assert session.get_one(User, interrupted.stays).name == "stays"
        interrupted.resume.set()
        until(
            lambda: len(sharded.holding("SELECT FROM public.users WHERE name = 'moved'")) == 1,
            "the move ends",
        )
        assert session.get_one(User, interrupted.key).name == "moved"


async def test_an_async_router_waits_without_holding_the_loop_up(
    sharded: ShardedCluster, interrupted: Interrupted
) -> None:
    cluster = sharded.connect()
    Session = cluster.async_sessionmaker()

    async def read(key: int) -> str:
        async with Session() as session:
            return (await session.get_one(User, key)).name

    recorded = cluster.topology.version
    reading = asyncio.create_task(read(interrupted.key))
    while cluster.topology.version == recorded:  # noqa: ASYNC110 - another task changes it
        await asyncio.sleep(0.002)
    assert await read(interrupted.stays) == "stays"
    assert not reading.done()
    interrupted.resume.set()
    assert await reading == "moved"
    await cluster.adispose()


def test_a_scatter_waits_too(sharded: ShardedCluster, interrupted: Interrupted) -> None:
    """It must not answer with what some shards held before and others after."""
    with sharded.connect() as cluster, ThreadPoolExecutor(1) as thread:

        def read() -> list[str]:
            with cluster.sessionmaker()() as session:
                return sorted(session.scalars(select(User.name)).all())

        recorded = cluster.topology.version
        reading = thread.submit(read)
        until(lambda: cluster.topology.version > recorded, "the router has learned of the decision")
        interrupted.resume.set()
        assert reading.result(20) == ["moved", "stays"]


def test_a_router_never_goes_back(sharded: ShardedCluster, cluster: shardkit.ShardCluster) -> None:
    before = cluster.topology
    (key,) = sharded.keys("s0", 1)
    sharded.move_key(key)
    with cluster.sessionmaker()() as session:
        session.get(User, key)
    after = cluster.topology
    assert after.version > before.version
    assert cluster.router.adopt(before) is after


def test_the_catalog_need_not_answer(sharded: ShardedCluster) -> None:
    (key,) = sharded.keys("s0", 1)
    sharded.admin("s0").execute("INSERT INTO public.users (id, name, score) VALUES (%s, 'x', 0)", (key,))
    nowhere = "postgresql://postgres@127.0.0.1:1/catalog"
    with shardkit.connect(nowhere, sharded.topology.named("s1").url) as cluster:
        sharded.move_key(key)
        with cluster.sessionmaker()() as session:
            assert session.get_one(User, key).name == "x"


def test_a_table_that_nobody_declared(sharded: ShardedCluster, cluster: shardkit.ShardCluster) -> None:
    bare = cluster.topology.to_json()
    bare["tables"] = []
    with cluster.sessionmaker()() as session:
        # An older topology, which the catalog replaces: one look is enough.
        bare["version"] -= 1
        for shard in bare["shards"]:
            shard["fence"][0] = min(shard["fence"][0], bare["version"])
        cluster.router._topology = Topology.from_json(bare)
        assert session.get(User, 1) is None
        session.rollback()
        bare["version"] = sharded.topology.version
        cluster.router._topology = Topology.from_json(bare)
        with pytest.raises(UndeclaredTable, match="users"):
            session.get(User, 1)
        session.rollback()
        session.add(User(id=1, name="x"))
        with pytest.raises(UndeclaredTable, match="users"):
            session.flush()
