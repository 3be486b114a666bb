"""Reference tables stay the same on all shards: with several writers at work, and while a shard joins."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest
from sqlalchemy import create_engine, delete, insert, select, update
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

import shardkit
from shardkit.core.errors import MoveWaiting
from shardkit.storage import membership
from shardkit.storage.urls import sqlalchemy_url
from tests.fix_postgres import FreshDatabase
from tests.sharded import Base as ShardedBase
from tests.sharded import ShardedCluster, until


class Base(DeclarativeBase):
    pass


@shardkit.reference
class Rate(Base):
    __tablename__ = "rate"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    writer: Mapped[int]
    n: Mapped[int] = mapped_column(default=0)


RATES = "SELECT id, writer, n FROM public.rate ORDER BY id"


class Writer(threading.Thread):
    """Inserts rows of its own, deletes some, and counts up all rows of everybody: what it hits depends on the order in
    which writers come."""

    def __init__(self, cluster: shardkit.ShardCluster, number: int) -> None:
        super().__init__(name=f"writer {number}")
        self._Session = cluster.sessionmaker(mode="best_effort")
        self._random = random.Random(number)
        self.number = number
        self.done = 0
        self.present: set[int] = set()
        self.errors: list[BaseException] = []
        self.ending = threading.Event()

    def run(self) -> None:
        try:
            while not self.ending.is_set():
                self._work()
                self.done += 1
        except BaseException as error:
            self.errors.append(error)

    def _work(self) -> None:
        new = self.number * 1_000_000 + self.done
        gone = self._random.choice(sorted(self.present)) if len(self.present) > 20 else None
        with self._Session() as session:
            if self._random.random() < 0.3:
                session.scalars(select(Rate).limit(1)).all()  # opens one shard, not always the first
            session.execute(update(Rate).values(n=Rate.n + 1))
            if self._random.random() < 0.5:
                session.add(Rate(id=new, writer=self.number))
            else:
                session.execute(insert(Rate), [{"id": new, "writer": self.number}])
            session.flush()
            if gone is not None:
                session.execute(delete(Rate).where(Rate.id == gone))
            session.commit()
        self.present.add(new)
        self.present.discard(gone or -1)


@pytest.fixture
def two(fresh_database: FreshDatabase) -> Any:
    cluster = ShardedCluster(fresh_database(0), [fresh_database(0), fresh_database(1)])
    with cluster.connect() as connected:
        connected.create_all(Base.metadata)
    yield cluster
    cluster.close()


def newcomer(url: str) -> str:
    """A database with the tables, empty."""
    engine = create_engine(sqlalchemy_url(url))
    for base in (ShardedBase, Base):
        base.metadata.create_all(engine)
    engine.dispose()
    return url


def join(cluster: ShardedCluster, url: str, **options: Any) -> None:
    with cluster.lease() as catalog:
        membership.join(catalog, cluster.shards, name="s2", url=url, **options)


def same_everywhere(cluster: ShardedCluster) -> list[tuple[Any, ...]]:
    first, *others = (cluster.query(shard.name, RATES) for shard in cluster.topology.shards)
    assert others
    for other in others:
        assert other == first
    return first


def test_a_shard_joins_under_writers(two: ShardedCluster, fresh_database: FreshDatabase) -> None:
    url = newcomer(fresh_database(1))
    # Two of one process and one of another: a router of its own, which learns of the shard by itself.
    with two.connect() as one, two.connect() as other:
        writers = [Writer(one, 1), Writer(one, 2), Writer(other, 3)]
        for writer in writers:
            writer.start()
        try:
            until(lambda: all(w.done > 10 or w.errors for w in writers), "writers at work")
            join(two, url)
            before = [writer.done for writer in writers]
            until(
                lambda: all(w.done > n + 10 or w.errors for w, n in zip(writers, before, strict=True)),
                "writers at work on three shards",
            )
        finally:
            for writer in writers:
                writer.ending.set()
            for writer in writers:
                writer.join()
    assert [writer.errors for writer in writers] == [[], [], []]
    found = same_everywhere(two)
    assert len(two.topology.shards) == 3
    assert {row[0] for row in found} == set().union(*(writer.present for writer in writers))


def test_a_writer_that_began_before_the_join_holds_it_up(
    two: ShardedCluster, fresh_database: FreshDatabase
) -> None:
    url = newcomer(fresh_database(1))
    with two.connect() as cluster, cluster.sessionmaker(mode="best_effort")() as session:
        session.add_all([Rate(id=1, writer=0), Rate(id=2, writer=0)])
        session.commit()
        session.execute(delete(Rate).where(Rate.id == 2))
        session.execute(insert(Rate).values(id=3, writer=0))
        with pytest.raises(MoveWaiting, match="fence of shard s0"):
            join(two, url, patience=0.3)
        assert len(two.topology.shards) == 2
        session.commit()
    join(two, url)  # what was copied at the first try is brought up to date
    assert same_everywhere(two) == [(1, 0, 0), (3, 0, 0)]
    assert len(two.topology.shards) == 3


def test_a_transaction_that_began_before_the_join_writes_the_newcomer_too(
    two: ShardedCluster, fresh_database: FreshDatabase
) -> None:
    url = newcomer(fresh_database(1))
    with two.connect() as cluster, cluster.sessionmaker(mode="best_effort")() as session:
        # Open on the shard that does not close, under the topology of two shards.
        session.connection(shard="s1").execute(select(Rate)).all()
        joining = threading.Thread(target=join, args=(two, url))
        joining.start()
        until(lambda: len(two.topology.shards) == 3, "the join")
        session.add(Rate(id=7, writer=0))
        session.commit()
        joining.join(30)  # it has waited for this transaction to drop the older fence
        assert not joining.is_alive()
    assert same_everywhere(two) == [(7, 0, 0)]
