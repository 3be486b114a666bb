"""The session against SQLAlchemy's own on one plain database: what routing and the fence cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count

import pytest
import sqlalchemy
from sqlalchemy import create_engine, func, select
from sqlalchemy.orm import Session, sessionmaker

import shardkit
from shardkit.dev import Clusters
from shardkit.storage.urls import sqlalchemy_url
from tests.sharded import Base, Post, ShardedCluster, User

from .conftest import Versus

USERS = 200
POSTS = 10

Work = Callable[[], object]


@pytest.fixture(scope="module")
def sessions(servers: Clusters) -> Iterator[dict[str, tuple[str, sessionmaker[Session]]]]:
    """A factory of sessions each over the same users and posts, with its version; all on one server."""
    urls = [servers[0].create_database(f"bench_{name}") for name in ("catalog", "s0", "s1", "plain")]
    sharded = ShardedCluster(urls[0], urls[1:3])
    engine = create_engine(sqlalchemy_url(urls[3]))
    Base.metadata.create_all(engine)
    cluster = sharded.connect()
    found: dict[str, tuple[str, sessionmaker[Session]]] = {
        "shardkit": (shardkit.__version__, cluster.sessionmaker()),  # type: ignore[dict-item]  # a subclass
        "plain SQLAlchemy": (sqlalchemy.__version__, sessionmaker(engine)),
    }
    for _, make in found.values():
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


def _get(make: sessionmaker[Session]) -> Work:
    ids = count()

    def work() -> None:
        with make() as session:
            assert session.get(User, next(ids) % USERS) is not None

    return work


def _feed(make: sessionmaker[Session]) -> Work:
    ids = count()

    def work() -> None:
        with make() as session:
            statement = (
                select(Post).where(Post.user_id == next(ids) % USERS).order_by(Post.id.desc()).limit(5)
            )
            assert len(session.scalars(statement).all()) == 5

    return work


def _insert(make: sessionmaker[Session]) -> Work:
    def work() -> None:
        with make.begin() as session:
            session.add(User(id=next(_ids), name="new"))

    return work


def _update(make: sessionmaker[Session]) -> Work:
    ids = count()

    def work() -> None:
        with make.begin() as session:
            session.get_one(User, next(ids) % USERS).score += 1

    return work


def _count(make: sessionmaker[Session]) -> Work:
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
@pytest.mark.parametrize("who", ["shardkit", "plain SQLAlchemy"])
def test_session(
    versus: Versus, sessions: dict[str, tuple[str, sessionmaker[Session]]], what: str, who: str
) -> None:
    version, make = sessions[who]
    versus(what, who, version, WORK[what](make))
