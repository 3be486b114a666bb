"""Shards that do not answer, and statements that are broken off: what fails, how fast, and what is left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from psycopg import sql
from sqlalchemy import event, func, insert, literal, select, union_all, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, selectinload

import shardkit
from shardkit import MissingShards, PartialResultWarning
from shardkit.core.errors import ShardUnreachable, UsageError
from shardkit.dev import Cluster
from shardkit.storage.breaker import Breaker
from shardkit.storage.connections import connect
from tests.both import Both, Kind, both_kinds
from tests.fix_postgres import FreshDatabase, NewCluster
from tests.sharded import Post, ShardedCluster, User, until

OTHERS = """
SELECT pid FROM pg_stat_activity
WHERE datname = current_database() AND application_name = 'shardkit' AND state <> 'idle'
"""
FENCES = r"""
SELECT l.pid FROM pg_locks l JOIN pg_class c ON c.oid = l.relation
WHERE c.relname ~ '^fence_' AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""
ALL = ["s0", "s1", "s2"]


@dataclass
class Frail:
    """Three shards of which s1 has a server of its own, with a user and a post on each."""

    sharded: ShardedCluster
    server: Cluster
    keys: list[int]


@pytest.fixture
def frail(fresh_database: FreshDatabase, new_cluster: NewCluster) -> Iterator[Frail]:
    server = new_cluster()
    urls = [fresh_database(0), server.create_database("s1"), fresh_database(1)]
    sharded = ShardedCluster(fresh_database(2), urls)
    keys = [sharded.keys(name, 1)[0] for name in ALL]
    for name, key in zip(ALL, keys, strict=True):
        sharded.admin(name).execute("INSERT INTO public.users (id, name, score) VALUES (%s, 'x', 1)", (key,))
        sharded.admin(name).execute("INSERT INTO public.posts VALUES (%s, 1, 'x')", (key,))
    yield Frail(sharded, server, keys)
    sharded.close()


def dead(cluster: shardkit.ShardCluster, kind: Kind, clock: Any) -> Breaker:
    """The breaker of s1, with a clock of the test's own."""
    engines = cluster.engines if kind == "sync" else cluster.async_engines
    breaker = engines.breaker(cluster.topology.named("s1"))
    breaker._clock = clock
    return breaker


# --- a shard that is down --------------------------------------------------------------------------------------------


@both_kinds
def test_a_shard_that_is_down(frail: Frail, kind: Kind) -> None:
    """Its keys fail with its name, soon without being tried; others work; and it is found again."""
    now = [0.0]
    connects: list[int] = []
    with frail.sharded.connect(breaker_failures=3, breaker_seconds=10.0) as cluster:
        both = Both(kind, cluster)
        dead(cluster, kind, lambda: now[0])

        def count(session: Session) -> None:
            engine = both.engines.shard(cluster.topology.named("s1"))
            if not event.contains(engine, "do_connect", connected):
                event.listen(engine, "do_connect", connected)

        def connected(*_: Any) -> None:
            connects.append(1)

        def work(session: Session) -> None:
            count(session)
            with pytest.raises(ShardUnreachable, match="Shard s1 does not answer") as raised:
                session.get(User, frail.keys[1])
            assert raised.value.retryable
            assert raised.value.fields["shard"] == "s1"
            # The same transaction goes on with the others.
            assert session.get_one(User, frail.keys[0]).name == "x"
            session.add(Post(user_id=frail.keys[2], id=len(connects) + 10, caption="y"))
            session.flush()
            session.rollback()

        both.run(lambda session: session.get_one(User, frail.keys[1]))
        frail.server.stop()
        for _ in range(3):
            both.run(work)
        assert len(connects) == 3
        for _ in range(3):
            both.run(work)
        assert len(connects) == 3, "the breaker did not open"
        now[0] = 10.0
        both.run(work)
        assert len(connects) == 4
        both.run(work)
        assert len(connects) == 4
        frail.server.start()
        now[0] = 20.0
        both.run(lambda session: session.get_one(User, frail.keys[1]))
        both.run(lambda session: session.get_one(User, frail.keys[1]))
        assert both.in_use() == 0


@both_kinds
def test_a_shard_that_dies_under_a_transaction_is_named(frail: Frail, kind: Kind) -> None:
    with frail.sharded.connect() as cluster:

        def work(session: Session) -> None:
            session.get_one(User, frail.keys[1])
            frail.server.kill()
            with pytest.raises(ShardUnreachable, match="s1") as raised:
                session.execute(update(User).where(User.id == frail.keys[1]).values(name="y"))
            assert raised.value.fields == {"shard": "s1"}
            session.rollback()
            assert session.get_one(User, frail.keys[0]).name == "x"

        both = Both(kind, cluster)
        both.run(work)
        assert both.in_use() == 0


