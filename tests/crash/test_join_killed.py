"""A join killed with SIGKILL at named points, reference rows on their way: run again, it ends as if nothing was."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from sqlalchemy import create_engine, delete, func, insert, select, update
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

import shardkit
from shardkit.storage import change, membership
from shardkit.storage.urls import sqlalchemy_url
from tests.fix_postgres import FreshDatabase
from tests.movers import run_forked
from tests.sharded import Base as ShardedBase
from tests.sharded import ShardedCluster


class Base(DeclarativeBase):
    pass


@shardkit.reference
class Parent(Base):
    __tablename__ = "Parent"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    text: Mapped[str | None]


USUAL = ["join.copied_first", "join.copied", "change.decided", "change.opened:1"]
REST = ["join.claimed", "change.proposed", "change.opened:2", "change.recorded"]


@pytest.fixture
def two(fresh_database: FreshDatabase) -> Iterator[ShardedCluster]:
    cluster = ShardedCluster(fresh_database(0), [fresh_database(0), fresh_database(1)])
    with cluster.connect() as connected:
        connected.create_all(Base.metadata)
        with connected.sessionmaker(mode="best_effort")() as session:
            session.execute(insert(Parent), [{"id": n, "text": "ü\t\n\\N" * n} for n in range(200)])
            session.execute(update(Parent).where(Parent.id == 3).values(text=None))
            session.commit()
    yield cluster
    cluster.close()


def killed(catalog_url: str, url: str, point: str) -> int:
    return run_forked("command", catalog_url, point, arguments=["shard", "add", "s2", url, "--no-run"])


@pytest.mark.parametrize("point", USUAL)
def test_a_join_killed_at(two: ShardedCluster, fresh_database: FreshDatabase, point: str) -> None:
    killed_then_run_again(two, fresh_database, point)


@pytest.mark.slow
@pytest.mark.parametrize("point", REST)
def test_a_join_killed_at_every_other_point(
    two: ShardedCluster, fresh_database: FreshDatabase, point: str
) -> None:
    killed_then_run_again(two, fresh_database, point)


def killed_then_run_again(two: ShardedCluster, fresh_database: FreshDatabase, point: str) -> None:
    url = fresh_database(1)
    engine = create_engine(sqlalchemy_url(url))
    for base in (ShardedBase, Base):
        base.metadata.create_all(engine)
    engine.dispose()
    assert killed(two.catalog_url, url, point) == -signal.SIGKILL, f"the join never passed {point}"
    with two.lease() as catalog:
        change.settle(catalog, two.shards)
    # Applications go on between the two tries.
    with two.connect() as cluster, cluster.sessionmaker(mode="best_effort")() as session:
        session.execute(delete(Parent).where(Parent.id < 50))
        session.execute(insert(Parent), [{"id": n} for n in range(300, 320)])
        session.commit()
    with two.lease() as catalog:
        membership.join(catalog, two.shards, name="s2", url=url)
    assert len(two.topology.shards) == 3
    rows = [two.query(name, 'SELECT * FROM public."Parent" ORDER BY id') for name in ("s0", "s1", "s2")]
    assert rows[0] == rows[1] == rows[2]
    assert len(rows[0]) == 170
    with two.connect() as cluster, cluster.sessionmaker()() as session:
        assert session.scalar(select(func.count()).select_from(Parent)) == 170
    with two.lease() as catalog:
        assert catalog.proposed() is None


def test_user_rows_on_a_newcomer_are_not_taken_for_copied_ones(
    two: ShardedCluster, fresh_database: FreshDatabase
) -> None:
    url = fresh_database(1)
    engine = create_engine(sqlalchemy_url(url))
    for base in (ShardedBase, Base):
        base.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(insert(Parent.__table__).values(id=1))  # type: ignore[arg-type]
    engine.dispose()
    with two.lease() as catalog, pytest.raises(shardkit.errors.ShardNotEmpty, match="has rows already"):
        membership.join(catalog, two.shards, name="s2", url=url)
