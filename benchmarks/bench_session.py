"""The session against SQLAlchemy's own on one plain database: what routing and the fence cost."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import NamedTuple

import pytest
import sqlalchemy
from sqlalchemy import create_engine, func, select
from sqlalchemy.orm import Session, sessionmaker

from shardkit import ShardSession
from shardkit.dev import Clusters
from shardkit.storage.urls import sqlalchemy_url
from tests.sharded import Base, Post, ShardedCluster, User

from .conftest import Peer, Run, Versus

USERS = 200
POSTS = 10

Maker = sessionmaker[Session] | sessionmaker[ShardSession]


class Sides(NamedTuple):
    """Sessions over the same users and posts: on two shards, and on one plain database of the same server."""

    sharded: sessionmaker[ShardSession]
    plain: sessionmaker[Session]


@pytest.fixture(scope="module")
def sides(servers: Clusters) -> Iterator[Sides]:
    urls = [servers[0].create_database(f"bench_{name}") for name in ("catalog", "s0", "s1", "plain")]
    sharded = ShardedCluster(urls[0], urls[1:3])
    engine = create_engine(sqlalchemy_url(urls[3]))
    Base.metadata.create_all(engine)
    cluster = sharded.connect()
    found = Sides(cluster.sessionmaker(), sessionmaker(engine))
    for make in found:
        for user_id in range(USERS):
            with make.begin() as session:
                session.add(User(id=user_id, name=f"user {user_id}"))
                session.add_all(
                    Post(user_id=user_id, id=number, caption="caption") for number in range(POSTS)
                )
    yield found
    engine.dispose()
    cluster.dispose()
    sharded.close()


_ids = count(1_000_000)


def _get(make: Maker) -> Run:
    ids = count()

    def work() -> None:
        with make() as session:
            assert session.get(User, next(ids) % USERS) is not None

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


def _count(make: Maker) -> Run:
    def work() -> None:
        with make() as session:
            assert session.scalar(select(func.count()).select_from(Post)) == USERS * POSTS

    return work


WORK = {
    "session.get": _get,
    "the last 5 posts of a user": _feed,
    "insert and commit": _insert,
    "get, update and commit": _update,
    "count over both shards": _count,
}


@pytest.mark.parametrize("what", WORK)
def test_session(versus: Versus, sides: Sides, what: str) -> None:
    work = WORK[what]
    versus(what, work(sides.sharded), {"plain SQLAlchemy": Peer(sqlalchemy.__version__, work(sides.plain))})