@both_kinds
@pytest.mark.parametrize("mode", ["single", "two_phase"])
def test_a_read_shard_that_died_stops_the_commit(frail: Frail, kind: Kind, mode: str) -> None:
    with frail.sharded.connect() as cluster:

        def work(session: Session) -> None:
            session.get_one(User, frail.keys[1])
            session.add(Post(user_id=frail.keys[0], id=2, caption="y"))
            if mode == "two_phase":
                session.add(Post(user_id=frail.keys[2], id=2, caption="y"))
            session.flush()
            frail.server.kill()
            with pytest.raises(ShardUnreachable, match="s1"):
                session.commit()
            session.rollback()
            for name in ("s0", "s2"):
                assert frail.sharded.query(name, OTHERS) == []

        both = Both(kind, cluster)
        both.run(work, mode=mode)
        assert both.in_use() == 0
    for name in ("s0", "s2"):
        assert frail.sharded.query(name, "SELECT id FROM public.posts") == [(1,)]
        assert frail.sharded.query(name, "SELECT gid FROM pg_prepared_xacts WHERE gid ~ '^shardkit'") == []


# --- answers in part -------------------------------------------------------------------------------------------------


@both_kinds
def test_partial(frail: Frail, kind: Kind) -> None:
    with frail.sharded.connect() as cluster:
        both = Both(kind, cluster)

        def whole(session: Session) -> None:
            missing = MissingShards()
            found = session.scalars(select(User.id), execution_options={"partial": missing}).all()
            assert sorted(found) == sorted(frail.keys)
            assert not missing
            with warnings.catch_warnings(action="error"):
                session.scalars(select(User.id).execution_options(partial=True)).all()

        def part(session: Session) -> None:
            missing = MissingShards()
            users = session.scalars(
                select(User).options(selectinload(User.posts)), execution_options={"partial": missing}
            ).all()
            assert sorted((user.id, len(user.posts)) for user in users) == sorted(
                (key, 1) for key in (frail.keys[0], frail.keys[2])
            )
            assert list(missing) == ["s1"]
            # Rows that any shard can make are made by one that answers.
            last = select(User.id).where(User.id.in_([frail.keys[1], frail.keys[2]]))
            with_free = session.scalars(
                union_all(last, select(literal(-1))), execution_options={"partial": missing}
            )
            assert sorted(with_free) == [-1, frail.keys[2]]
            with pytest.warns(PartialResultWarning, match="lacks the rows of s1"):
                assert session.scalar(select(func.sum(User.score)).execution_options(partial=True)) == 2

        def refused(session: Session) -> None:
            with pytest.raises(ShardUnreachable):
                session.scalars(select(User)).all()
            with pytest.raises(ShardUnreachable):
                session.scalars(select(User), execution_options={"partial": False}).all()
            missing = MissingShards()
            one_key = select(User).where(User.id == frail.keys[1])
            with pytest.raises(ShardUnreachable):  # nothing is left to answer
                session.scalars(one_key, execution_options={"partial": missing}).all()
            assert not missing
            with pytest.raises(UsageError):
                session.scalars(select(User), execution_options={"partial": []}).all()

        def written(session: Session) -> None:
            with pytest.raises(ShardUnreachable):
                session.execute(update(User).values(name="y"), execution_options={"partial": True})

        both.run(whole)
        frail.server.stop()
        both.run(part)
        both.run(refused)
        both.run(written, mode="two_phase")
        frail.server.start()
        both.cluster.engines.breaker(cluster.topology.named("s1")).succeeded()
        both.cluster.async_engines.breaker(cluster.topology.named("s1")).succeeded()
        both.run(whole)
        assert both.in_use() == 0


# --- broken off ------------------------------------------------------------------------------------------------------


@contextmanager
def locked(sharded: ShardedCluster, names: list[str]) -> Iterator[None]:
    """The users of some shards are locked by somebody in the block."""
    with ExitStack() as stack:
        for name in names:
            connection = stack.enter_context(
                connect(sharded.topology.named(name).url, application="somebody")
            )
            stack.enter_context(connection.transaction())
            connection.execute(
                sql.SQL("LOCK TABLE {} IN ACCESS EXCLUSIVE MODE").format(sql.Identifier("public", "users"))
            )
        yield


