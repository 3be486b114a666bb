"""The guard costs no round trip: as many messages to the server as a plain session sends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, insert, select, update
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

import shardkit
from shardkit.storage.urls import sqlalchemy_url
from tests.sharded import Post, ShardedCluster, User
from tests.wire import counting

Work = Callable[[Any, int], Any]


def get(session: Any, key: int) -> None:
    assert session.get(User, key).name == "before"


def select_by_key(session: Any, key: int) -> None:
    assert session.scalars(select(User.name).where(User.id == key)).all() == ["before"]
    session.commit()


def insert_one(session: Any, key: int) -> None:
    session.add(Post(user_id=key, id=1, caption="new"))
    session.commit()


def insert_many(session: Any, key: int) -> None:
    session.add_all(Post(user_id=key, id=number, caption="new") for number in range(100))
    session.commit()


def bulk(session: Any, key: int) -> None:
    session.execute(
        insert(Post), [{"user_id": key, "id": number, "caption": "bulk"} for number in range(100)]
    )
    session.commit()


def change(session: Any, key: int) -> None:
    session.get(User, key).name = "after"
    session.commit()


def change_by_statement(session: Any, key: int) -> None:
    session.execute(update(User).where(User.id == key).values(name="after"))
    session.commit()


def delete(session: Any, key: int) -> None:
    session.delete(session.get(User, key))
    session.commit()


def savepoint(session: Any, key: int) -> None:
    with session.begin_nested():
        session.add(Post(user_id=key, id=1, caption="new"))
    with session.begin_nested() as nested:
        session.execute(update(User).where(User.id == key).values(name="after"))
        nested.rollback()
    session.commit()


def roll_back(session: Any, key: int) -> None:
    session.add(Post(user_id=key, id=1, caption="new"))
    session.flush()
    session.rollback()


def lazy_load(session: Any, key: int) -> None:
    assert session.get(User, key).posts == []
    session.commit()


def stream(session: Any, key: int) -> None:
    statement = select(User.name).where(User.id == key).execution_options(yield_per=10)
    assert session.scalars(statement).all() == ["before"]
    session.commit()


WORKS = [get, select_by_key, insert_one, insert_many, bulk, change, change_by_statement, delete, savepoint,
         roll_back, lazy_load, stream]  # fmt: skip
ISOLATIONS = [None, "REPEATABLE READ", "SERIALIZABLE"]


def _prepare(sharded: ShardedCluster) -> int:
    (key,) = sharded.keys("s0", 1)
    admin = sharded.admin("s0")
    admin.execute("DELETE FROM public.users")
    admin.execute("INSERT INTO public.users (id, name, score) VALUES (%s, 'before', 0)", (key,))
    return key


def _trips(sharded: ShardedCluster, engine: Engine, make: Callable[[], Any], work: Work) -> int:
    # The second time counts: the first connects, compiles and asks the server what it is.
    for _ in range(2):
        key = _prepare(sharded)
        fairy = engine.raw_connection()
        raw = fairy.driver_connection
        fairy.close()
        with counting(raw) as trips:
            with make() as session:
                work(session, key)
            counted = trips()
    return counted


@pytest.mark.parametrize("isolation", ISOLATIONS)
@pytest.mark.parametrize("work", WORKS, ids=lambda work: work.__name__)
def test_a_session_makes_as_many_round_trips_as_a_plain_one(
    sharded: ShardedCluster, work: Work, isolation: str | None
) -> None:
    options: dict[str, Any] = {"isolation_level": isolation} if isolation else {}
    shard = sharded.topology.named("s0")
    plain = create_engine(sqlalchemy_url(shard.url), pool_size=1, **options)
    try:
        expected = _trips(sharded, plain, sessionmaker(plain), work)
    finally:
        plain.dispose()
    with sharded.connect(pool_size=1, **options) as cluster:
        counted = _trips(sharded, cluster.engines.shard(shard), cluster.sessionmaker(), work)
    assert counted <= expected
    assert expected > 1


async def _async_trips(
    sharded: ShardedCluster, engine: Engine, make: Callable[[], AsyncSession], work: Work
) -> int:
    for _ in range(2):
        key = _prepare(sharded)
        async with make() as session:
            raw = await session.run_sync(lambda _: _driver_connection(engine))
            with counting(raw) as trips:
                await session.run_sync(work, key)
                await session.close()
                counted = trips()
    return counted


def _driver_connection(engine: Engine) -> Any:
    fairy = engine.raw_connection()
    raw = fairy.driver_connection
    fairy.close()
    return raw


@pytest.mark.parametrize("work", WORKS, ids=lambda work: work.__name__)
async def test_an_async_session_too(
    sharded: ShardedCluster, async_cluster: shardkit.ShardCluster, work: Work
) -> None:
    shard = sharded.topology.named("s0")
    plain = create_async_engine(sqlalchemy_url(shard.url), pool_size=1)
    try:
        expected = await _async_trips(sharded, plain.sync_engine, lambda: AsyncSession(plain), work)
    finally:
        await plain.dispose()
    engine = async_cluster.async_engines.shard(shard)
    counted = await _async_trips(sharded, engine, async_cluster.async_sessionmaker(), work)
    assert counted <= expected


def test_the_count_sees_a_round_trip_more(sharded: ShardedCluster) -> None:
    shard = sharded.topology.named("s0")
    plain = create_engine(sqlalchemy_url(shard.url), pool_size=1)

    def twice(session: Session, key: int) -> None:
        get(session, key)
        session.expire_all()
        get(session, key)

    try:
        make = sessionmaker(plain)
        assert _trips(sharded, plain, make, twice) == _trips(sharded, plain, make, get) + 1
    finally:
        plain.dispose()
