"""The session against SQLAlchemy's own on one plain database, and against its horizontal sharding on the same shards:
what routing and the fence cost.

Everybody does the same work on the same rows of the same server. Objects of one user are on one shard.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing
from itertools import count
from typing import Any, NamedTuple

import psycopg
import pytest
import sqlalchemy
from sqlalchemy import Engine, create_engine, delete, func, insert, select
from sqlalchemy.ext.asyncio import async_sessionmaker as plain_async_sessionmaker
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import sessionmaker

from shardkit.dev import Clusters
from shardkit.storage.urls import sqlalchemy_url
from tests.sharded import Base, Post, ShardedCluster, User
from tests.wire import counting

from . import plainsharding
from .conftest import Peer, Run, Versus, each

USERS = 200
POSTS = 10
MANY = 10_000

CALLS = 20
"""Over so many calls round trips are counted."""
STATEMENTS = 1000

Maker = sessionmaker[Any]
OURS, PLAIN, HORIZONTAL = "shardkit", "plain SQLAlchemy", "horizontal_shard"


class Sides(NamedTuple):
    """Sessions over the same users and posts: shardkit's on two shards, one plain database of the same server, and
    horizontal sharding on those two shards."""

    sharded: Maker
    plain: Maker
    horizontal: Maker
    sharded_async: Callable[[], Any]
    plain_async: Callable[[], Any]
    engines: Mapping[str, Iterable[Engine]]
    """Those of each, for the sync sessions."""


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.Runner]:
    """What runs the work of asyncio."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def sides(servers: Clusters, loop: asyncio.Runner) -> Iterator[Sides]:
    urls = [servers[0].create_database(f"bench_{name}") for name in ("catalog", "s0", "s1", "plain")]
    sharded = ShardedCluster(urls[0], urls[1:3])
    plain = create_engine(sqlalchemy_url(urls[3]))
    plain_async = create_async_engine(sqlalchemy_url(urls[3]))
    Base.metadata.create_all(plain)
    cluster = sharded.connect()
    topology = cluster.topology
    engines = {shard.id: create_engine(sqlalchemy_url(shard.url)) for shard in topology.shards}
    found = Sides(
        cluster.sessionmaker(),
        sessionmaker(plain),
        plainsharding.maker(engines, topology.ring),
        cluster.async_sessionmaker(),
        plain_async_sessionmaker(plain_async),
        {
            OURS: [cluster.engines.shard(shard) for shard in topology.shards],
            PLAIN: [plain],
            HORIZONTAL: list(engines.values()),
        },
    )
    for make in (found.sharded, found.plain):
        for user_id in range(USERS):
            with make.begin() as session:
                session.add(User(id=user_id, name=f"user {user_id}"))
                session.add_all(
                    Post(user_id=user_id, id=number, caption="caption") for number in range(POSTS)
                )
    yield found
    for engine in (plain, *engines.values()):
        engine.dispose()
    loop.run(plain_async.dispose())
    loop.run(cluster.adispose())
    cluster.dispose()
    sharded.close()


_ids = count(1_000_000)


def _get(make: Maker) -> Run:
    ids = count()

    def work() -> None:
        with make() as session:
            assert session.get(User, next(ids) % USERS) is not None

    return work


def _known(make: Maker) -> Run:
    session = make()
    users = session.scalars(select(User).where(User.id == 7)).all()

    def work() -> None:
        for _ in range(100):
            assert session.get(User, 7) is users[0]

    return work


def _feed(make: Maker) -> Run:
    ids = count()

    def work() -> None:
        with make() as session:
            statement = (
                select(Post).where(Post.user_id == next(ids) % USERS).order_by(Post.id.desc()).limit(5)
            )
            assert len(session.scalars(statement).all()) == 5

    return work


def _lazy(make: Maker) -> Run:
    ids = count()

    def work() -> None:
        with make() as session:
            assert len(session.get_one(User, next(ids) % USERS).posts) == POSTS

    return work


def _insert(make: Maker) -> Run:
    def work() -> None:
        with make.begin() as session:
            session.add(User(id=next(_ids), name="new"))

    return work


def _update(make: Maker) -> Run:
    ids = count()

    def work() -> None:
        with make.begin() as session:
            session.get_one(User, next(ids) % USERS).score += 1

    return work


def _many(make: Maker) -> Run:
    rows = [{"user_id": 7, "id": 1_000 + number, "caption": "caption"} for number in range(MANY)]

    def work() -> None:
        with make() as session:  # rolled back
            session.execute(insert(Post), rows)
            session.execute(delete(Post).where(Post.user_id == 7, Post.id < 0))

    return work


def _count(make: Maker) -> Run:
    def work() -> None:
        with make() as session:
            assert session.scalar(select(func.count()).select_from(Post)) == USERS * POSTS

    return work


