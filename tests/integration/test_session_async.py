"""The async session: what is its own; and that whoever is cancelled leaves no connection and no lock behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import ExitStack, asynccontextmanager
from typing import Any

import pytest
from psycopg import sql
from sqlalchemy import insert, select, text
from sqlalchemy.orm import selectinload

import shardkit
from shardkit.storage.connections import connect
from tests.sharded import Post, ShardedCluster, User

OTHERS = """
SELECT pid, state, query FROM pg_stat_activity
WHERE datname = current_database() AND application_name = 'shardkit' AND state <> 'idle'
"""


@pytest.fixture
async def keys(sharded: ShardedCluster, async_cluster: shardkit.ShardCluster) -> list[int]:
    """A user with a post on each shard; every engine has connected."""
    keys = [sharded.keys(name, 1)[0] for name in ("s0", "s1", "s2")]
    async with async_cluster.async_sessionmaker(mode="best_effort")() as session:
        session.add_all(User(id=key, name="x", posts=[Post(id=1, caption="x")]) for key in keys)
        await session.commit()
    return keys


async def test_a_day(async_cluster: shardkit.ShardCluster, keys: list[int]) -> None:
    Session = async_cluster.async_sessionmaker(expire_on_commit=False)
    async with Session() as session:
        user = await session.get_one(User, keys[0], options=[selectinload(User.posts)])
        user.posts.append(Post(id=2, caption="y"))
        await session.commit()
        await session.refresh(user, ["posts"])
        assert [post.id for post in user.posts] == [1, 2]
        async with session.begin_nested():
            await session.execute(insert(Post), [{"user_id": keys[0], "id": 3, "caption": "z"}])
        await session.commit()
        assert sorted(await session.scalars(select(User.id))) == sorted(keys)
        streamed = await session.stream_scalars(
            select(Post.id).where(Post.user_id == keys[0]).order_by(Post.id)
        )
        assert [number async for number in streamed] == [1, 2, 3]
        await session.delete(user)
        await session.commit()
        assert await session.get(User, keys[0]) is None
        connection = await session.connection(shard="s1")
        assert await connection.scalar(text("SELECT count(*) FROM public.users")) == 1


@asynccontextmanager
async def locked(sharded: ShardedCluster, what: Callable[[str], sql.Identifier]) -> AsyncIterator[None]:
    """Relations, one of each shard, are locked by somebody in the block."""
    with ExitStack() as stack:
        for shard in sharded.topology.shards:
            connection = stack.enter_context(connect(shard.url, application="somebody"))
            stack.enter_context(connection.transaction())
            connection.execute(sql.SQL("LOCK TABLE {} IN ACCESS EXCLUSIVE MODE").format(what(shard.name)))
        yield


def _waiting(sharded: ShardedCluster) -> list[str]:
    return sharded.holding("SELECT FROM pg_locks WHERE NOT granted")


async def _cancelled_while_waiting(
    sharded: ShardedCluster,
    work: Coroutine[Any, Any, Any],
    shards: list[str],
    what: Callable[[str], sql.Identifier],
) -> None:
    async with locked(sharded, what):
        task = asyncio.create_task(work)
        while _waiting(sharded) != shards:  # noqa: ASYNC110 - the servers change it
            await asyncio.sleep(0.002)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert _waiting(sharded) == []
        for name in ("s0", "s1", "s2"):
            assert sharded.query(name, OTHERS) == []


def _users(_: str) -> sql.Identifier:
    return sql.Identifier("public", "users")


async def _check_usable(async_cluster: shardkit.ShardCluster, keys: list[int]) -> None:
    for shard in async_cluster.topology.shards:
        assert async_cluster.async_engines.shard(shard).pool.checkedout() == 0  # type: ignore[attr-defined]
    async with async_cluster.async_sessionmaker()() as session:
        assert sorted(await session.scalars(select(User.id))) == sorted(keys)


async def test_cancelled_at_the_guard(
    sharded: ShardedCluster, async_cluster: shardkit.ShardCluster, keys: list[int]
) -> None:
    async def work() -> None:
        async with async_cluster.async_sessionmaker()() as session:
            await session.get(User, keys[0])

    def fence(name: str) -> sql.Identifier:
        return sql.Identifier("shardkit", sharded.topology.named(name).fence.relation)

    await _cancelled_while_waiting(sharded, work(), ["s0"], fence)
    await _check_usable(async_cluster, keys)


async def test_cancelled_in_a_statement(
    sharded: ShardedCluster, async_cluster: shardkit.ShardCluster, keys: list[int]
) -> None:
    async def work() -> None:
        async with async_cluster.async_sessionmaker()() as session:
            session.add(Post(user_id=keys[0], id=9, caption="never"))
            await session.flush()
            await session.get(User, keys[0])

    await _cancelled_while_waiting(sharded, work(), ["s0"], _users)
    await _check_usable(async_cluster, keys)
    assert sharded.query("s0", "SELECT FROM public.posts WHERE id = 9") == []


async def test_cancelled_in_a_scatter(
    sharded: ShardedCluster, async_cluster: shardkit.ShardCluster, keys: list[int]
) -> None:
    """All shards are asked at the same time, and all are left."""

    async def work() -> None:
        async with async_cluster.async_sessionmaker()() as session:
            await session.scalars(select(User.id))

    await _cancelled_while_waiting(sharded, work(), ["s0", "s1", "s2"], _users)
    await _check_usable(async_cluster, keys)


async def test_a_scatter_that_fails_on_one_shard(
    sharded: ShardedCluster, async_cluster: shardkit.ShardCluster, keys: list[int]
) -> None:
    sharded.admin("s1").execute("ALTER TABLE public.users RENAME COLUMN score TO points")
    try:
        async with async_cluster.async_sessionmaker()() as session:
            with pytest.raises(Exception, match="score"):
                await session.scalars(select(User))
            await session.rollback()
            assert (await session.get_one(User, keys[0])).score == 0
    finally:
        sharded.admin("s1").execute("ALTER TABLE public.users RENAME COLUMN points TO score")
    await _check_usable(async_cluster, keys)


async def test_many_tasks_share_the_pools(async_cluster: shardkit.ShardCluster, keys: list[int]) -> None:
    Session = async_cluster.async_sessionmaker()

    async def work(number: int) -> None:
        async with Session() as session:
            session.add(Post(user_id=keys[number % 3], id=100 + number, caption="x"))
            await session.commit()
            await session.scalars(select(User.id))

    async with asyncio.TaskGroup() as group:
        for number in range(40):
            group.create_task(work(number))
    async with Session() as session:
        assert len((await session.scalars(select(Post))).all()) == 43
