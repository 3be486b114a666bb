"""Units of work that are run again: after which errors, how often, and who takes part."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import insert, select, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

import shardkit
from shardkit.core.errors import CommitUnknown, TopologyChanged, UsageError
from tests.both import Kind, both_kinds
from tests.race.test_fence_stale import arriving
from tests.sharded import ShardedCluster, User

Work = Callable[[Session], Any]
USERS = "SELECT id FROM public.users"


class Units:
    """Runs a function as a unit of work of one kind."""

    def __init__(self, kind: Kind, cluster: shardkit.ShardCluster, **options: Any) -> None:
        self.kind = kind
        self.cluster = cluster
        self.factory: Any = (
            cluster.sessionmaker(**options) if kind == "sync" else cluster.async_sessionmaker(**options)
        )

    def unit(self, work: Work, **options: Any) -> Callable[[], Any]:
        """The decorated function; within an async unit it has to be awaited."""
        options = {"pause": lambda attempt: 0.0, **options}
        if self.kind == "sync":
            return shardkit.retrying(self.factory, **options)(work)  # type: ignore[no-any-return]

        async def coroutine(session: Any) -> Any:
            return await session.run_sync(work)

        return shardkit.retrying(self.factory, **options)(coroutine)  # type: ignore[no-any-return]

    def run(self, work: Work, **options: Any) -> Any:
        unit = self.unit(work, **options)
        if self.kind == "sync":
            return unit()
        return self.loop(unit)

    def loop(self, start: Callable[[], Any]) -> Any:
        async def main() -> Any:
            try:
                return await start()
            finally:
                await self.cluster.adispose()

        return asyncio.run(main())


@pytest.fixture
def units(kind: Kind, cluster: shardkit.ShardCluster) -> Units:
    return Units(kind, cluster)


def _pid(session: Session, key: int) -> Any:
    return session.connection(bind_arguments={"key": key}).execute(select(text("pg_backend_pid()"))).scalar()


def _kill(sharded: ShardedCluster, name: str, pid: Any) -> None:
    assert sharded.query(name, "SELECT pg_terminate_backend(%s, 5000)", pid) == [(True,)]


@both_kinds
def test_a_unit_is_committed_and_returns(sharded: ShardedCluster, units: Units) -> None:
    (key,) = sharded.keys("s0", 1)

    def work(session: Session) -> str:
        session.add(User(id=key, name="x"))
        return "done"

    assert units.run(work) == "done"
    assert sharded.holding(USERS) == ["s0"]


@both_kinds
def test_it_is_run_again_after_what_passes(sharded: ShardedCluster, units: Units) -> None:
    (key,) = sharded.keys("s0", 1)
    pauses: list[int] = []
    sessions: list[Session] = []

    def work(session: Session) -> int:
        sessions.append(session)
        session.add(User(id=key, name=f"attempt {len(sessions)}"))
        session.flush()
        if len(sessions) < 3:
            raise TopologyChanged
        return len(sessions)

    def pause(attempt: int) -> float:
        pauses.append(attempt)
        return 0.0

    assert units.run(work, pause=pause) == 3
    assert pauses == [1, 2]
    assert len({id(session) for session in sessions}) == 3
    assert sharded.query("s0", "SELECT name FROM public.users") == [("attempt 3",)]


@both_kinds
def test_attempts_are_bounded(sharded: ShardedCluster, units: Units) -> None:
    (key,) = sharded.keys("s0", 1)
    attempts: list[int] = []

    def work(session: Session) -> None:
        session.add(User(id=key, name="x"))
        session.flush()
        attempts.append(1)
        raise TopologyChanged("again")

    with pytest.raises(TopologyChanged, match="again") as raised:
        units.run(work, attempts=3)
    assert len(attempts) == 3
    assert raised.value.__notes__ == ["Given up after 3 attempts."]
    assert sharded.holding(USERS) == []


@both_kinds
def test_a_serialization_failure_is_run_again(sharded: ShardedCluster, kind: Kind) -> None:
    (key,) = sharded.keys("s0", 1)
    sharded.admin("s0").execute("INSERT INTO public.users (id, name, score) VALUES (%s, 'x', 1)", (key,))
    seen: list[int] = []

    def work(session: Session) -> None:
        user = session.get_one(User, key)
        seen.append(user.score)
        if len(seen) == 1:
            sharded.admin("s0").execute("UPDATE public.users SET score = 10")
        user.score += 1

    with sharded.connect(isolation_level="REPEATABLE READ") as cluster:
        Units(kind, cluster).run(work)
    assert seen == [1, 10]
    assert sharded.query("s0", "SELECT score FROM public.users") == [(11,)]


@both_kinds
def test_a_connection_lost_before_commit_is_run_again(sharded: ShardedCluster, units: Units) -> None:
    (key,) = sharded.keys("s0", 1)
    pids: list[int] = []

    def work(session: Session) -> None:
        session.add(User(id=key, name="x"))
        session.flush()
        pids.append(_pid(session, key))
        if len(pids) == 1:
            _kill(sharded, "s0", pids[0])
        session.execute(update(User).where(User.id == key).values(name="y"))

    units.run(work)
    assert len(pids) == 2
    assert sharded.query("s0", "SELECT name FROM public.users") == [("y",)]


@both_kinds
@pytest.mark.parametrize("mode", ["single", "two_phase"])
def test_an_unknown_commit_is_never_run_again(
    sharded: ShardedCluster, kind: Kind, cluster: shardkit.ShardCluster, mode: str
) -> None:
    (key,) = sharded.keys("s0", 1)
    pids: list[int] = []

    def work(session: Session) -> None:
        session.add(User(id=key, name="x"))
        session.flush()
        pids.append(_pid(session, key))
        _kill(sharded, "s0", pids[-1])

    with pytest.raises(CommitUnknown):
        Units(kind, cluster, mode=mode).run(work)
    assert len(pids) == 1
    assert sharded.holding(USERS) == []


@both_kinds
def test_other_errors_pass_at_once(sharded: ShardedCluster, units: Units) -> None:
    (key,) = sharded.keys("s0", 1)
    attempts: list[int] = []

    def work(session: Session) -> None:
        attempts.append(1)
        session.execute(insert(User).values(id=key, name=None, score=0))

    with pytest.raises(IntegrityError):
        units.run(work)
    assert len(attempts) == 1


@both_kinds
def test_a_snapshot_older_than_what_came_is_run_again(sharded: ShardedCluster, kind: Kind) -> None:
    moving, staying = sharded.keys("s1", 1)[0], sharded.keys("s0", 1)[0]
    sharded.admin("s1").execute("INSERT INTO public.users (id, name, score) VALUES (%s, 'x', 0)", (moving,))
    attempts: list[int] = []

    with (
        sharded.connect(isolation_level="REPEATABLE READ") as cluster,
        arriving(sharded, moving, "s0") as cut_over,
    ):

        def work(session: Session) -> str:
            attempts.append(1)
            session.get(User, staying)  # a snapshot is taken on s0
            if len(attempts) == 1:
                cut_over()
            user = session.get_one(User, moving)
            user.score += 1
            return user.name

        assert Units(kind, cluster).run(work) == "x"
    assert len(attempts) == 2
    assert sharded.query("s0", "SELECT id, score FROM public.users") == [(moving, 1)]


# --- units within units ----------------------------------------------------------------------------------------------


def test_a_unit_within_a_unit_takes_part(sharded: ShardedCluster, cluster: shardkit.ShardCluster) -> None:
    Session = cluster.sessionmaker()
    first, second = sharded.keys("s0", 2)
    attempts: list[str] = []

    @shardkit.retrying(Session, pause=lambda attempt: 0.0)
    def inner(session: shardkit.ShardSession) -> shardkit.ShardSession:
        attempts.append("inner")
        session.add(User(id=second, name="x"))
        session.flush()
        if len(attempts) < 4:
            raise TopologyChanged
        return session

    @shardkit.retrying(Session, pause=lambda attempt: 0.0)
    def outer(session: shardkit.ShardSession, name: str) -> None:
        attempts.append("outer")
        session.add(User(id=first, name=name))
        assert inner() is session

    outer("x")
    assert attempts == ["outer", "inner"] * 2
    assert sharded.query("s0", f"{USERS} ORDER BY id") == [(first,), (second,)]


def test_other_factories_and_threads_have_units_of_their_own(
    sharded: ShardedCluster, cluster: shardkit.ShardCluster
) -> None:
    one, other = cluster.sessionmaker(), cluster.sessionmaker()
    sessions: list[Session] = []

    @shardkit.retrying(one)
    def of_one(session: Session) -> None:
        sessions.append(session)

    @shardkit.retrying(one)
    def outer(session: Session) -> None:
        of_one()
        shardkit.retrying(other)(lambda session: sessions.append(session))()
        context = contextvars.copy_context()
        thread = threading.Thread(target=context.run, args=(of_one,))
        thread.start()
        thread.join()
        assert sessions[0] is session
        assert len({id(each) for each in sessions}) == 3

    outer()
    assert len(sessions) == 3


async def test_tasks_have_units_of_their_own(
    sharded: ShardedCluster, async_cluster: shardkit.ShardCluster
) -> None:
    Session = async_cluster.async_sessionmaker()

    @shardkit.retrying(Session)
    async def inner(session: shardkit.ShardAsyncSession) -> shardkit.ShardAsyncSession:
        return session

    @shardkit.retrying(Session)
    async def outer(session: shardkit.ShardAsyncSession) -> None:
        assert await inner() is session
        assert await asyncio.create_task(inner()) is not session

    await outer()


def test_what_is_no_unit_of_work(cluster: shardkit.ShardCluster) -> None:
    def generator(session: Any) -> Any:
        yield session

    async def coroutine(session: Any) -> None:
        pass

    refused: list[tuple[Any, Any]] = [
        (cluster.sessionmaker(), generator),
        (cluster.sessionmaker(), coroutine),
        (cluster.async_sessionmaker(), lambda session: None),
    ]
    for factory, work in refused:
        with pytest.raises(UsageError):
            shardkit.retrying(factory)(work)
    with pytest.raises(UsageError):
        shardkit.retrying(cluster.sessionmaker(), attempts=0)
