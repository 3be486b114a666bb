"""How transactions end that are rolled back: without waiting for the answer where they only read, and only there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from psycopg.pq import TransactionStatus
from sqlalchemy import func, select, text
from sqlalchemy.exc import ProgrammingError

from shardkit import ShardCluster, ShardSession
from tests.both import Both, Kind, both_kinds
from tests.sharded import ShardedCluster, User, until

HELD = "SELECT FROM pg_locks WHERE pid = %s AND relation IS NOT NULL"
Work = Callable[[ShardSession, int], object]


@pytest.fixture
def key(sharded: ShardedCluster) -> int:
    """A user on s0."""
    (key,) = sharded.keys("s0", 1)
    sharded.admin("s0").execute("INSERT INTO public.users (id, name, score) VALUES (%s, 'x', 0)", (key,))
    return key


def driver(session: ShardSession, key: int) -> Any:
    """The driver's connection to the shard of a key."""
    return session.connection(key=key).connection.driver_connection


def ended(kind: Kind, cluster: ShardCluster, key: int, work: Work) -> tuple[Any, TransactionStatus]:
    """The driver's connection, and its state as soon as a session that did some work is closed."""
    both = Both(kind, cluster)
    if kind == "async":
        return both.run(lambda session: _as_of_rollback(session, key, work))
    raw = both.run(lambda session: (work(session, key), driver(session, key))[1])
    return raw, raw.pgconn.transaction_status


def _as_of_rollback(session: ShardSession, key: int, work: Work) -> tuple[Any, TransactionStatus]:
    work(session, key)
    raw = driver(session, key)
    session.rollback()
    return raw, raw.pgconn.transaction_status


def get(session: ShardSession, key: int) -> None:
    assert session.get_one(User, key).name == "x"


def count(session: ShardSession, key: int) -> None:
    assert session.scalar(select(func.count()).select_from(User).where(User.id == key)) == 1


def nothing(session: ShardSession, key: int) -> None:
    session.connection(key=key)


def lock(session: ShardSession, key: int) -> None:
    session.get(User, key, with_for_update=True)


def lock_by_function(session: ShardSession, key: int) -> None:
    session.connection(key=key).execute(text("SELECT pg_advisory_xact_lock(1)"))


def change(session: ShardSession, key: int) -> None:
    session.get_one(User, key).name = "y"
    session.flush()


def savepoint(session: ShardSession, key: int) -> None:
    with session.begin_nested():
        get(session, key)


def told(session: ShardSession, key: int) -> None:
    get(session, key)
    driver(session, key).wait_at_end()


def read_by_text(session: ShardSession, key: int) -> None:
    """Which counts as a writer: its function may write."""
    session.connection(key=key).execute(text("SELECT 1"))


def fail(session: ShardSession, key: int) -> None:
    with pytest.raises(ProgrammingError):
        session.connection(key=key).execute(text("SELECT no_such_column"))


@both_kinds
@pytest.mark.parametrize("work", [get, count, nothing])
def test_what_only_read_is_not_waited_for(kind: Kind, cluster: ShardCluster, key: int, work: Work) -> None:
    _, status = ended(kind, cluster, key, work)
    assert status == TransactionStatus.ACTIVE


@both_kinds
@pytest.mark.parametrize("work", [lock, lock_by_function, change, savepoint, read_by_text, told, fail])
def test_what_did_more_is(kind: Kind, cluster: ShardCluster, key: int, work: Work) -> None:
    _, status = ended(kind, cluster, key, work)
    assert status == TransactionStatus.IDLE


def test_the_fence_is_let_go_at_once(sharded: ShardedCluster, cluster: ShardCluster, key: int) -> None:
    """By the server, that is: nobody has to use the connection again."""
    raw, _ = ended("sync", cluster, key, get)
    until(lambda: not sharded.query("s0", HELD, raw.pgconn.backend_pid), "it lets go")
    assert raw.pgconn.transaction_status == TransactionStatus.ACTIVE


def test_reads_stay_prepared(sharded: ShardedCluster, cluster: ShardCluster, key: int) -> None:
    Session = cluster.sessionmaker()
    for _ in range(10):
        with Session() as session:
            get(session, key)
            raw = driver(session, key)
    (name,) = raw._prepared._names.values()
    with Session() as session:
        there = select(text("count(*)")).select_from(text("pg_prepared_statements"))
        assert driver(session, key) is raw
        assert (
            session.connection(key=key).scalar(there.where(text("name = :name")), {"name": name.decode()})
            == 1
        )


def test_a_write_that_is_rolled_back_unprepares(cluster: ShardCluster, key: int) -> None:
    """As the driver does: what it made or dropped may be in them."""
    Session = cluster.sessionmaker()
    for _ in range(10):
        with Session() as session:
            get(session, key)
    with Session() as session:
        change(session, key)
        raw = driver(session, key)
        assert raw._prepared._names
        session.rollback()
    assert not raw._prepared._names


@both_kinds
def test_a_server_that_ended_the_connection_meanwhile(
    kind: Kind, sharded: ShardedCluster, cluster: ShardCluster, key: int
) -> None:
    def twice(session: ShardSession) -> None:
        get(session, key)
        raw = driver(session, key)
        session.rollback()
        assert raw.pgconn.transaction_status == TransactionStatus.ACTIVE
        assert sharded.query("s0", "SELECT pg_terminate_backend(%s, 5000)", raw.pgconn.backend_pid) == [
            (True,)
        ]
        get(session, key)
        assert driver(session, key) is not raw

    Both(kind, cluster).run(twice)


@both_kinds
def test_a_rollback_that_somebody_cancelled(kind: Kind, cluster: ShardCluster, key: int) -> None:
    def twice(session: ShardSession) -> None:
        get(session, key)
        raw = driver(session, key)
        raw.pgconn.send_query(b"SELECT 1 / 0")  # fails as that would, and leaves the transaction open
        raw._owed = True
        session.rollback()
        get(session, key)
        assert driver(session, key) is raw

    Both(kind, cluster).run(twice)


def test_the_ping_of_a_pool_comes_after_it(sharded: ShardedCluster, key: int) -> None:
    with sharded.connect(pool_pre_ping=True) as cluster:
        for _ in range(3):
            _, status = ended("sync", cluster, key, get)
            assert status == TransactionStatus.ACTIVE


def test_an_isolation_level_is_set_after_it(cluster: ShardCluster, key: int) -> None:
    ended("sync", cluster, key, get)
    options = {"isolation_level": "SERIALIZABLE"}
    with cluster.sessionmaker(execution_options=options)() as session:
        level = session.connection(key=key).scalar(text("SHOW transaction_isolation"))
    assert level == "serializable"
