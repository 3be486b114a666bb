"""Giving rows another shard key."""

from __future__ import annotations

import pytest
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm.exc import StaleDataError

import shardkit
from shardkit.core.errors import CrossShardWrite, KeyTypeError, UnroutableQuery, UsageError
from tests.fix_sharded import InSession
from tests.sharded import Post, ShardedCluster, User


@pytest.fixture
def keys(sharded: ShardedCluster) -> list[int]:
    """A user on each shard; the first two have a post."""
    keys = [sharded.keys(name, 1)[0] for name in ("s0", "s1", "s2")]
    with sharded.connect() as cluster, cluster.sessionmaker(mode="best_effort")() as session:
        session.add_all(User(id=key, name="x") for key in keys)
        session.add_all(Post(user_id=key, id=1, caption=f"of {key}") for key in keys[:2])
        session.commit()
    return keys


@pytest.mark.parametrize("mode", ["two_phase", "best_effort"])
def test_a_row_goes_to_the_shard_of_its_new_key(
    in_session: InSession, sharded: ShardedCluster, keys: list[int], mode: str
) -> None:
    def work(session: shardkit.ShardSession) -> None:
        post = session.get_one(Post, (keys[0], 1))
        session.commit()  # what is expired is loaded
        session.rehome(post, keys[2])
        assert post in session
        assert post.caption == f"of {keys[0]}"
        assert session.get(Post, (keys[0], 1)) is None
        assert session.get(Post, (keys[2], 1)) is post
        post.caption = "moved"
        session.commit()
        assert sorted(session.scalars(select(Post.user_id))) == sorted(keys[1:])

    in_session(work, mode=mode)
    assert sharded.query("s0", "SELECT FROM public.posts") == []
    assert sharded.query("s2", "SELECT user_id, caption FROM public.posts") == [(keys[2], "moved")]


def test_what_is_refused_changes_nothing(
    in_session: InSession, sharded: ShardedCluster, keys: list[int]
) -> None:
    def single(session: shardkit.ShardSession) -> None:
        with pytest.raises(CrossShardWrite, match="writes the shards of both"):
            session.rehome(session.get_one(Post, (keys[0], 1)), keys[0])

    def work(session: shardkit.ShardSession) -> None:
        with pytest.raises(UnroutableQuery, match="can refer to this one"):
            session.rehome(session.get_one(User, keys[0]), 5)
        with pytest.raises(UsageError, match="has loaded, or flushed"):
            session.rehome(Post(user_id=keys[0], id=1), keys[1])
        post = session.get_one(Post, (keys[0], 1))
        with pytest.raises(KeyTypeError):
            session.rehome(post, None)
        assert post in session
        with pytest.raises(IntegrityError):
            session.rehome(session.get_one(Post, (keys[0], 1)), keys[1])  # there is one of this primary key
        session.rollback()
        gone = session.get_one(Post, (keys[0], 1))
        session.expunge(gone)
        session.delete(session.get_one(Post, (keys[0], 1)))
        session.flush()
        session.add(gone)
        with pytest.raises(StaleDataError):
            session.rehome(gone, keys[2])
        session.rollback()
        assert sorted(session.scalars(select(Post.user_id))) == sorted(keys[:2])

    in_session(single)
    in_session(work, mode="two_phase")
    assert sharded.query("s0", "SELECT user_id FROM public.posts") == [(keys[0],)]


async def test_on_the_async_session(async_cluster: shardkit.ShardCluster, keys: list[int]) -> None:
    async with async_cluster.async_sessionmaker(mode="two_phase")() as session:
        await session.rehome(await session.get_one(Post, (keys[0], 1)), keys[2])
        await session.commit()
        assert await session.get(Post, (keys[2], 1)) is not None
