"""Reads from replicas: real streaming standbys, which lag when they are told to, and die."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import psycopg
import pytest
from sqlalchemy import Text, func, insert, select, text, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import selectinload

import shardkit
from shardkit.core.errors import (
    IncompatibleServer,
    NoReplica,
    ReplicaBehind,
    ReplicaReadOnly,
    ShardUnreachable,
    TopologyChanged,
    UsageError,
)
from shardkit.core.topology import Topology
from shardkit.dev import Cluster, Clusters, Standby
from shardkit.orm.retrying import is_retryable
from shardkit.storage import replicas
from shardkit.storage.urls import without_password
from tests.fix_sharded import InSession
from tests.sharded import Post, ShardedCluster, User

REPLICA = {"read_from": "replica"}
PREFER = {"read_from": "prefer_replica"}
NAMES = ("s0", "s1", "s2")
USERS_TABLE = User.metadata.tables["users"]


class ReplicatedCluster(ShardedCluster):
    """Three shards in three databases of one server, which has two standbys."""

    settle_seconds = 0.2

    def __init__(self, primary: Cluster) -> None:
        self.primary = primary
        super().__init__(
            primary.create_database("catalog"), [primary.create_database(name) for name in NAMES]
        )
        self.standbys = [Standby(primary, settings={"max_standby_streaming_delay": 0}) for _ in range(2)]
        for standby in self.standbys:
            standby.start()

    def close(self) -> None:
        super().close()
        for standby in self.standbys:
            standby.close()

    def connect(self, **options: Any) -> shardkit.ShardCluster:
        return super().connect(**{"settle_seconds": self.settle_seconds, **options})

    def list_replicas(self, **listed: list[Standby] | list[str]) -> None:
        """Each shard has these replicas and no others."""
        with self.lease() as catalog:
            for name in NAMES:
                urls = [each if isinstance(each, str) else each.url(name) for each in listed.get(name, [])]
                self.change(catalog, partial(_with, name, urls))

    def catch_up(self) -> None:
        for standby in self.standbys:
            standby.catch_up()


def _with(name: str, urls: list[str], before: Topology | None, version: int) -> Topology:
    assert before is not None
    return before.with_replicas(version, before.named(name).id, urls)


@pytest.fixture(scope="module")
def _replicated(servers: Clusters) -> Iterator[ReplicatedCluster]:
    with Cluster() as primary:
        cluster = ReplicatedCluster(primary)
        yield cluster
        cluster.close()


@pytest.fixture
def sharded(_replicated: ReplicatedCluster) -> Iterator[ReplicatedCluster]:
    """Every shard has a replica on the first standby; both are running and as new as the primary."""
    cluster = _replicated
    for standby in cluster.standbys:
        standby.start()
        standby.resume()
    cluster.settle_seconds = 0.2
    cluster.truncate()
    cluster.list_replicas(**dict.fromkeys(NAMES, cluster.standbys[:1]))
    cluster.catch_up()
    yield cluster
    for standby in cluster.standbys:
        if standby.running:
            standby.resume()


@dataclass
class Rows:
    """Users of each shard, present on the standbys too."""

    keys: dict[str, list[int]]

    @property
    def all(self) -> list[int]:
        return sorted(key for keys in self.keys.values() for key in keys)


@pytest.fixture
def rows(sharded: ReplicatedCluster) -> Rows:
    """Three users a shard, with a post each."""
    found = Rows({name: sharded.keys(name, 3) for name in NAMES})
    with sharded.connect() as cluster, cluster.sessionmaker(mode="best_effort").begin() as session:
        for key in found.all:
            session.add(User(id=key, name=f"user {key}", posts=[Post(id=1, caption="first")]))
    sharded.catch_up()
    return found


def _names(session: Any, options: dict[str, Any], *keys: int) -> list[str]:
    statement = select(User.name).where(User.id.in_(keys)).order_by(User.id)
    return list(session.scalars(statement, execution_options=options))


def _rename(sharded: ReplicatedCluster, shard: str, name: str) -> None:
    sharded.query(shard, "UPDATE public.users SET name = %s RETURNING 1", name)


# --- where it is read ------------------------------------------------------------------------------------------------


def test_reads_come_from_the_standby(in_session: InSession, sharded: ReplicatedCluster, rows: Rows) -> None:
    key = rows.keys["s0"][0]
    sharded.standbys[0].pause()
    _rename(sharded, "s0", "newer")

    def work(session: shardkit.ShardSession) -> None:
        by_call = _names(session, REPLICA, key)
        assert by_call == [f"user {key}"]
        by_statement = select(User.name).where(User.id == key).execution_options(**REPLICA)
        assert session.scalar(by_statement) == f"user {key}"
        assert _names(session, {}, key) == ["newer"]
        assert _names(session, {"read_from": "primary"}, key) == ["newer"]
        for options in ({"key": key}, {"shard": "s0"}):
            for source, expected in (("replica", True), ("primary", False)):
                connection = session.connection(**options, read_from=source)  # type: ignore[arg-type]
                assert connection.scalar(select(func.pg_is_in_recovery())) is expected
        by_option = session.connection(shard="s1", execution_options=REPLICA)
        assert session.connection(shard="s1", execution_options=REPLICA) is by_option
        assert by_option.scalar(select(func.pg_is_in_recovery())) is True
        bound = session.execute(text("SELECT pg_is_in_recovery()"), bind_arguments={"shard": "s2", **REPLICA})
        assert bound.scalar() is True

    in_session(work)


async def test_the_connection_of_an_async_session(sharded: ReplicatedCluster, rows: Rows) -> None:
    cluster = sharded.connect()
    async with cluster.async_sessionmaker()() as session:
        connection = await session.connection(shard="s1", read_from="replica")
        assert await connection.scalar(select(func.pg_is_in_recovery())) is True
        found = await session.stream_scalars(
            select(User.id).order_by(User.id), execution_options={**REPLICA, "yield_per": 2}
        )
        assert [key async for key in found] == rows.all
    await cluster.adispose()
    cluster.dispose()


def test_all_shards_are_read_from_their_replicas(
    in_session: InSession, sharded: ReplicatedCluster, rows: Rows
) -> None:
    sharded.standbys[0].pause()
    for name in NAMES:
        _rename(sharded, name, "newer")

    def work(session: shardkit.ShardSession) -> None:
        statement = select(User).order_by(User.id.desc()).options(selectinload(User.posts))
        users = list(session.scalars(statement, execution_options=REPLICA))
        assert [user.id for user in users] == rows.all[::-1]
        assert {user.name for user in users} == {f"user {key}" for key in rows.all}
        assert all([post.caption for post in user.posts] == ["first"] for user in users)
        counted = session.scalar(
            select(func.count()).select_from(User).where(User.name == "newer"), execution_options=REPLICA
        )
        assert counted == 0
        assert not session.shards.scope.participants  # the shards themselves were not asked
        session.expunge_all()
        got = session.get(User, rows.all[0], execution_options=REPLICA)
        assert got is not None
        assert got.name == f"user {rows.all[0]}"

    in_session(work)


def test_what_is_not_committed_is_not_seen(
    in_session: InSession, sharded: ReplicatedCluster, rows: Rows
) -> None:
    key = rows.keys["s0"][0]

    def work(session: shardkit.ShardSession) -> None:
        session.get_one(User, key).name = "mine"
        session.flush()
        assert _names(session, {}, key) == ["mine"]
        assert _names(session, REPLICA, key) == [f"user {key}"]
        session.commit()
        sharded.catch_up()
        assert _names(session, REPLICA, key) == ["mine"]

    in_session(work)


def test_a_transaction_keeps_its_snapshot(
    in_session: InSession, sharded: ReplicatedCluster, rows: Rows
) -> None:
    key = rows.keys["s0"][0]

    def work(session: shardkit.ShardSession) -> None:
        assert _names(session, REPLICA, key) == [f"user {key}"]
        sharded.query("s0", "UPDATE public.users SET name = 'newer' WHERE id = %s RETURNING 1", key)
        sharded.catch_up()
        assert _names(session, REPLICA, key) == [f"user {key}"]
        with session.begin_nested():
            assert _names(session, REPLICA, key) == [f"user {key}"]
        session.rollback()
        assert _names(session, REPLICA, key) == ["newer"]

    in_session(work)


def test_a_savepoint_does_not_end_a_snapshot(
    in_session: InSession, sharded: ReplicatedCluster, rows: Rows
) -> None:
    key, other = rows.keys["s0"][:2]

    def work(session: shardkit.ShardSession) -> None:
        with session.begin_nested() as savepoint:
            assert _names(session, REPLICA, key) == [f"user {key}"]
            with pytest.raises(DBAPIError, match="division by zero"):
                session.execute(select(User.id / 0).where(User.id == key), execution_options=REPLICA)
            savepoint.rollback()
        _rename(sharded, "s0", "newer")
        sharded.catch_up()
        assert _names(session, REPLICA, other) == [f"user {other}"]

    in_session(work)


def test_replicas_take_turns(sharded: ReplicatedCluster) -> None:
    sharded.list_replicas(s0=sharded.standbys, s1=sharded.standbys)
    sharded.catch_up()
    asked = []
    with sharded.connect() as cluster:
        for _ in range(4):
            with cluster.sessionmaker()() as session:
                session.connection(shard="s1", read_from="replica")
                connection = session.connection(shard="s0", read_from="replica")
                asked.append(connection.scalar(text("SELECT current_setting('unix_socket_directories')")))
    assert asked[:2] == asked[2:]
    assert len(set(asked)) == 2


# --- a replica that is behind ----------------------------------------------------------------------------------------


def test_a_replica_behind_a_move_is_refused_and_then_believed(
    in_session: InSession, sharded: ReplicatedCluster, rows: Rows
) -> None:
    key, other = rows.keys["s0"][:2]
    sharded.standbys[0].pause()
    target = sharded.move_key(key)

    def behind(session: shardkit.ShardSession) -> None:
        with pytest.raises(ReplicaBehind) as caught:
            _names(session, REPLICA, key)
        assert is_retryable(caught.value)
        assert caught.value.fields["shard"] == target
        assert sharded.standbys[0].socket_dir.name in caught.value.message
        session.rollback()
        with pytest.raises(ReplicaBehind):  # the source: its replica still shows the key that has moved
            _names(session, REPLICA, other)
        session.rollback()
        with pytest.raises(ReplicaBehind):
            session.connection(shard=target, read_from="replica")
        session.rollback()
        with pytest.raises(ReplicaBehind):
            list(session.scalars(select(User.id), execution_options=REPLICA))
        session.rollback()
        # A shard that took no part is what it was.
        (aside,) = set(NAMES) - {"s0", target}
        assert _names(session, REPLICA, rows.keys[aside][0]) == [f"user {rows.keys[aside][0]}"]
        assert _names(session, {}, key) == [f"user {key}"]

    in_session(behind)
    sharded.standbys[0].resume()
    sharded.catch_up()

    def believed(session: shardkit.ShardSession) -> None:
        assert _names(session, REPLICA, key) == [f"user {key}"]
        found = session.scalars(select(User.id).order_by(User.id), execution_options=REPLICA)
        assert list(found) == rows.all

    in_session(believed)


def test_a_read_waits_for_a_replica_that_is_about_to_catch_up(
    in_session: InSession, sharded: ReplicatedCluster, rows: Rows
) -> None:
    key = rows.keys["s0"][0]
    sharded.settle_seconds = 30.0
    sharded.standbys[0].pause()
    sharded.move_key(key)

    def work(session: shardkit.ShardSession) -> None:
        engines: Any = session.engines
        pause = engines.pause
        waited: list[float] = []

        def paused(seconds: float) -> None:
            if not waited:
                sharded.standbys[0].resume()
            waited.append(seconds)
            pause(seconds)

        engines.pause = paused
        assert _names(session, REPLICA, key) == [f"user {key}"]
        assert waited

    in_session(work)


def test_another_replica_is_taken_for_one_that_is_behind(
    in_session: InSession, sharded: ReplicatedCluster, rows: Rows
) -> None:
    key = rows.keys["s0"][0]
    sharded.list_replicas(**dict.fromkeys(NAMES, sharded.standbys))
    sharded.catch_up()
    sharded.standbys[0].pause()
    sharded.move_key(key)
    sharded.standbys[1].catch_up()

    def work(session: shardkit.ShardSession) -> None:
        for _ in range(2):
            assert _names(session, REPLICA, key) == [f"user {key}"]
            session.rollback()

    in_session(work)


def test_the_shard_itself_stands_in_where_that_is_asked_for(
    in_session: InSession, sharded: ReplicatedCluster, rows: Rows
) -> None:
    key = rows.keys["s0"][0]
    sharded.standbys[0].pause()
    sharded.move_key(key)

    def work(session: shardkit.ShardSession) -> None:
        session.get_one(User, key).name = "mine"
        session.flush()
        assert _names(session, PREFER, key) == [f"user {key}"]  # in a snapshot of its own there too
        found = session.scalars(select(User.id).order_by(User.id), execution_options=PREFER)
        assert list(found) == rows.all
        session.commit()
        assert _names(session, PREFER, key) == ["mine"]
        connection = session.connection(key=key, read_from="prefer_replica")
        assert connection.scalar(select(func.pg_is_in_recovery())) is False
        with pytest.raises(ReplicaReadOnly):
            connection.execute(update(USERS_TABLE).values(name="x"))
        with pytest.raises(DBAPIError, match="read-only transaction"):
            connection.execute(text("DELETE FROM public.users"))

    in_session(work)


# --- a router that is behind -----------------------------------------------------------------------------------------


def test_a_stale_router_learns_from_the_replica(sharded: ReplicatedCluster, rows: Rows) -> None:
    key = rows.keys["s0"][0]
    with sharded.connect() as cluster:
        before = cluster.topology
        sharded.move_key(key)
        sharded.catch_up()
        with cluster.sessionmaker()() as session:
            assert _names(session, REPLICA, key) == [f"user {key}"]
        assert cluster.topology == sharded.topology != before


def test_replicas_of_different_age_neither_lose_nor_double_rows(
    sharded: ReplicatedCluster, rows: Rows
) -> None:
    key = rows.keys["s0"][0]
    old, new = sharded.standbys
    for lagging in ("s0", "s1"):
        sharded.list_replicas(**{name: [old if name == lagging else new] for name in NAMES})
        sharded.catch_up()
        old.pause()
        with sharded.connect() as stale:
            sharded.move_key(key)
            new.catch_up()
            with sharded.connect() as fresh:
                for cluster in (stale, fresh):
                    with cluster.sessionmaker()() as session:
                        try:
                            found = list(
                                session.scalars(select(User.id).order_by(User.id), execution_options=REPLICA)
                            )
                        except ReplicaBehind:
                            continue
                        assert found == rows.all
        old.resume()
        sharded.catch_up()


def test_scattered_text_sees_no_row_twice(sharded: ReplicatedCluster, rows: Rows) -> None:
    """The target's replica shows that it has been opened, the source's does not show that it is closed."""
    old, new = sharded.standbys
    sharded.list_replicas(s0=[old], s1=[new], s2=[new])
    sharded.catch_up()
    arcs, source, target = sharded.next_shard(rows.keys["s0"][0])
    statement = text("SELECT id FROM public.users WHERE shardkit.owned(id)")
    everywhere: Any = {"bind_arguments": {"scatter": True}, "execution_options": REPLICA}
    with sharded.lease() as catalog:
        sharded.mark(catalog, target, arcs)
        sharded.catch_up()
        with sharded.connect() as cluster, cluster.sessionmaker()() as session:
            assert sorted(session.scalars(statement, **everywhere)) == rows.all
            session.rollback()
            old.pause()
            sharded.cut_over(catalog, source, target, arcs)
            new.catch_up()
            with pytest.raises(ReplicaBehind):
                session.scalars(statement, **everywhere)
            session.rollback()
            old.resume()
            sharded.catch_up()
            assert sorted(session.scalars(statement, **everywhere)) == rows.all
        sharded.purge(catalog, source, arcs)
        sharded.drain(catalog)


def test_a_stale_router_and_a_stale_replica_agree(sharded: ReplicatedCluster, rows: Rows) -> None:
    key = rows.keys["s0"][0]
    with sharded.connect() as cluster:
        sharded.standbys[0].pause()
        sharded.move_key(key)
        with cluster.sessionmaker()() as session:
            found = session.scalars(select(User.id).order_by(User.id), execution_options=REPLICA)
            assert list(found) == rows.all


def test_a_snapshot_does_not_follow_a_move(
    in_session: InSession, sharded: ReplicatedCluster, rows: Rows
) -> None:
    key = rows.keys["s0"][0]
    _, _, target_id = sharded.next_shard(key)
    target = sharded.topology.by_id[target_id].name

    def work(session: shardkit.ShardSession) -> None:
        assert _names(session, REPLICA, key) == [f"user {key}"]
        sharded.move_key(key)
        sharded.catch_up()
        # The replica of the target shows newer news, which the snapshot of the source does not have.
        with pytest.raises(TopologyChanged):
            _names(session, REPLICA, rows.keys[target][0])
        session.rollback()
        assert _names(session, REPLICA, key) == [f"user {key}"]

    in_session(work)


def test_reads_while_keys_move(in_session: InSession, sharded: ReplicatedCluster, rows: Rows) -> None:
    """Each scatter over replicas finds every row once, and none needs to fail, unless the replay meets a session
    between two messages: the standby ends that one, and says why."""
    sharded.settle_seconds = 30.0
    first, second = sharded.standbys
    sharded.list_replicas(s0=[first], s1=[second], s2=[first, second])
    sharded.catch_up()
    keys = rows.keys["s0"] + rows.keys["s1"]
    met: set[int] = set()
    moved = threading.Event()

    def move() -> None:
        try:
            for key in keys:
                sharded.move_key(key)
        finally:
            moved.set()

    def read(session: shardkit.ShardSession) -> None:
        found = session.scalars(select(User.id).order_by(User.id), execution_options=REPLICA)
        assert list(found) == rows.all
        for key in keys[:2]:
            try:
                assert _names(session, REPLICA, key) == [f"user {key}"]
            except TopologyChanged:  # it moved since this transaction's first read
                break

    def work(session: shardkit.ShardSession) -> None:
        with ThreadPoolExecutor(1) as pool:
            moving = pool.submit(move)
            while not moved.is_set():
                try:
                    read(session)
                except ShardUnreachable as error:
                    if "terminating connection due to conflict with recovery" not in error.message:
                        raise
                session.rollback()
                met.add(session.cluster.topology.version)
            moving.result()

    in_session(work)
    assert len(met) > 3


# --- a replica that is away ------------------------------------------------------------------------------------------


def test_a_stopped_replica_is_named_and_the_shard_taken_if_asked(
    in_session: InSession, sharded: ReplicatedCluster, rows: Rows
) -> None:
    key = rows.keys["s0"][0]
    standby = sharded.standbys[0]
    standby.stop()

    def work(session: shardkit.ShardSession) -> None:
        with pytest.raises(ShardUnreachable, match="Shard s0 cannot be read from a replica") as caught:
            _names(session, REPLICA, key)
        assert standby.socket_dir.name in caught.value.message
        assert caught.value.retryable
        session.rollback()
        assert _names(session, PREFER, key) == [f"user {key}"]
        assert _names(session, {}, key) == [f"user {key}"]
        missing = shardkit.MissingShards()
        options = {**REPLICA, "partial": missing}
        session.rollback()
        with pytest.raises(ShardUnreachable):
            session.scalars(select(User.id), execution_options=options)

    in_session(work)


def test_a_stopped_replica_is_passed_over(
    in_session: InSession, sharded: ReplicatedCluster, rows: Rows
) -> None:
    key = rows.keys["s0"][0]
    sharded.list_replicas(s0=sharded.standbys, s1=sharded.standbys[:1], s2=sharded.standbys[1:])
    sharded.catch_up()
    sharded.standbys[0].stop()

    def work(session: shardkit.ShardSession) -> None:
        for _ in range(2):
            assert _names(session, REPLICA, key) == [f"user {key}"]
            session.rollback()
        missing = shardkit.MissingShards()
        found = session.scalars(
            select(User.id).order_by(User.id), execution_options={**REPLICA, "partial": missing}
        )
        assert list(found) == sorted(rows.keys["s0"] + rows.keys["s2"])
        assert list(missing) == ["s1"]

    in_session(work)


def test_a_replica_lost_after_it_was_read_does_not_hinder_the_commit(
    in_session: InSession, sharded: ReplicatedCluster, rows: Rows
) -> None:
    key = rows.keys["s0"][0]

    def work(session: shardkit.ShardSession) -> None:
        assert _names(session, REPLICA, key) == [f"user {key}"]
        pid = session.connection(key=key, read_from="replica").scalar(select(func.pg_backend_pid()))
        session.execute(update(User).where(User.id == key).values(name="written"))
        with psycopg.connect(sharded.standbys[0].conninfo()) as administrator:
            administrator.execute("SELECT pg_terminate_backend(%s, 5000)", (pid,))
        session.commit()
        assert _names(session, {}, key) == ["written"]
        session.rollback()
        sharded.catch_up()
        assert _names(session, REPLICA, key) == ["written"]

    in_session(work)


def test_a_promoted_replica_is_not_believed(
    in_session: InSession, sharded: ReplicatedCluster, rows: Rows
) -> None:
    key = rows.keys["s0"][0]
    sharded.list_replicas(s0=[sharded.primary.url("s0") + "&application_name=promoted"])

    def work(session: shardkit.ShardSession) -> None:
        with pytest.raises(ShardUnreachable, match="standby no more"):
            _names(session, REPLICA, key)
        session.rollback()
        assert _names(session, PREFER, key) == [f"user {key}"]

    in_session(work)


def test_a_shard_without_a_replica(in_session: InSession, sharded: ReplicatedCluster, rows: Rows) -> None:
    key = rows.keys["s0"][0]
    sharded.list_replicas(s1=sharded.standbys)

    def work(session: shardkit.ShardSession) -> None:
        with pytest.raises(NoReplica, match="Shard s0 lists no replica"):
            _names(session, REPLICA, key)
        session.rollback()
        assert _names(session, PREFER, key) == [f"user {key}"]
        # It is listed while the application runs.
        sharded.list_replicas(s0=sharded.standbys)
        assert _names(session, REPLICA, key) == [f"user {key}"]

    in_session(work)


# --- writes ----------------------------------------------------------------------------------------------------------

WRITES: dict[str, Callable[[Any, int], Any]] = {
    "insert": lambda session, key: session.execute(
        insert(User).values(id=key, name="x"), execution_options=REPLICA
    ),
    "option of the statement": lambda session, key: session.execute(
        insert(User).values(id=key, name="x").execution_options(**PREFER)
    ),
    "bulk insert": lambda session, key: session.execute(
        insert(User), [{"id": key, "name": "x"}], execution_options=REPLICA
    ),
    "update": lambda session, key: session.execute(
        update(User).where(User.id == key).values(name="x"), execution_options=REPLICA
    ),
    "connection": lambda session, key: session.connection(key=key, read_from="replica").execute(
        insert(USERS_TABLE), {"id": key, "name": "x", "score": 0}
    ),
    "cte": lambda session, key: session.connection(key=key, read_from="replica").execute(
        select(func.now()).add_cte(insert(USERS_TABLE).values(id=key, name="x", score=0).cte("written"))
    ),
}


@pytest.mark.parametrize("how", WRITES)
def test_a_write_is_refused_before_it_is_sent(
    how: str, in_session: InSession, sharded: ReplicatedCluster, rows: Rows
) -> None:
    key = sharded.keys("s0", 1, start=10_000)[0]

    def work(session: shardkit.ShardSession) -> None:
        with pytest.raises(ReplicaReadOnly):
            WRITES[how](session, key)
        # It was not sent, so the transaction on the replica is whole.
        assert _names(session, REPLICA, rows.keys["s0"][0]) == [f"user {rows.keys['s0'][0]}"]
        assert not session.shards.scope.participants

    in_session(work)


def test_an_unknown_source_is_refused(in_session: InSession, rows: Rows) -> None:
    def work(session: shardkit.ShardSession) -> None:
        with pytest.raises(UsageError, match="standby"):
            _names(session, {"read_from": "standby"}, rows.all[0])

    in_session(work)


# --- conflicts with the replay ---------------------------------------------------------------------------------------

LOCK = 4711


def _waits(administrator: psycopg.Connection[Any]) -> Any:
    """Since when somebody waits for the lock; None if nobody does."""
    row = administrator.execute(
        "SELECT waitstart FROM pg_locks WHERE locktype = 'advisory' AND objid = %s AND NOT granted", (LOCK,)
    ).fetchone()
    return row and row[0]


def _remove(sharded: ReplicatedCluster, doomed: int) -> None:
    """Remove a row for good, which cancels snapshots on the standby that show it."""
    with psycopg.connect(sharded.primary.conninfo("s0"), autocommit=True) as primary:
        primary.execute("DELETE FROM public.posts")
        primary.execute("DELETE FROM public.users WHERE id = %s", (doomed,))
        primary.execute("VACUUM public.users")
        primary.execute("UPDATE public.users SET score = 7")  # a commit, as that of VACUUM is not waited for


def _until(condition: Callable[[], bool]) -> None:
    done = threading.Event()
    for _ in range(6000):
        if condition():
            return
        done.wait(0.005)
    raise AssertionError("it did not come about")


def _slow(key: int) -> Any:
    """A statement that waits, on the standby, for the lock."""
    locked = func.coalesce(func.pg_advisory_xact_lock_shared(LOCK).cast(Text), "")
    return select(User.name, User.score, locked).where(User.id == key)


def test_a_cancelled_read_is_run_again(in_session: InSession, sharded: ReplicatedCluster, rows: Rows) -> None:
    key, doomed = rows.keys["s0"][:2]
    ready = threading.Event()

    def disturb() -> None:
        with psycopg.connect(sharded.standbys[0].conninfo("s0"), autocommit=True) as administrator:
            administrator.execute("SELECT pg_advisory_lock(%s)", (LOCK,))
            ready.set()
            _until(lambda: _waits(administrator) is not None)
            first = _waits(administrator)
            _remove(sharded, doomed)
            sharded.catch_up()
            _until(lambda: _waits(administrator) not in (None, first))

    def work(session: shardkit.ShardSession) -> None:
        assert ready.wait(30)
        assert session.execute(_slow(key), execution_options=REPLICA).one()[:2] == (f"user {key}", 7)

    with ThreadPoolExecutor(1) as pool:
        disturbing = pool.submit(disturb)
        in_session(work)
        disturbing.result()


def test_a_read_cancelled_after_another_is_not_run_again(
    in_session: InSession, sharded: ReplicatedCluster, rows: Rows
) -> None:
    key, doomed = rows.keys["s0"][:2]

    def work(session: shardkit.ShardSession) -> None:
        assert _names(session, REPLICA, key) == [f"user {key}"]
        _remove(sharded, doomed)
        sharded.catch_up()
        with pytest.raises((ShardUnreachable, DBAPIError)) as caught:
            _names(session, REPLICA, key)
        assert is_retryable(caught.value)
        session.rollback()
        assert _names(session, REPLICA, key) == [f"user {key}"]

    in_session(work)


# --- the list --------------------------------------------------------------------------------------------------------


def test_the_list_of_replicas(sharded: ReplicatedCluster) -> None:
    sharded.list_replicas()
    before = sharded.topology
    url = without_password(sharded.standbys[0].url("s0"))
    with sharded.lease() as catalog:
        for _ in range(2):
            topology = replicas.add(
                catalog, sharded.shards, "s0", url.replace("postgres@", "postgres:secret@")
            )
        assert topology.named("s0").replicas == (url,)
        assert topology == sharded.topology
        assert [shard.fence for shard in topology.shards] == [shard.fence for shard in before.shards]
        for name, wrong in (("s1", url), ("s0", sharded.primary.url("s0") + "&application_name=x")):
            with pytest.raises(IncompatibleServer):
                replicas.add(catalog, sharded.shards, name, wrong)
        with pytest.raises(UsageError):
            replicas.add(catalog, sharded.shards, "s0", topology.named("s0").url)
        with pytest.raises(NoReplica):
            replicas.remove(catalog, sharded.shards, "s1", url)
        copies = [sharded.query(name, "SELECT version FROM shardkit.topology") for name in NAMES]
        assert copies == [[(topology.version,)]] * 3
        sharded.standbys[0].stop()  # it need not answer to be taken off
        assert replicas.remove(catalog, sharded.shards, "s0", url).named("s0").replicas == ()