WORK = {
    "session.get": _get,
    "the last 5 posts of a user": _feed,
    "a user and its posts, loaded lazily": _lazy,
    "insert and commit": _insert,
    "get, update and commit": _update,
}
PLAIN_ONLY = {"10,000 rows in one INSERT": _many, "count over both shards": _count}
"""What horizontal sharding does not do: it has one shard for all rows, and adds no counts up."""


def _trips(engines: Iterable[Engine], work: Run) -> float:
    """How often a call of the work waits for a server."""
    with ExitStack() as stack:
        counts = []
        for engine in engines:
            fairy = engine.raw_connection()
            raw = fairy.driver_connection
            fairy.close()
            counts.append(stack.enter_context(counting(raw)))
        for _ in range(CALLS):
            work()
        return sum(each() for each in counts) / CALLS


@pytest.mark.parametrize("what", WORK)
def test_one_shard(benchmark: Any, versus: Versus, sides: Sides, what: str) -> None:
    work = WORK[what]
    works = {OURS: work(sides.sharded), PLAIN: work(sides.plain), HORIZONTAL: work(sides.horizontal)}
    others = {who: Peer(sqlalchemy.__version__, works[who]) for who in (PLAIN, HORIZONTAL)}
    versus(what, works[OURS], others)
    benchmark.extra_info["trips"] = {who: _trips(sides.engines[who], one) for who, one in works.items()}


@pytest.mark.parametrize("what", PLAIN_ONLY)
def test_beside_plain(versus: Versus, sides: Sides, what: str) -> None:
    work = PLAIN_ONLY[what]
    versus(what, work(sides.sharded), {PLAIN: Peer(sqlalchemy.__version__, work(sides.plain))})


def test_known_object(versus: Versus, sides: Sides) -> None:
    others = {PLAIN: Peer(sqlalchemy.__version__, _known(sides.plain))}
    others[HORIZONTAL] = Peer(sqlalchemy.__version__, _known(sides.horizontal))
    versus("session.get of an object that is known", _known(sides.sharded), others, times=100)


def test_begin(versus: Versus, sides: Sides) -> None:
    """What the fence costs, beside a transaction without one: the messages themselves, and the server's answer."""
    shard = sides.sharded.kw["cluster"].topology.shards[0]
    fence = f'BEGIN; LOCK TABLE shardkit."{shard.fence.relation}" IN ACCESS SHARE MODE'.encode()
    with closing(psycopg.connect(shard.url)) as connection:

        def begin(message: bytes) -> None:
            connection.pgconn.exec_(message)
            connection.pgconn.exec_(b"ROLLBACK")

        others = {"BEGIN, ROLLBACK": Peer(psycopg.__version__, lambda: begin(b"BEGIN"))}
        versus("BEGIN with LOCK of the fence, ROLLBACK", lambda: begin(fence), others)


@pytest.mark.benchmark(timer=time.thread_time)
def test_route(versus: Versus, sides: Sides) -> None:
    """What routing adds to a statement whose shape is known, in CPU time. That of the statement's cache key is
    SQLAlchemy's own, and spent already."""
    cluster = sides.sharded.kw["cluster"]
    dialect, planner, topology = cluster.dialect, cluster.planner, cluster.topology
    compiled: dict[Any, Any] = {}
    statements: list[Any] = [select(User).where(User.id == number) for number in range(STATEMENTS)]
    for statement in statements:
        statement._generate_cache_key()

    def compile_(statement: Any) -> None:
        statement._compile_w_cache(dialect, compiled_cache=compiled, column_keys=[])

    others = {"its SQL, from SQLAlchemy's cache": Peer(sqlalchemy.__version__, each(compile_, statements))}
    run = each(lambda statement: planner.plan(statement).route(topology), statements)
    versus("the route of a select by key", run, others, times=STATEMENTS)


# --- asyncio ---------------------------------------------------------------------------------------------------------


def _get_async(make: Callable[[], Any]) -> Callable[[], Awaitable[None]]:
    ids = count()

    async def work() -> None:
        async with make() as session:
            assert await session.get(User, next(ids) % USERS) is not None

    return work


def _insert_async(make: Callable[[], Any]) -> Callable[[], Awaitable[None]]:
    async def work() -> None:
        async with make() as session, session.begin():
            session.add(User(id=next(_ids), name="new"))

    return work


@pytest.mark.parametrize(("what", "work"), [("get", _get_async), ("insert and commit", _insert_async)])
def test_asyncio(versus: Versus, sides: Sides, loop: asyncio.Runner, what: str, work: Any) -> None:
    sharded, plain = work(sides.sharded_async), work(sides.plain_async)
    others = {PLAIN: Peer(sqlalchemy.__version__, lambda: loop.run(plain()))}
    versus(f"{what}, asyncio", lambda: loop.run(sharded()), others)
