"""A router that slept through a move: what it does next reaches the new owner, without an error and without a loss.

Each operation runs with a topology that is out of date: from before the transaction, or since the middle of it, where
the transaction holds fences of its own that the move must leave alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from sqlalchemy import delete, event, insert, select, update
from sqlalchemy.orm import Session, joinedload, selectinload

from shardkit.core.errors import TopologyChanged
from shardkit.core.keyrange import Arc, ArcSet
from shardkit.core.ring import position
from tests.sharded import Base, Post, ShardedCluster, User


@dataclass
class Work:
    """A transaction of an application in ``session``: ``key`` is the user whose rows move, ``user`` that user, loaded
    in an earlier transaction of the session."""

    session: Any
    key: int
    user: User


def get(work: Work) -> None:
    work.session.expunge_all()
    assert work.session.get_one(User, work.key).name == "before"


def select_by_key(work: Work) -> None:
    assert work.session.scalars(select(User.name).where(User.id == work.key)).all() == ["before"]


def refresh(work: Work) -> None:
    work.session.refresh(work.user)


def lazy_load(work: Work) -> None:
    assert [post.caption for post in work.user.posts] == ["old"]


def selectin_load(work: Work) -> None:
    statement = select(User).where(User.id == work.key).options(selectinload(User.posts))
    user = work.session.scalars(statement.execution_options(populate_existing=True)).one()
    assert [post.caption for post in user.posts] == ["old"]


def joined_load(work: Work) -> None:
    statement = select(User).where(User.id == work.key).options(joinedload(User.posts))
    user = work.session.scalars(statement.execution_options(populate_existing=True)).unique().one()
    assert [post.caption for post in user.posts] == ["old"]


def scatter(work: Work) -> None:
    assert work.session.scalars(select(User.id).where(User.name == "before")).all() == [work.key]


def flush_insert(work: Work) -> None:
    work.session.add(Post(user_id=work.key, id=2, caption="new"))
    work.session.flush()


def flush_child(work: Work) -> None:
    work.session.add(Post(user=work.user, id=2, caption="new"))
    work.session.flush()


def flush_update(work: Work) -> None:
    work.user.name = "after"
    work.session.flush()


def flush_delete(work: Work) -> None:
    work.session.delete(work.user)
    work.session.flush()


def flush_by_query(work: Work) -> None:
    work.user.name = "after"
    assert work.session.scalars(select(User.name).where(User.id == work.key)).all() == ["after"]


def bulk_insert(work: Work) -> None:
    rows = [{"user_id": work.key, "id": number, "caption": "new"} for number in range(2, 5)]
    work.session.execute(insert(Post), rows)


def bulk_update(work: Work) -> None:
    work.session.execute(update(User), [{"id": work.key, "name": "after"}])


def update_by_statement(work: Work) -> None:
    work.session.execute(update(User).where(User.id == work.key).values(name="after"))


def delete_by_statement(work: Work) -> None:
    work.session.execute(delete(Post).where(Post.user_id == work.key))


def merge(work: Work) -> None:
    work.session.merge(User(id=work.key, name="after"))
    work.session.flush()


def core_insert(work: Work) -> None:
    work.session.execute(insert(Base.metadata.tables["posts"]).values(user_id=work.key, id=2, caption="new"))


READS = [get, select_by_key, refresh, lazy_load, selectin_load, joined_load, scatter]
WRITES = [flush_insert, flush_child, flush_update, flush_delete, flush_by_query, bulk_insert, bulk_update,
          update_by_statement, delete_by_statement, merge, core_insert]  # fmt: skip
LEFT: dict[str, tuple[list[str], list[str]]] = {
    "flush_insert": (["before"], ["old", "new"]),
    "flush_child": (["before"], ["old", "new"]),
    "flush_update": (["after"], ["old"]),
    "flush_delete": ([], []),
    "flush_by_query": (["after"], ["old"]),
    "bulk_insert": (["before"], ["old", "new", "new", "new"]),
    "bulk_update": (["after"], ["old"]),
    "update_by_statement": (["after"], ["old"]),
    "delete_by_statement": (["before"], []),
    "merge": (["after"], ["old"]),
    "core_insert": (["before"], ["old", "new"]),
}
"""What a write leaves of the user and of its posts."""


def _fill(sharded: ShardedCluster, name: str) -> int:
    """A user with a post on a shard."""
    (key,) = sharded.keys(name, 1)
    admin = sharded.admin(name)
    admin.execute("INSERT INTO public.users (id, name, score) VALUES (%s, 'before', 0)", (key,))
    admin.execute("INSERT INTO public.posts (user_id, id, caption) VALUES (%s, 1, 'old')", (key,))
    return key


def _check(sharded: ShardedCluster, key: int, operation: Callable[[Work], None]) -> None:
    """Every row of the key is on its owner, once, and says what the operation left."""
    users, posts = LEFT.get(operation.__name__, (["before"], ["old"]))
    for name in ("s0", "s1", "s2"):
        owns = name == sharded.owner(key)
        found = sharded.query(name, "SELECT name FROM public.users WHERE id = %s", key)
        assert [row[0] for row in found] == (users if owns else [])
        found = sharded.query(name, "SELECT caption FROM public.posts WHERE user_id = %s ORDER BY id", key)
        assert [row[0] for row in found] == (posts if owns else [])


Run = Callable[[Callable[[Session], None]], Any]


@pytest.fixture(params=["sync", "async"])
async def run(request: pytest.FixtureRequest, sharded: ShardedCluster) -> Any:
    """Runs a function with a session, sync or async, made with further options."""
    cluster = sharded.connect()

    async def run(work: Callable[[Session], None], **options: Any) -> None:
        if request.param == "sync":
            with cluster.sessionmaker(expire_on_commit=False, **options)() as session:
                work(session)
        else:
            async with cluster.async_sessionmaker(expire_on_commit=False, **options)() as async_session:
                await async_session.run_sync(work)

    yield run
    await cluster.adispose()
    cluster.dispose()


OPERATIONS = pytest.mark.parametrize("operation", READS + WRITES, ids=lambda operation: operation.__name__)
NESTED = pytest.mark.parametrize(("run", "nested"), [("sync", True), ("async", False)], indirect=["run"])


@OPERATIONS
async def test_from_before_the_transaction(
    sharded: ShardedCluster, run: Any, operation: Callable[[Work], None]
) -> None:
    key = _fill(sharded, "s0")

    def work(session: Session) -> None:
        user = session.get_one(User, key)
        session.commit()
        sharded.move_key(key)
        operation(Work(session, key, user))
        session.commit()

    await run(work)
    _check(sharded, key, operation)


async def test_from_before_several_moves(sharded: ShardedCluster, run: Any) -> None:
    key = _fill(sharded, "s0")

    def work(session: Session) -> None:
        user = session.get_one(User, key)
        session.commit()
        for _ in range(4):
            sharded.move_key(key)
        flush_update(Work(session, key, user))
        session.commit()

    await run(work)
    _check(sharded, key, flush_update)


def _move_in_the_middle(
    sharded: ShardedCluster, operation: Callable[[Work], None], key: int, *, nested: bool = False
) -> Callable[[Session], None]:
    """A transaction that holds s0 while the key goes from s1 to s2."""
    (other,) = sharded.keys("s0", 1)

    def work(session: Session) -> None:
        user = session.get_one(User, key)
        session.commit()
        assert session.get(User, other) is None
        if nested:
            with session.begin_nested():
                assert sharded.move_key(key) == "s2"
                operation(Work(session, key, user))
        else:
            assert sharded.move_key(key) == "s2"
            operation(Work(session, key, user))
        session.commit()

    return work


@OPERATIONS
@NESTED
async def test_since_the_middle_of_the_transaction(
    sharded: ShardedCluster, run: Any, operation: Callable[[Work], None], nested: bool
) -> None:
    key = _fill(sharded, "s1")
    await run(_move_in_the_middle(sharded, operation, key, nested=nested))
    _check(sharded, key, operation)


@pytest.mark.parametrize(
    "operation", [select_by_key, scatter, flush_update, bulk_insert], ids=lambda operation: operation.__name__
)
@pytest.mark.parametrize("isolation", ["REPEATABLE READ", "SERIALIZABLE"])
@pytest.mark.parametrize("run", ["sync"], indirect=True)
async def test_since_the_middle_at_every_isolation_level(
    sharded: ShardedCluster, run: Any, operation: Callable[[Work], None], isolation: str
) -> None:
    key = _fill(sharded, "s1")
    await run(_move_in_the_middle(sharded, operation, key), execution_options={"isolation_level": isolation})
    _check(sharded, key, operation)


@contextmanager
def arriving(sharded: ShardedCluster, key: int, target: str) -> Iterator[Callable[[], None]]:
    """A key is in transit on a shard in the block; the function cuts it over, beside transactions that hold the
    target's fence. The purge is after the block."""
    topology = sharded.topology
    source = topology.ring.owner(key)
    arcs = ArcSet([Arc(position(key), position(key))])
    target_id = topology.named(target).id
    with sharded.lease() as catalog:
        sharded.mark(catalog, target_id, arcs)

    def cut_over() -> None:
        with sharded.lease() as catalog:
            sharded.cut_over(catalog, source, target_id, arcs)

    yield cut_over
    with sharded.lease() as catalog:
        sharded.purge(catalog, source, arcs)
        sharded.drain(catalog)