def waiting(sharded: ShardedCluster) -> list[str]:
    return sharded.holding("SELECT FROM pg_locks WHERE NOT granted")


def check_clean(sharded: ShardedCluster, both: Both) -> None:
    """While the locks that held the statements up are still there."""
    assert both.in_use() == 0
    until(lambda: not waiting(sharded), "statements to end")
    until(lambda: not sharded.holding(OTHERS), "transactions to end")
    until(lambda: not sharded.holding(FENCES), "fences to be free")


@pytest.fixture
def keys(sharded: ShardedCluster, cluster: shardkit.ShardCluster) -> list[int]:
    """A user on each shard."""
    keys = [sharded.keys(name, 1)[0] for name in ALL]
    with cluster.sessionmaker(mode="best_effort").begin() as session:
        session.add_all(User(id=key, name="x") for key in keys)
    return keys


def one(session: Session, keys: list[int]) -> None:
    session.execute(update(User).where(User.id == keys[0]).values(name="y"))


def all_(session: Session, keys: list[int]) -> None:
    session.scalars(select(User)).all()


def flush(session: Session, keys: list[int]) -> None:
    session.execute(insert(Post), [{"user_id": key, "id": 1, "caption": "never"} for key in keys])
    session.add_all(User(id=key + 10**6, name="y") for key in keys)
    session.flush()


works = pytest.mark.parametrize("work", [one, all_, flush], ids=["one shard", "scatter", "flush"])


@both_kinds
@works
def test_a_statement_timeout(sharded: ShardedCluster, kind: Kind, keys: list[int], work: Any) -> None:
    arguments = {"options": "-c statement_timeout=200"}
    with sharded.connect(connect_args=arguments) as cluster, locked(sharded, ["s0", "s2"]):
        both = Both(kind, cluster)
        with pytest.raises(DBAPIError, match="statement timeout"):
            both.run(lambda session: work(session, keys), mode="two_phase")
        check_clean(sharded, both)
    assert sharded.holding("SELECT FROM public.posts") == []


@both_kinds
@works
def test_an_interruption(
    sharded: ShardedCluster, kind: Kind, keys: list[int], cluster: shardkit.ShardCluster, work: Any
) -> None:
    """Ctrl-C while statements wait, on one shard or on several at the same time."""
    both = Both(kind, cluster)
    both.run(lambda session: session.scalars(select(User)).all())  # connections are there
    first = set(ALL if work is all_ else ["s0"])

    def interrupt() -> None:
        until(lambda: set(waiting(sharded)) >= first, "the statements to wait")
        os.kill(os.getpid(), signal.SIGINT)

    with locked(sharded, ALL):
        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            both.run(lambda session: work(session, keys), mode="two_phase")
        thread.join()
        check_clean(sharded, both)
    assert sharded.holding("SELECT FROM public.posts") == []
    assert both.run(lambda session: len(session.scalars(select(User)).all())) == 3


@both_kinds
@pytest.mark.parametrize("held", ALL)
def test_an_interruption_while_one_of_several_waits(
    sharded: ShardedCluster, kind: Kind, keys: list[int], cluster: shardkit.ShardCluster, held: str
) -> None:
    """Whichever thread runs it."""
    both = Both(kind, cluster)

    def interrupt() -> None:
        until(lambda: waiting(sharded) == [held], "the statement to wait")
        os.kill(os.getpid(), signal.SIGINT)

    with locked(sharded, [held]):
        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            both.run(lambda session: all_(session, keys))
        thread.join()
        check_clean(sharded, both)
    assert both.run(lambda session: len(session.scalars(select(User)).all())) == 3


@works
def test_a_timeout_of_asyncio(
    sharded: ShardedCluster, keys: list[int], cluster: shardkit.ShardCluster, work: Any
) -> None:
    checked_out: list[int] = []

    async def main() -> None:
        engines = cluster.async_engines
        try:
            with pytest.raises(TimeoutError):
                async with (
                    asyncio.timeout(0.5),
                    cluster.async_sessionmaker(mode="two_phase")() as session,
                ):
                    await session.run_sync(work, keys)
            checked_out.extend(engine.pool.checkedout() for engine in engines._shards.values())  # type: ignore[attr-defined]
        finally:
            await cluster.adispose()

    with locked(sharded, ALL):
        asyncio.run(main())
        check_clean(sharded, Both("sync", cluster))
    assert not any(checked_out)
    assert sharded.holding("SELECT FROM public.posts") == []
