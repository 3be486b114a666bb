"""A cluster of shards for tests: made by the commands' own functions, changed by the mover's own protocol.

`ShardedCluster.move` moves arcs the short way: rows are copied while the source is closed, in the transaction of the
decision. The fences, copies and versions are what a real move leaves behind.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from psycopg import sql
from sqlalchemy import BigInteger, ForeignKey
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

import shardkit
from shardkit.core.keyrange import POSITION_MAX, Arc, ArcSet
from shardkit.core.ring import position
from shardkit.core.topology import ShardedTable, Topology
from shardkit.storage import change, membership, predicate
from shardkit.storage.catalog import Catalog
from shardkit.storage.connections import Connection, ShardConnections


class Base(DeclarativeBase):
    pass


@shardkit.sharded(by="id")
class User(Base):
    __tablename__ = "users"

    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    name: Mapped[str]
    score: Mapped[int] = mapped_column(default=0)
    posts: Mapped[list[Post]] = relationship(
        back_populates="user", order_by="Post.id", cascade="all, delete-orphan"
    )


@shardkit.sharded(by="user_id")
class Post(Base):
    __tablename__ = "posts"

    user_id: Mapped[int] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"), primary_key=True)
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    caption: Mapped[str]
    user: Mapped[User] = relationship(back_populates="posts")


class ShardedCluster:
    """A catalog and shards in databases of the tests' servers, with an administrator's view of them."""

    def __init__(self, catalog_url: str, shard_urls: Iterable[str]) -> None:
        self.catalog_url = catalog_url
        self.patience = 20.0
        """Seconds for which a move waits for transactions."""
        self.shards = ShardConnections("shardkit tests")
        self._views = ShardConnections("shardkit tests")
        membership.initialise(catalog_url)
        with self.lease() as catalog:
            for number, url in enumerate(shard_urls):
                membership.join(catalog, self.shards, name=f"s{number}", url=url)
        self._split_evenly()
        with self.connect() as cluster:
            cluster.create_all(Base.metadata)

    def _split_evenly(self) -> None:
        ids = [shard.id for shard in self.topology.shards]
        step = 2**64 // len(ids)
        for number, shard_id in enumerate(ids[1:], start=1):
            last = POSITION_MAX if number == len(ids) - 1 else -(2**63) + step * (number + 1) - 1
            self.move(ArcSet([Arc(-(2**63) + step * number, last)]), ids[0], shard_id)

    def close(self) -> None:
        self.shards.__exit__()
        self._views.__exit__()

    def connect(self, **options: Any) -> shardkit.ShardCluster:
        """What an application does."""
        return shardkit.connect(self.catalog_url, **options)

    @contextmanager
    def lease(self) -> Iterator[Catalog]:
        """The catalog, as the mover has it."""
        with Catalog.open(self.catalog_url) as catalog:
            catalog.take_lease()
            yield catalog

    @property
    def topology(self) -> Topology:
        """What the catalog holds."""
        with Catalog.open(self.catalog_url) as catalog:
            current = catalog.current()
        assert current is not None
        return current

    # --- an administrator's view -----------------------------------------------------------------------------------

    def admin(self, name: str) -> Connection:
        """A connection in autocommit, outside the guard; never one of the mover's, who may be in another thread."""
        return self._views.get(self.topology.named(name))

    def query(self, name: str, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """Rows of a shard."""
        return self.admin(name).execute(statement, parameters).fetchall()

    def holding(self, statement: str, *parameters: Any) -> list[str]:
        """Names of the shards on which a query returns a row."""
        return [
            shard.name for shard in self.topology.shards if self.query(shard.name, statement, *parameters)
        ]

    def owner(self, key: Any) -> str:
        """Name of the shard that owns a key."""
        topology = self.topology
        return topology.by_id[topology.ring.owner(key)].name

    def keys(self, name: str, count: int, start: int = 1) -> list[int]:
        """Some integer keys that a shard owns."""
        topology = self.topology
        wanted = topology.named(name).id
        found: list[int] = []
        key = start
        while len(found) < count:
            if topology.ring.owner(key) == wanted:
                found.append(key)
            key += 1
        return found

    def truncate(self) -> None:
        """Empty every table on every shard."""
        for shard in self.topology.shards:
            self.shards.get(shard).execute("TRUNCATE public.users, public.posts")

    # --- moves -----------------------------------------------------------------------------------------------------

    def move_key(self, key: Any) -> str:
        """Move the rows of a key to the next shard; its name."""
        arcs, source, target = self.next_shard(key)
        self.move(arcs, source, target)
        return self.topology.by_id[target].name

    def next_shard(self, key: Any) -> tuple[ArcSet, int, int]:
        """The arcs of a key, the shard they are on and the one after it."""
        topology = self.topology
        ids = [shard.id for shard in topology.shards]
        source = topology.ring.owner(key)
        return ArcSet([Arc(position(key), position(key))]), source, ids[(ids.index(source) + 1) % len(ids)]

    def move(self, arcs: ArcSet, source: int, target: int, *, drain: bool = True) -> None:
        """All of a move, or the rest of one that was interrupted."""
        with self.lease() as catalog:
            if self.topology.owned(source).issuperset(arcs):
                self.mark(catalog, target, arcs)
                self.cut_over(catalog, source, target, arcs)
            if self.topology.by_id[source].in_transit.issuperset(arcs):
                self.purge(catalog, source, arcs)
            if drain:
                self.drain(catalog)

    def change(
        self, catalog: Catalog, make: Callable[[Topology | None, int], Topology], **hooks: Any
    ) -> None:
        """Bring a topology into force."""
        change.apply(catalog, self.shards, make, patience=self.patience, **hooks)

    def mark(self, catalog: Catalog, target: int, arcs: ArcSet) -> None:
        """The arcs are in transit on the target."""
        self.change(catalog, lambda before, version: _of(before).marked(version, target, arcs))

    def cut_over(self, catalog: Catalog, source: int, target: int, arcs: ArcSet, **hooks: Any) -> None:
        """Copy the rows while the source is closed, and decide."""

        def copy(connection: Connection) -> None:
            topology = self.topology
            to = self.shards.get(topology.by_id[target])
            for table in _parents_first(topology):
                relation, within = predicate.relation(table), predicate.within(table, arcs)
                to.execute(sql.SQL("DELETE FROM {} WHERE {}").format(relation, within))
                rows = connection.execute(
                    sql.SQL("SELECT * FROM {} WHERE {}").format(relation, within)
                ).fetchall()
                for row in rows:
                    values = sql.SQL(", ").join(sql.Placeholder() * len(row))
                    to.execute(sql.SQL("INSERT INTO {} VALUES ({})").format(relation, values), row)

        self.change(
            catalog,
            lambda before, version: _of(before).cut_over(version, source, target, arcs),
            while_closed=copy,
            **hooks,
        )

    def purge(self, catalog: Catalog, source: int, arcs: ArcSet) -> None:
        """Delete what the source does not own any more, and take the mark away."""
        topology = self.topology
        connection = self.shards.get(topology.by_id[source])
        for table in reversed(_parents_first(topology)):
            statement = sql.SQL("DELETE FROM {} WHERE {}")
            connection.execute(statement.format(predicate.relation(table), predicate.within(table, arcs)))
        self.change(catalog, lambda before, version: _of(before).unmarked(version, source, arcs))

    def drain(self, catalog: Catalog) -> None:
        """Wait for transactions under older topologies, and drop the old names."""
        change.drain(catalog, self.shards)


def _of(before: Topology | None) -> Topology:
    assert before is not None
    return before


def _parents_first(topology: Topology) -> list[ShardedTable]:
    """The tables that tests fill before they move keys."""
    return [table for name in ("users", "posts") for table in topology.tables if table.name == name]


def until(condition: Callable[[], Any], what: str, seconds: float = 20.0) -> Any:
    """The first true value of ``condition``; fails when it does not come."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.005)
    return found


def affected(result: Any) -> int:
    """The number of rows that a statement wrote; SQLAlchemy's types do not know it."""
    return int(result.rowcount)
