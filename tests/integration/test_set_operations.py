"""Set operations that are made branch by branch: of any number of rows, explained, as entities, and in streams.

That they answer as one database does, while rows are in transit too, `test_traps` and `test_wide_oracle` show.
"""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest
from sqlalchemy import func, insert, intersect, literal, select, union, union_all

import shardkit
from shardkit.core.errors import UnmergeableQuery, UnroutableQuery
from tests.fix_sharded import InSession
from tests.sharded import Post, ShardedCluster, User

COUNT = 300
FEW = {"shardkit_most_rows": 10}

_everything = union_all(
    select(User.name.label("text"), User.id),
    select(Post.caption, Post.user_id),
    select(literal("free"), literal(-1)),
)
_rows = _everything.subquery()


@pytest.fixture(autouse=True)
def users(sharded: ShardedCluster) -> list[int]:
    """Many users on all shards, and a post of every third of them."""
    keys = list(range(COUNT))
    with sharded.connect() as cluster, cluster.sessionmaker(mode="best_effort")() as session:
        session.execute(insert(User), [{"id": key, "name": f"n{key % 7}", "score": key % 5} for key in keys])
        session.execute(insert(Post), [{"user_id": key, "id": 1, "caption": f"c{key}"} for key in keys[::3]])
        session.commit()
    return keys


def test_tables_may_be_larger_than_what_is_pulled(in_session: InSession, users: list[int]) -> None:
    texts = [
        *((f"n{key % 7}", key) for key in users),
        *((f"c{key}", key) for key in users[::3]),
        ("free", -1),
    ]

    def work(session: shardkit.ShardSession) -> None:
        def rows(statement: Any) -> list[Any]:
            return [tuple(row) for row in session.execute(statement, execution_options=FEW)]

        assert sorted(rows(_everything)) == sorted(texts)
        first = [
            ("free", -1),
            *sorted(((f"n{key % 7}", key) for key in users), key=lambda row: (row[0], -row[1])),
        ]
        ordered = _everything.order_by("text", User.id.desc()).offset(COUNT // 3)
        assert rows(ordered) == first
        assert rows(union(select(User.score), select(Post.id)).order_by("score")) == [(n,) for n in range(5)]
        assert sorted(rows(intersect(select(User.id), select(Post.user_id)))) == [
            (key,) for key in users[::3]
        ]
        assert rows(select(func.count(), func.sum(_rows.c.id))) == [
            (len(texts), sum(key for _, key in texts))
        ]
        # And what compares rows of two shards is still pulled, or refused.
        with pytest.raises(UnmergeableQuery, match="10 rows"):
            rows(intersect(select(User.score), select(Post.id)))

    in_session(work)


def test_entities_of_a_set_operation(in_session: InSession, users: list[int]) -> None:
    def work(session: shardkit.ShardSession) -> None:
        some = select(User).where(User.score == 1), select(User).where(User.id < 10)
        both = session.scalars(select(User).from_statement(union(*some).order_by(User.id))).all()
        assert [user.id for user in both] == [key for key in users if key % 5 == 1 or key < 10]
        assert all(user in session for user in both)
        doubled = session.scalars(select(User).from_statement(union_all(*some))).all()
        assert len(doubled) == COUNT // 5 + 10

    in_session(work)


def test_only_the_owners_of_keys_are_asked(sharded: ShardedCluster, cluster: shardkit.ShardCluster) -> None:
    with cluster.sessionmaker()() as session:
        one = union_all(
            select(User.id).where(User.id == 3), select(Post.user_id).where(Post.user_id.in_([3, 6]))
        )
        explained = shardkit.explain(session, one)
        assert set(explained.shards) == {sharded.owner(key) for key in (3, 6)}
        assert explained.reason == (
            "each row is made on the shard of its branch's users.id, posts.user_id; several keys of it are asked for"
        )
        assert len(shardkit.explain(session, _everything).shards) == 3


def test_explaining(cluster: shardkit.ShardCluster) -> None:
    with cluster.sessionmaker()() as session:
        texts = shardkit.explain(session, _everything.order_by("text").limit(3))
        assert texts.merged == "sorted by one shard, cut to LIMIT and OFFSET"
        assert all("UNION ALL" in sent and "shardkit_once" in sent for sent in texts.sent.values())
        plain = shardkit.explain(session, union_all(select(User.id), select(Post.id)))
        assert plain.merged == "concatenated"
        assert shardkit.explain(session, union(select(User.score), select(Post.id))).merged == "made distinct"
        keys = shardkit.explain(session, union(select(User.id), select(Post.user_id)))
        assert keys.merged == "concatenated"


def test_streams(in_session: InSession, users: list[int]) -> None:
    def work(session: shardkit.ShardSession) -> None:
        streamed = {"yield_per": 20}
        both = union_all(select(User.id), select(Post.user_id))
        partitions = list(session.scalars(both, execution_options=streamed).partitions())
        assert max(map(len, partitions)) <= 20
        assert sorted(key for part in partitions for key in part) == sorted([*users, *users[::3]])
        ordered = session.scalars(both.order_by("id"), execution_options=streamed).all()
        assert ordered == sorted([*users, *users[::3]])
        with pytest.raises(UnroutableQuery, match="not streamed"):
            session.execute(union(select(User.score), select(Post.id)), execution_options=streamed)

    in_session(work)


def test_the_memory_of_a_stream_is_bounded(cluster: shardkit.ShardCluster) -> None:
    wide = union_all(
        select(User.id, func.repeat(User.name, 4000)), select(User.id, func.repeat(User.name, 4001))
    )

    def peak(**options: Any) -> int:
        with cluster.sessionmaker()() as session:
            session.execute(wide.limit(1), execution_options=options).all()
            tracemalloc.start()
            count = sum(1 for _ in session.execute(wide, execution_options=options))
            _, highest = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        assert count == 2 * COUNT
        return highest

    assert peak(yield_per=10) * 4 < peak()
