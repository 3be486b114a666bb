"""Reads by values that are no shard keys: what one database returns or raises for them, shards do too."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import create_engine, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

import shardkit
from shardkit.storage.urls import sqlalchemy_url
from tests.fix_postgres import FreshDatabase
from tests.sharded import Base, ShardedCluster, User

KEYS = range(1, 12)
ODD = [
    5.7, 5.0, -0.4, float("nan"), float("inf"), "5", " 5", "5.7", "", "five", True, False, Decimal("5.4"), Decimal(5),
    2**63 - 1, 2**63, 2**70, -(2**70), b"5", uuid.UUID(int=5), [5],
]  # fmt: skip


@pytest.fixture
def plain(fresh_database: FreshDatabase) -> Iterator[Session]:
    """One database with the users that the shards have."""
    engine = create_engine(sqlalchemy_url(fresh_database()))
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        session.add_all(User(id=key, name=f"user {key}") for key in KEYS)
        session.commit()
        yield session
    engine.dispose()


@pytest.fixture
def users(cluster: shardkit.ShardCluster) -> None:
    for key in KEYS:
        with cluster.sessionmaker().begin() as session:
            session.add(User(id=key, name=f"user {key}"))


def got(session: Session, key: Any) -> Any:
    """The user's id, or None, by `get`; or the error of the server or the driver."""
    try:
        user = session.get(User, key)
        return user and user.id
    except (DBAPIError, TypeError) as error:
        return type(error)
    finally:
        session.rollback()
        session.expunge_all()


def selected(session: Session, key: Any) -> Any:
    try:
        return session.scalars(select(User.id).where(User.id == key)).all()
    except (DBAPIError, TypeError) as error:
        return type(error)
    finally:
        session.rollback()


@pytest.mark.usefixtures("users")
@pytest.mark.parametrize("key", ODD, ids=repr)
def test_a_value_that_is_no_key_reads_what_one_database_reads(
    plain: Session, cluster: shardkit.ShardCluster, sharded: ShardedCluster, key: Any
) -> None:
    with cluster.sessionmaker()() as session:
        assert got(session, key) == got(plain, key)
        assert selected(session, key) == selected(plain, key)
