"""The end of a transaction over shards: who may write, who ends first, and what is known when a server is lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import create_engine, event, insert, literal, select, text, update
from sqlalchemy.exc import DBAPIError, IntegrityError

import shardkit
from shardkit.core.errors import CommitUnknown, CrossShardWrite, PartlyCommitted, ShardUnreachable
from shardkit.storage.guard import GuardedConnection
from tests.sharded import Post, ShardedCluster, User, affected

USERS_TABLE = User.metadata.tables["users"]
USERS = "SELECT id FROM public.users ORDER BY id"


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """COMMITs as they are sent: the names of the shards."""
    order: list[str] = []
    commit = GuardedConnection.commit

    def recorded(self: GuardedConnection) -> None:
        if self.pgconn.transaction_status != 0:
            order.append(self.shard_name)
        commit(self)

    monkeypatch.setattr(GuardedConnection, "commit", recorded)
    return order


def _pid(session: Any, name: str) -> Any:
    return session.connection(shard=name).execute(select(text("pg_backend_pid()"))).scalar()


def _kill(sharded: ShardedCluster, name: str, pid: Any) -> None:
    assert sharded.query(name, "SELECT pg_terminate_backend(%s, 5000)", pid) == [(True,)]


# --- one writer ------------------------------------------------------------------------------------------------------

SECOND_WRITES: dict[str, Callable[[Any, int], Any]] = {
    "flush": lambda session, key: (session.add(User(id=key, name="x")), session.flush()),
    "bulk": lambda session, key: session.execute(insert(User), [{"id": key, "name": "x"}]),
    "insert": lambda session, key: session.execute(insert(User).values(id=key, name="x")),
    "update": lambda session, key: session.execute(update(User).where(User.id == key).values(name="x")),
    "core": lambda session, key: session.execute(insert(USERS_TABLE).values(id=key, name="x", score=0)),
    "connection": lambda session, key: session.connection(key=key).execute(
        insert(USERS_TABLE), {"id": key, "name": "x", "score": 0}
    ),
    "cte": lambda session, key: session.connection(key=key).execute(
        select(literal(1)).add_cte(insert(USERS_TABLE).values(id=key, name="x", score=0).cte("written"))
    ),
    "text": lambda session, key: session.connection(key=key).execute(text("SELECT set_config('a.b', '1', true)")),
    "driver": lambda session, key: session.connection(key=key).exec_driver_sql("SELECT 1"),
}  # fmt: skip


@pytest.mark.parametrize("how", SECOND_WRITES)
def test_a_second_shard_is_not_written(
    sharded: ShardedCluster, cluster: shardkit.ShardCluster, how: str
) -> None:
    (first,), (second,) = sharded.keys("s0", 1), sharded.keys("s1", 1)
    with cluster.sessionmaker()() as session:
        session.add(User(id=first, name="first"))
        session.flush()
        statements: list[str] = []
        engine = cluster.engines.shard(cluster.topology.named("s1"))
        event.listen(engine, "before_cursor_execute", lambda *call: statements.append(call[2]))
        with pytest.raises(CrossShardWrite) as raised:
            SECOND_WRITES[how](session, second)
        assert statements == []
        assert raised.value.fields == {"written": "s0", "shard": "s1"}


def test_a_flush_over_two_shards_is_refused_before_it_begins(
    sharded: ShardedCluster, cluster: shardkit.ShardCluster
) -> None:
    (first,), (second,) = sharded.keys("s0", 1), sharded.keys("s1", 1)
    with cluster.sessionmaker()() as session:
        session.add_all([User(id=first, name="a"), User(id=second, name="b")])
        with pytest.raises(CrossShardWrite):
            session.flush()
        session.expunge(next(user for user in session.new if user.id == second))
        session.commit()
    assert sharded.holding(USERS) == ["s0"]


def test_a_write_to_every_shard_is_refused(sharded: ShardedCluster, cluster: shardkit.ShardCluster) -> None:
    with cluster.sessionmaker()() as session, pytest.raises(CrossShardWrite):
        session.execute(update(User).values(name="all"))


def test_reads_of_other_shards_are_free(
    sharded: ShardedCluster, cluster: shardkit.ShardCluster, sent: list[str]
) -> None:
    keys = [sharded.keys(name, 1)[0] for name in ("s0", "s1", "s2")]
    for number in range(10):  # SQLAlchemy ends connections in an order of its own
        sent.clear()
        with cluster.sessionmaker()() as session:
            session.get(User, keys[0])
            session.merge(User(id=keys[1], name=f"name {number}"))
            session.scalars(select(User.id)).all()
            session.commit()
        assert sent[-1] == "s1"
        assert sorted(sent) == ["s0", "s1", "s2"]


def test_objects_that_did_not_change_are_not_written(
    sharded: ShardedCluster, cluster: shardkit.ShardCluster
) -> None:
    (first,), (second,) = sharded.keys("s0", 1), sharded.keys("s1", 1)
    sharded.admin("s0").execute("INSERT INTO public.users (id, name, score) VALUES (%s, 'a', 0)", (first,))
    sharded.admin("s1").execute("INSERT INTO public.users (id, name, score) VALUES (%s, 'b', 0)", (second,))
    with cluster.sessionmaker()() as session:
        one, other = session.get_one(User, first), session.get_one(User, second)
        one.name, one.name = "changed", "a"
        other.name = "changed"
        session.commit()
    assert sharded.query("s1", "SELECT name FROM public.users") == [("changed",)]


# --- lost servers ----------------------------------------------------------------------------------------------------


def test_a_reader_that_was_lost_stops_the_commit(
    sharded: ShardedCluster, cluster: shardkit.ShardCluster
) -> None:
    (first,), (second,) = sharded.keys("s0", 1), sharded.keys("s1", 1)
    for _ in range(10):  # SQLAlchemy ends connections in an order of its own
        with cluster.sessionmaker()() as session:
            pid = _pid(session, "s1")
            session.get(User, second)
            session.add(User(id=first, name="x"))
            session.flush()
            _kill(sharded, "s1", pid)
            with pytest.raises((ShardUnreachable, DBAPIError)) as raised:
                session.commit()
            session.rollback()
            assert session.get(User, second) is None
        assert isinstance(raised.value, ShardUnreachable)
        assert sharded.holding(USERS) == []


def test_a_writer_lost_before_commit_is_no_doubt(
    sharded: ShardedCluster, cluster: shardkit.ShardCluster
) -> None:
    """The session has noticed: nothing was sent."""
    (key,) = sharded.keys("s0", 1)
    with cluster.sessionmaker()() as session:
        session.add(User(id=key, name="x"))
        session.flush()
        raw: Any = session.connection(key=key).connection.driver_connection
        raw.close()
        with pytest.raises(DBAPIError, match="nothing was committed"):
            session.commit()
        session.rollback()
        assert session.get(User, key) is None


def test_a_writer_lost_during_commit(sharded: ShardedCluster, cluster: shardkit.ShardCluster) -> None:
    (key,) = sharded.keys("s0", 1)
    with cluster.sessionmaker()() as session:
        pid = _pid(session, "s0")
        session.rollback()
        session.add(User(id=key, name="x"))
        session.flush()
        assert _pid(session, "s0") == pid
        _kill(sharded, "s0", pid)
        with pytest.raises(CommitUnknown, match="s0") as raised:
            session.commit()
        assert not raised.value.retryable
        session.rollback()
        assert session.get(User, key) is None
        session.add(User(id=key, name="again"))
        session.commit()
    assert sharded.holding(USERS) == ["s0"]


async def test_a_writer_of_an_async_session(
    sharded: ShardedCluster, async_cluster: shardkit.ShardCluster
) -> None:
    (key,) = sharded.keys("s0", 1)
    async with async_cluster.async_sessionmaker()() as session:
        connection = await session.connection(key=key)
        pid = await connection.scalar(select(text("pg_backend_pid()")))
        session.add(User(id=key, name="x"))
        await session.flush()
        _kill(sharded, "s0", pid)
        with pytest.raises(CommitUnknown):
            await session.commit()
        await session.rollback()
        assert await session.get(User, key) is None


def test_a_failed_statement_that_was_swallowed_commits_nothing_silently(
    sharded: ShardedCluster, cluster: shardkit.ShardCluster
) -> None:
    """PostgreSQL answers COMMIT with ROLLBACK then, and says nothing more."""
    first, second = sharded.keys("s0", 2)
    with cluster.sessionmaker()() as session:
        session.execute(insert(User).values(id=first, name="x"))
        with pytest.raises(IntegrityError):
            session.execute(insert(User).values(id=first, name="twice"))
        with pytest.raises(DBAPIError, match="nothing is committed"):
            session.commit()
        session.rollback()
        session.execute(insert(User).values(id=second, name="x"))
        session.commit()
    assert sharded.query("s0", USERS) == [(second,)]


def test_what_was_not_committed_is_not_committed_by_the_next(
    sharded: ShardedCluster, cluster: shardkit.ShardCluster
) -> None:
    """A session whose commit failed before COMMIT is closed, not rolled back: its connection goes back to the pool."""
    (first,), (second, third) = sharded.keys("s1", 1), sharded.keys("s0", 2)
    with cluster.sessionmaker()() as session:
        session.get(User, first)
        session.execute(insert(User).values(id=second, name="x"))
        _kill(sharded, "s1", _pid(session, "s1"))
        with pytest.raises(ShardUnreachable):
            session.commit()
    open_here = "datname = current_database() AND state = 'idle in transaction'"
    assert sharded.query("s0", f"SELECT FROM pg_stat_activity WHERE {open_here}") == []
    with cluster.sessionmaker()() as session:
        session.execute(insert(User).values(id=third, name="x"))
        session.commit()
    assert sharded.query("s0", USERS) == [(third,)]


def test_a_failed_statement_on_one_of_several_shards_commits_none(
    sharded: ShardedCluster, cluster: shardkit.ShardCluster
) -> None:
    (first,), (second,) = sharded.keys("s0", 1), sharded.keys("s1", 1)
    for key, other in ((first, second), (second, first)):
        with cluster.sessionmaker(mode="best_effort")() as session:
            session.execute(insert(User).values(id=key, name="x"))
            session.execute(insert(User).values(id=other, name="x"))
            with pytest.raises(IntegrityError):
                session.execute(insert(User).values(id=other, name="twice"))
            with pytest.raises(DBAPIError, match="nothing is committed"):
                session.commit()
        assert sharded.holding(USERS) == []


# --- several writers -------------------------------------------------------------------------------------------------


def test_best_effort_writes_several_shards(sharded: ShardedCluster, cluster: shardkit.ShardCluster) -> None:
    keys = [key for name in ("s0", "s1", "s2") for key in sharded.keys(name, 2)]
    with cluster.sessionmaker(mode="best_effort")() as session:
        session.add_all(User(id=key, name="x", posts=[Post(id=1, caption="x")]) for key in keys)
        session.commit()
        session.execute(insert(Post), [{"user_id": key, "id": 2, "caption": "y"} for key in keys])
        assert affected(session.execute(update(User).values(name="y"))) == len(keys)
        session.commit()
        assert sorted(session.scalars(select(User.id).where(User.name == "y"))) == sorted(keys)
        assert len(session.scalars(select(Post)).all()) == 2 * len(keys)


def test_best_effort_says_what_was_committed(sharded: ShardedCluster, cluster: shardkit.ShardCluster) -> None:
    (first,), (second,) = sharded.keys("s0", 1), sharded.keys("s1", 1)
    partly = 0
    for _ in range(20):
        sharded.truncate()
        with cluster.sessionmaker(mode="best_effort")() as session:
            session.add_all([User(id=first, name="x"), User(id=second, name="x")])
            session.flush()
            _kill(sharded, "s1", _pid(session, "s1"))
            with pytest.raises((PartlyCommitted, CommitUnknown)) as raised:
                session.commit()
        committed = sharded.holding(USERS)
        if isinstance(raised.value, PartlyCommitted):
            partly += 1
            assert raised.value.fields == {"committed": ["s0"], "failed": "s1"}
            assert committed == ["s0"]
        else:
            assert committed == []
    assert 0 < partly


def test_nothing_is_known_of_other_binds(cluster: shardkit.ShardCluster) -> None:
    """An engine of the application's own cannot take part."""
    with cluster.sessionmaker()() as session:
        with pytest.raises(shardkit.ShardkitError):
            session.execute(select(User), bind_arguments={"bind": create_engine("postgresql+psycopg://")})