@OPERATIONS
@NESTED
async def test_keys_come_to_a_shard_that_the_transaction_has_open(
    sharded: ShardedCluster, run: Any, operation: Callable[[Work], None], nested: bool
) -> None:
    key = _fill(sharded, "s1")
    (other,) = sharded.keys("s0", 1)

    def work(session: Session) -> None:
        user = session.get_one(User, key)
        session.commit()
        with arriving(sharded, key, "s0") as cut_over:
            session.add(User(id=other, name="written"))
            session.flush()
            cut_over()
            if nested:
                with session.begin_nested():
                    operation(Work(session, key, user))
            else:
                operation(Work(session, key, user))
            session.commit()

    # Written are keys of two shards, as far as the application knows.
    await run(work, mode="best_effort")
    _check(sharded, key, operation)
    assert sharded.holding("SELECT 1 FROM public.users WHERE name = 'written'") == ["s0"]


@pytest.mark.parametrize("isolation", ["REPEATABLE READ", "SERIALIZABLE"])
async def test_a_snapshot_older_than_what_came_is_refused(
    sharded: ShardedCluster, run: Any, isolation: str
) -> None:
    key = _fill(sharded, "s1")
    (other,) = sharded.keys("s0", 1)

    def work(session: Session) -> None:
        user = session.get_one(User, key)
        session.commit()
        with arriving(sharded, key, "s0") as cut_over:
            session.get(User, other)
            cut_over()
            with pytest.raises(TopologyChanged) as raised:
                flush_update(Work(session, key, user))
            assert raised.value.retryable
            session.rollback()
            get(Work(session, key, user))
            session.commit()

    await run(work, execution_options={"isolation_level": isolation})


