"""A shard leaves while applications work: routers that slept through it find their way, and nobody counts on it.

The shard with the lowest number leaves in most of these, as it is the one that writers of reference tables write first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from psycopg import sql
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

import shardkit
from shardkit.core.errors import MoveWaiting, NoSuchShard, PreflightFailed, TopologyChanged
from shardkit.core.topology import Topology
from shardkit.storage import change, indoubt, leaving, membership
from shardkit.storage.connections import connect, value
from shardkit.storage.indoubt import State
from shardkit.storage.twophase import name_of, new_gid
from tests.fix_postgres import FreshDatabase
from tests.race.test_reference_join import RATES, Base, Rate, Writer, newcomer
from tests.sharded import ShardedCluster, User, until


@pytest.fixture
def three(fresh_database: FreshDatabase) -> Iterator[ShardedCluster]:
    """Shards s0 to s2 with a user each, and a reference table with one row."""
    cluster = ShardedCluster(fresh_database(0), [fresh_database(number) for number in range(3)])
    with cluster.connect() as connected:
        connected.create_all(Base.metadata)
        with connected.sessionmaker(mode="best_effort")() as session:
            session.add(Rate(id=1, writer=0))
            session.add_all(User(id=key, name="before") for key in keys_of(cluster))
            session.commit()
    yield cluster
    cluster.close()


def keys_of(cluster: ShardedCluster) -> list[int]:
    """A key of each shard; they stay the same when shards leave."""
    return [cluster.keys(name, 1)[0] for name in ("s0", "s1", "s2")]


def drain(cluster: ShardedCluster, name: str) -> None:
    """What the job of a removal does, the short way."""
    topology = cluster.topology
    shard = topology.named(name)
    target = next(each.id for each in topology.shards if each.id != shard.id)
    with cluster.lease() as catalog:
        leaving.record(
            catalog,
            cluster.shards,
            lambda now, version: now.reweighted(version, {shard.id: 0}, [shard.id]),
            event="remove",
        )
    cluster.move(topology.owned(shard.id), shard.id, target)


def leave(cluster: ShardedCluster, name: str, **options: Any) -> Topology:
    with cluster.lease() as catalog:
        return leaving.leave(catalog, cluster.shards, cluster.topology.named(name), **options)


def remove(cluster: ShardedCluster, name: str) -> None:
    drain(cluster, name)
    leave(cluster, name)


def same_everywhere(cluster: ShardedCluster) -> list[tuple[Any, ...]]:
    first, *others = (cluster.query(shard.name, RATES) for shard in cluster.topology.shards)
    assert all(other == first for other in others)
    return first


# --- routers that slept ---------------------------------------------------------------------------------------------


def get(session: Session, keys: list[int]) -> None:
    assert session.get_one(User, keys[0]).id == keys[0]


def write(session: Session, keys: list[int]) -> None:
    session.execute(update(User).where(User.id == keys[0]).values(score=User.score + 1))


def scatter(session: Session, keys: list[int]) -> None:
    assert session.scalar(select(func.count()).select_from(User)) == len(keys)


def read_reference(session: Session, keys: list[int]) -> None:
    assert 1 in session.scalars(select(Rate.id)).all()


def write_reference(session: Session, keys: list[int]) -> None:
    session.execute(update(Rate).where(Rate.id == 1).values(n=Rate.n + 1))
    session.flush()


OPERATIONS = (get, write, scatter, read_reference, write_reference)


class Sleeper:
    """An application whose router knows the topology of its beginning until it does one operation."""

    def __init__(
        self, cluster: shardkit.ShardCluster, operation: Callable[[Session, list[int]], None], kind: str
    ) -> None:
        self._cluster = cluster
        self._operation = operation
        self._kind = kind

    async def _work(self, work: Callable[[Session], None]) -> None:
        if self._kind == "sync":
            with self._cluster.sessionmaker(mode="best_effort")() as session:
                work(session)
                session.commit()
        else:
            async with self._cluster.async_sessionmaker(mode="best_effort")() as async_session:
                await async_session.run_sync(work)
                await async_session.commit()

    async def connect(self, keys: list[int]) -> None:
        """Open a connection to every shard, and give it back to the pool."""

        def visit(session: Session) -> None:
            for key in keys:
                session.get(User, key)

        await self._work(visit)

    async def wake(self, keys: list[int]) -> None:
        """Do the operation; then the topology is known."""
        await self._work(lambda session: self._operation(session, keys))
        await self._cluster.adispose()
        self._cluster.dispose()


def sleepers(make: Callable[[], shardkit.ShardCluster]) -> list[Sleeper]:
    """One for each operation, sync and async, with a router of its own."""
    return [Sleeper(make(), operation, kind) for operation in OPERATIONS for kind in ("sync", "async")]


async def woken(three: ShardedCluster, slept: list[Sleeper], keys: list[int]) -> None:
    """Wake them all: each finds its way, and what they wrote is there once."""
    for sleeper in slept:
        await sleeper.wake(keys)
    assert same_everywhere(three) == [(1, 0, 2)]
    scores = [row for each in three.topology.shards for row in three.query(each.name, SCORES)]
    assert sorted(scores) == sorted((key, 2 if key == keys[0] else 0) for key in keys)


SCORES = "SELECT id, score FROM public.users"
KNOWN = pytest.mark.parametrize("known", ["connected", "not connected"])


@KNOWN
async def test_routers_that_slept(three: ShardedCluster, known: str) -> None:
    keys = keys_of(three)
    slept = sleepers(three.connect)
    for sleeper in slept if known == "connected" else ():
        await sleeper.connect(keys)
    remove(three, "s0")
    await woken(three, slept, keys)


async def test_without_the_catalog_the_shard_that_left_tells(three: ShardedCluster) -> None:
    keys = keys_of(three)
    drain(three, "s0")
    topology = three.topology
    with three.lease() as catalog:
        identity = catalog.cluster_id()
    nowhere = "postgresql://127.0.0.1:1/catalog"
    slept = sleepers(lambda: shardkit.ShardCluster(topology, nowhere, cluster=identity))
    leave(three, "s0")
    await woken(three, slept, keys)


@KNOWN
async def test_the_database_is_another_shard_by_now(three: ShardedCluster, known: str) -> None:
    """Removed and added again: the number, and with it the identity, is another."""
    keys = keys_of(three)
    url = three.topology.named("s0").url
    slept = sleepers(three.connect)
    for sleeper in slept if known == "connected" else ():
        await sleeper.connect(keys)
    remove(three, "s0")
    with three.lease() as catalog:
        membership.join(catalog, three.shards, name="s0", url=url)
    assert [shard.id for shard in three.topology.shards] == [1, 2, 3]
    await woken(three, slept, keys)


async def test_the_database_is_gone(three: ShardedCluster) -> None:
    keys = keys_of(three)
    slept = sleepers(three.connect)
    gone = three.topology.named("s0")
    remove(three, "s0")
    with connect(three.catalog_url) as admin:  # of the same server
        name = sql.Identifier(value(three.shards.get(gone), "SELECT current_database()"))
        admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(name))
    await woken(three, slept, keys)


# --- transactions that are open -------------------------------------------------------------------------------------


def test_a_transaction_that_has_it_open_holds_the_leaving_up(three: ShardedCluster) -> None:
    drain(three, "s0")
    with three.connect() as cluster, cluster.sessionmaker(mode="best_effort")() as session:
        session.execute(update(Rate).values(n=7))
        with pytest.raises(MoveWaiting, match="fence of shard s0"):
            leave(three, "s0", patience=0.3)
        assert len(three.topology.shards) == 3
        session.commit()
    leave(three, "s0")
    assert same_everywhere(three) == [(1, 0, 7)]


@pytest.mark.parametrize("isolation", ["READ COMMITTED", "REPEATABLE READ"])
def test_a_transaction_open_elsewhere_goes_on_without_it(three: ShardedCluster, isolation: str) -> None:
    keys = keys_of(three)
    drain(three, "s0")
    with three.connect() as cluster:
        options: Any = {"execution_options": {"isolation_level": isolation}}
        with cluster.sessionmaker(mode="best_effort", **options)() as session:
            assert session.get_one(User, keys[2]).name == "before"
            leave(three, "s0")
            if isolation == "READ COMMITTED":
                session.execute(update(Rate).values(n=7))
                session.commit()
            else:
                with pytest.raises(TopologyChanged):
                    session.execute(update(Rate).values(n=7))
    assert same_everywhere(three) == [(1, 0, 7 if isolation == "READ COMMITTED" else 0)]


def test_whoever_names_the_shard_is_told(three: ShardedCluster) -> None:
    drain(three, "s0")
    with three.connect() as cluster, cluster.sessionmaker()() as session:
        leave(three, "s0")
        with pytest.raises(NoSuchShard, match="there are: s1, s2"):
            session.connection(shard="s0")


class Thinking(Writer):
    """One that does something else between two transactions, so that a closing finds a moment on any machine."""

    def _work(self) -> None:
        super()._work()
        self.ending.wait(0.05)


def test_writers_of_reference_tables_go_on(three: ShardedCluster) -> None:
    drain(three, "s0")
    with three.connect() as one, three.connect() as other:
        writers = [Thinking(one, 1), Thinking(other, 2)]
        for writer in writers:
            writer.start()
        try:
            until(lambda: all(w.done > 5 or w.errors for w in writers), "writers at work", 60)
            leave(three, "s0", patience=120.0)
            before = [writer.done for writer in writers]
            until(
                lambda: all(w.done > n + 5 or w.errors for w, n in zip(writers, before, strict=True)),
                "writers at work on two shards",
                60,
            )
        finally:
            for writer in writers:
                writer.ending.set()
            for writer in writers:
                writer.join()
    assert [writer.errors for writer in writers] == [[], []]
    found = same_everywhere(three)
    assert {row[0] for row in found} == {1}.union(*(writer.present for writer in writers))


def test_a_leaving_beside_a_join(three: ShardedCluster, fresh_database: FreshDatabase) -> None:
    """Writers go on through both, and the number of the one that left is not given out again."""
    url = newcomer(fresh_database(1))
    drain(three, "s2")
    with three.connect() as cluster:
        writer = Thinking(cluster, 1)
        writer.start()
        try:
            leave(three, "s2")
            with three.lease() as catalog:
                membership.join(catalog, three.shards, name="s3", url=url)
            before = writer.done
            until(lambda: writer.done > before + 5 or writer.errors, "the writer on three shards", 60)
        finally:
            writer.ending.set()
            writer.join()
    assert not writer.errors
    assert {shard.name: shard.id for shard in three.topology.shards} == {"s0": 0, "s1": 1, "s3": 3}
    same_everywhere(three)


# --- transactions in doubt ------------------------------------------------------------------------------------------


def in_doubt(cluster: ShardedCluster, decider: str, participant: str) -> str:
    """What a client leaves that died after the decision; the name of the prepared part."""
    topology = cluster.topology
    first, other = topology.named(decider), topology.named(participant)
    gid = new_gid(first.id)
    cluster.admin(decider).execute(
        "INSERT INTO shardkit.decision (gid, outcome, participants) VALUES (%s, 'commit', %s)",
        (gid, [other.id]),
    )
    name = name_of(gid, other.id)
    admin = cluster.admin(participant)
    admin.execute("BEGIN")
    admin.execute("UPDATE public.users SET name = 'decided'")
    admin.execute(sql.SQL("PREPARE TRANSACTION {}").format(sql.Literal(name)))
    return name


def test_a_decision_that_is_followed_everywhere_goes_first(three: ShardedCluster) -> None:
    drain(three, "s0")
    in_doubt(three, "s0", "s2")
    leave(three, "s0")
    assert three.query("s2", "SELECT name FROM public.users") == [("decided",)]
    assert not three.query("s2", "SELECT gid FROM pg_prepared_xacts WHERE database = current_database()")


def test_what_was_never_decided_is_given_up_though_the_shard_has_left(three: ShardedCluster) -> None:
    """As on a shard that was away when the deciding one left; but not where only the catalog knows nothing of it."""
    drain(three, "s0")
    name = in_doubt(three, "s0", "s2")
    three.admin("s0").execute("DELETE FROM shardkit.decision")
    topology = three.topology
    leave_with_parts(three)
    prepared = "SELECT gid FROM pg_prepared_xacts WHERE database = current_database()"
    assert three.query("s2", prepared) == [(name,)]
    older = replace(topology, shards=tuple(shard for shard in topology.shards if shard.name != "s0"))
    (doubt,) = indoubt.recover(older, three.shards)
    assert doubt.state is State.UNKNOWN, "that topology is older than the copy of the shard"
    (doubt,) = indoubt.look(three.topology, three.shards)
    assert doubt.state is State.GIVEN_UP
    (doubt,) = indoubt.recover(three.topology, three.shards)
    assert doubt.state is State.GIVEN_UP
    assert not three.query("s2", prepared)
    assert three.query("s2", "SELECT name FROM public.users") == [("before",)]


def leave_with_parts(three: ShardedCluster) -> None:
    """The leaving, had the shard with the part been away until the others were opened."""
    shard = three.topology.named("s0")

    def without(before: Topology | None, version: int) -> Topology:
        assert before is not None
        return before.left(version, shard.id)

    with three.lease() as catalog:
        change.apply(catalog, three.shards, without)


def test_a_decision_that_cannot_be_followed_keeps_the_shard(
    three: ShardedCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    drain(three, "s0")
    name = in_doubt(three, "s0", "s2")
    # Nobody may end it: as with a role that is not the owner's, or a shard that does not answer.
    monkeypatch.setattr("shardkit.storage.indoubt.recover", lambda *args, **options: [])
    with pytest.raises((MoveWaiting, PreflightFailed), match="transactions recover"):
        leave(three, "s0", patience=0.2)
    assert three.topology.named("s0").leaving
    assert three.query("s0", "SELECT count(*) FROM shardkit.decision") == [(1,)]
    three.admin("s2").execute(sql.SQL("COMMIT PREPARED {}").format(sql.Literal(name)))
    monkeypatch.undo()
    leave(three, "s0")


def test_what_a_shard_holds_that_is_nobodys_keeps_it(three: ShardedCluster) -> None:
    drain(three, "s0")
    three.admin("s0").execute("INSERT INTO public.users (id, name, score) VALUES (1, 'by hand', 0)")
    with pytest.raises(PreflightFailed, match=r"table public\.users has rows") as refused:
        leave(three, "s0")
    assert len(refused.value.fields["reasons"]) == 1
    three.admin("s0").execute("DELETE FROM public.users")
    other = three.admin("s0")
    other.execute("BEGIN")
    other.execute("CREATE TABLE public.foreign_business ()")
    other.execute("PREPARE TRANSACTION 'not of shardkit'")
    with pytest.raises(PreflightFailed, match="'not of shardkit' is in doubt"):
        leave(three, "s0")
    other.execute("ROLLBACK PREPARED 'not of shardkit'")
    leave(three, "s0")
