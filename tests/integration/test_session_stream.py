"""Rows of several shards that are read as they are wanted."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest
from sqlalchemy import func, insert, select, text

import shardkit
from shardkit.core.errors import UnroutableQuery
from tests.fix_sharded import InSession
from tests.sharded import Post, ShardedCluster, User

COUNT = 900


@pytest.fixture
def users(sharded: ShardedCluster) -> list[int]:
    """Many users on all shards, by hand."""
    rows = list(range(COUNT))
    with sharded.connect() as cluster, cluster.sessionmaker(mode="best_effort")() as session:
        session.execute(insert(User), [{"id": key, "name": f"n{key % 7}", "score": key % 5} for key in rows])
        session.execute(insert(Post), [{"user_id": key, "id": 1, "caption": "x" * 10} for key in rows])
        session.commit()
    return rows


def test_an_order_is_that_of_all_shards(in_session: InSession, users: list[int]) -> None:
    def work(session: shardkit.ShardSession) -> list[tuple[int | None, int]]:
        statement = select(User.score, User.id).order_by(User.score.desc().nulls_last(), User.id)
        result = session.execute(statement, execution_options={"yield_per": 20})
        return [(row.score, row.id) for row in result]

    assert in_session(work) == sorted(((key % 5, key) for key in users), key=lambda row: (-row[0], row[1]))


def test_entities_and_rows_without_an_order(in_session: InSession, users: list[int]) -> None:
    def work(session: shardkit.ShardSession) -> list[int]:
        found = []
        for partition in session.scalars(select(User).execution_options(yield_per=50)).partitions():
            assert len(partition) <= 50
            found += [user.id for user in partition]
        return found

    assert sorted(in_session(work)) == users


def test_limit_offset_and_what_is_left_behind(in_session: InSession, users: list[int]) -> None:
    def work(session: shardkit.ShardSession) -> None:
        streamed = {"yield_per": 7}
        statement = select(User.id).order_by(User.id).limit(30).offset(5)
        assert session.scalars(statement, execution_options=streamed).all() == users[5:35]
        assert session.scalars(select(User.id).order_by(User.id), execution_options=streamed).first() == 0
        result = session.execute(select(User).order_by(User.id), execution_options=streamed)
        assert next(result).User.id == 0
        result.close()
        # The cursors of all shards are closed, and their connections free.
        for name in ("s0", "s1", "s2"):
            connection = session.connection(shard=name)
            reading = {"shardkit_writes": False}
            cursors = text("SELECT count(*) FROM pg_cursors")
            assert connection.execute(cursors, execution_options=reading).scalar() == 0
        assert session.scalar(select(func.count()).select_from(User)) == COUNT

    in_session(work)


def test_what_has_to_be_seen_together_is_not_streamed(in_session: InSession, users: list[int]) -> None:
    def work(session: shardkit.ShardSession) -> None:
        streamed = {"yield_per": 7}
        with pytest.raises(UnroutableQuery, match="not streamed"):
            session.execute(select(User.id).order_by(User.name), execution_options=streamed)
        # But what is little all the same.
        few = select(User.name).order_by(User.name).limit(3)
        assert session.scalars(few, execution_options=streamed).all() == ["n0"] * 3
        counted = select(User.name, func.count()).group_by(User.name).order_by(User.name)
        assert len(session.execute(counted, execution_options=streamed).all()) == 7
        wanted = select(User.id).where(User.score == select(func.max(User.score)).scalar_subquery())
        assert len(session.scalars(wanted, execution_options=streamed).all()) == COUNT // 5

    in_session(work)


async def test_stream_of_the_async_session(async_cluster: shardkit.ShardCluster, users: list[int]) -> None:
    async with async_cluster.async_sessionmaker()() as session:
        statement = select(User.id, User.name).order_by(User.id.desc())
        assert [row.id async for row in await session.stream(statement)] == users[::-1]
        scalars = await session.stream_scalars(select(User).execution_options(yield_per=10))
        first = await scalars.first()
        assert first is not None
        assert await session.scalar(select(func.count()).select_from(User)) == COUNT


def test_memory_is_bounded(sharded: ShardedCluster, cluster: shardkit.ShardCluster, users: list[int]) -> None:
    wide = [func.repeat(User.name, 2000), func.repeat(User.name, 2001)]

    def peak(**options: Any) -> int:
        with cluster.sessionmaker()() as session:
            statement = select(User.id, *wide).order_by(User.id)
            for _ in session.execute(statement.limit(1), execution_options=options):
                pass
            tracemalloc.start()
            count = sum(1 for _ in session.execute(statement, execution_options=options))
            _, highest = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        assert count == COUNT
        return highest

    assert peak(yield_per=10) * 4 < peak()