async def test_a_rollback_to_a_savepoint_releases_what_was_locked_in_it(
    sharded: ShardedCluster, run: Any
) -> None:
    """The fence that was locked in addition is had again."""
    key = _fill(sharded, "s1")
    (other,) = sharded.keys("s0", 1)

    def work(session: Session) -> None:
        session.get(User, key)
        session.commit()
        with arriving(sharded, key, "s0") as cut_over:
            session.get(User, other)
            cut_over()
            with session.begin_nested() as nested:
                session.execute(update(User).where(User.id == key).values(name="undone"))
                nested.rollback()
            pid = session.connection(key=key).exec_driver_sql("SELECT pg_backend_pid()").scalar()  # type: ignore[call-arg]
            assert len(_fences(sharded, "s0", pid)) == 2
            session.execute(update(User).where(User.id == key).values(score=7))
            session.commit()

    await run(work)
    assert sharded.query("s0", "SELECT name, score FROM public.users WHERE id = %s", key) == [("before", 7)]


def _fences(sharded: ShardedCluster, name: str, pid: int | None) -> list[tuple[Any, ...]]:
    return sharded.query(
        name,
        "SELECT c.relname FROM pg_locks l JOIN pg_class c ON c.oid = l.relation "
        "WHERE c.relnamespace = 'shardkit'::regnamespace AND l.pid = %s",
        pid,
    )


async def test_a_scatter_whose_first_shards_are_open_begins_again_on_all(
    sharded: ShardedCluster, run: Any
) -> None:
    """s0 has both names, so the old topology opens it; s1 then refuses, and s0 must be had under the new one, or the
    rows that came would be missed."""
    keys = [_fill(sharded, "s1")]

    def work(session: Session) -> None:
        session.get(User, keys[0])
        session.commit()
        with arriving(sharded, keys[0], "s0") as cut_over:
            session.get(User, keys[0])  # the router knows of the mark
            session.commit()
            cut_over()
            assert session.scalars(select(User.id)).all() == keys
            session.commit()

    await run(work)


async def test_in_the_middle_of_a_flush(sharded: ShardedCluster, run: Any) -> None:
    """The child's shard is not known when the flush begins, and its key moves when the flush is at its parent's."""
    key = _fill(sharded, "s1")
    first, second = sharded.keys("s0", 2)
    moved: list[str] = []

    def work(session: Session) -> None:
        user = session.get_one(User, key)
        session.commit()
        session.add(User(id=first, name="written"))
        session.flush()

        def move(*_: Any) -> None:
            moved.append(sharded.move_key(key))

        event.listen(User, "before_insert", move)
        try:
            session.add_all([User(id=second, name="written"), Post(user=user, id=2, caption="new")])
            session.flush()
        finally:
            event.remove(User, "before_insert", move)
        session.commit()

    await run(work, mode="best_effort")
    assert moved == ["s2"]
    _check(sharded, key, flush_child)
    assert sharded.query("s0", "SELECT id FROM public.users ORDER BY id") == [(first,), (second,)]


async def test_a_bulk_insert_is_split_anew(sharded: ShardedCluster, run: Any) -> None:
    keys = [_fill(sharded, name) for name in ("s0", "s1", "s2")]

    def work(session: Session) -> None:
        session.get(User, keys[0])
        session.commit()
        sharded.move_key(keys[0])
        rows = [{"user_id": key, "id": number, "caption": "new"} for number in (2, 3) for key in keys]
        session.execute(insert(Post), rows)
        session.commit()

    await run(work, mode="best_effort")
    for key in keys:
        assert sharded.holding("SELECT 1 FROM public.posts WHERE user_id = %s", key) == [sharded.owner(key)]
        count = "SELECT count(*) FROM public.posts WHERE user_id = %s"
        assert sharded.query(sharded.owner(key), count, key) == [(3,)]
