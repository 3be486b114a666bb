"""The session over two shards: what an ORM user does every day."""

from __future__ import annotations

from sqlalchemy import select

import shardkit
from tests.sharded import Post, ShardedCluster, User


def test_rows_land_on_the_owner_of_their_key(sharded: ShardedCluster, cluster: shardkit.ShardCluster) -> None:
    Session = cluster.sessionmaker()
    for name in ("s0", "s1"):
        (key,) = sharded.keys(name, 1)
        with Session() as session:
            session.add(User(id=key, name=name, posts=[Post(id=1, caption="first")]))
            session.commit()
        assert sharded.holding("SELECT 1 FROM public.users WHERE id = %s", key) == [name]
        assert sharded.holding("SELECT 1 FROM public.posts WHERE user_id = %s", key) == [name]
        with Session() as session:
            assert session.get_one(User, key).name == name
            assert session.scalars(select(Post).where(Post.user_id == key)).one().caption == "first"
