"""Bulk operations through a session over guarded shards: rows end where their keys live, results come as from one."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.dialects.postgresql import insert as upsert

import shardkit
from shardkit.core.errors import CrossShardWrite, KeyTypeError, UnroutableQuery
from tests.sharded import Post, ShardedCluster, User

KEYS = list(range(30))


def placed(sharded: ShardedCluster) -> dict[str, list[int]]:
    """The ids of users that each shard holds."""
    return {
        shard.name: [row[0] for row in sharded.query(shard.name, "SELECT id FROM public.users ORDER BY 1")]
        for shard in sharded.topology.shards
    }


def expected(sharded: ShardedCluster, keys: list[int]) -> dict[str, list[int]]:
    topology = sharded.topology
    return {
        shard.name: sorted(key for key in keys if topology.ring.owner(key) == shard.id)
        for shard in topology.shards
    }


@pytest.mark.parametrize("how", ["orm", "core", "values", "orm values", "single rows"])
def test_inserted_rows_are_where_their_keys_live(
    sharded: ShardedCluster, cluster: shardkit.ShardCluster, how: str
) -> None:
    rows = [{"id": key, "name": f"u{key}", "score": key} for key in reversed(KEYS)]
    table = User.metadata.tables["users"]
    with cluster.sessionmaker(mode="best_effort")() as session:
        if how == "orm":
            session.execute(insert(User), rows)
        elif how == "core":
            session.execute(table.insert(), rows)
        elif how == "values":
            session.execute(table.insert().values(rows))
        elif how == "orm values":
            session.execute(insert(User).values(rows))
        else:
            for row in rows:
                session.execute(insert(User).values(**row))
        session.commit()
    assert placed(sharded) == expected(sharded, KEYS)


def test_returned_entities_come_in_the_order_of_the_rows(
    sharded: ShardedCluster, cluster: shardkit.ShardCluster
) -> None:
    rows = [{"id": key, "name": f"u{key}"} for key in reversed(KEYS)]
    with cluster.sessionmaker(mode="best_effort")() as session:
        statement = insert(User).returning(User, sort_by_parameter_order=True)
        users = session.scalars(statement, rows).all()
        assert [user.id for user in users] == list(reversed(KEYS))
        assert all(user in session and user.score == 0 for user in users)
        more = [{"id": key + 100, "name": "more"} for key in KEYS]
        assert session.scalars(insert(User).values(more).returning(User.id)).all() == [
            key + 100 for key in KEYS
        ]
        session.rollback()


def test_bulk_updates_and_upserts_reach_their_rows(
    sharded: ShardedCluster, cluster: shardkit.ShardCluster
) -> None:
    with cluster.sessionmaker(mode="best_effort")() as session:
        session.execute(insert(User), [{"id": key, "name": "old"} for key in KEYS])
        session.execute(update(User), [{"id": key, "name": "new"} for key in KEYS[:20]])
        made = upsert(User)
        made = made.on_conflict_do_update(index_elements=["id"], set_={"score": made.excluded.score + 1})
        session.execute(
            made, [{"id": key, "name": "upserted", "score": key} for key in [*KEYS[10:], 100, 101]]
        )
        result: Any = session.execute(delete(User).where(User.id.in_(KEYS[25:])))
        assert result.rowcount == 5
        session.commit()
        found = {user.id: (user.name, user.score) for user in session.scalars(select(User))}
    assert found == {
        **dict.fromkeys(KEYS[:10], ("new", 0)),
        **{key: ("new", key + 1) for key in KEYS[10:20]},
        **{key: ("old", key + 1) for key in KEYS[20:25]},
        100: ("upserted", 100),
        101: ("upserted", 101),
    }
    assert placed(sharded) == expected(sharded, list(found))


def test_a_session_of_one_shard_refuses_rows_of_another_before_it_writes(
    sharded: ShardedCluster, cluster: shardkit.ShardCluster
) -> None:
    keys = [sharded.keys(name, 1)[0] for name in ("s0", "s1")]
    with cluster.sessionmaker()() as session:
        with pytest.raises(CrossShardWrite):
            session.execute(insert(User), [{"id": key, "name": "x"} for key in keys])
        session.rollback()
        with pytest.raises(KeyTypeError):
            session.execute(insert(User), [{"id": "5", "name": "x"}])
        session.rollback()
        with pytest.raises(UnroutableQuery):
            session.execute(update(User).where(User.id == 5).values(id=6))
        session.rollback()
    assert not any(placed(sharded).values())


def test_reads_after_the_writes_see_them(sharded: ShardedCluster, cluster: shardkit.ShardCluster) -> None:
    with cluster.sessionmaker(mode="best_effort")() as session:
        session.add_all(
            [User(id=key, name="x", posts=[Post(id=n, caption="c") for n in range(key % 3)]) for key in KEYS]
        )
        assert session.scalar(select(func.count()).select_from(Post)) == sum(key % 3 for key in KEYS)
        assert len(session.execute(select(User, Post).join(User.posts)).all()) == sum(key % 3 for key in KEYS)
        session.rollback()
        assert session.scalar(select(func.count()).select_from(Post)) == 0
