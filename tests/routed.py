"""Databases with the rows of one plain database spread over them, and sessions that route statements to them.

What the planner promises is tested here without fences and moves: a `Fleet` has plain engines and a topology of its own
choice, and shards that hold rows in transit hold stale copies of them, so that every row that is read from the wrong
place shows.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from sqlalchemy import (
    URL,
    BigInteger,
    Connection,
    Engine,
    ForeignKey,
    ForeignKeyConstraint,
    MetaData,
    String,
    Table,
    create_engine,
)
from sqlalchemy.dialects import registry
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

from shardkit.core.keyrange import ArcSet, slot_arc
from shardkit.core.ring import position
from shardkit.core.topology import Topology
from shardkit.orm.declare import key_column, sharded, sharded_tables
from shardkit.orm.dispatch import Finishing
from shardkit.orm.planning.clock import ask, telling
from shardkit.orm.planning.freezing import frozen
from shardkit.orm.planning.plan import Plan, ShardPart
from shardkit.orm.planning.routing import Planner
from shardkit.storage.urls import sqlalchemy_url

KEYS = range(-3, 13)

registry.register("postgresql.answering", "shardkit.storage.answers", "AnsweringDialect")


class Base(DeclarativeBase):
    pass


@sharded(by="id")
class Account(Base):
    __tablename__ = "Account"  # a name that has to be quoted

    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    name: Mapped[str] = mapped_column(String(20))
    n: Mapped[int | None]
    notes: Mapped[list[Note]] = relationship(back_populates="account", order_by="Note.number")


@sharded(by="owner")
class Note(Base):
    __tablename__ = "note"

    owner: Mapped[int] = mapped_column("user", ForeignKey("Account.id"), primary_key=True)  # a reserved word
    number: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    body: Mapped[str]
    n: Mapped[int | None]
    account: Mapped[Account] = relationship(back_populates="notes")
    marks: Mapped[list[Mark]] = relationship(back_populates="note")


@sharded(by="owner")
class Mark(Base):
    __tablename__ = "mark"
    __table_args__ = (ForeignKeyConstraint(["owner", "number"], ["note.user", "note.number"]),)

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    owner: Mapped[int] = mapped_column(BigInteger)
    number: Mapped[int] = mapped_column(BigInteger)
    n: Mapped[int | None]
    note: Mapped[Note] = relationship(back_populates="marks")


def rows() -> Iterator[tuple[Table, dict[str, Any]]]:
    """The rows of the one plain database, by column name."""
    account, note, mark = (Base.metadata.tables[name] for name in ("Account", "note", "mark"))
    for key in KEYS:
        yield account, {"id": key, "name": "abc"[key % 3], "n": None if key % 4 == 0 else key % 5}
        for number in range(key % 3):
            yield note, {"user": key, "number": number, "body": "xyz"[number], "n": None if number else key}
            for mark_number in range((key + number) % 3):
                identity = uuid.UUID(int=(key + 100) << 64 | number << 32 | mark_number)
                yield mark, {"id": identity, "owner": key, "number": number, "n": mark_number}


def stale(row: dict[str, Any]) -> dict[str, Any]:
    """What a copy of a row looks like that should not be seen."""
    return {**row, "n": (row.get("n") or 0) + 1000} if "n" in row else row


def thirds(version: int = 1, metadata: MetaData = Base.metadata) -> Topology:
    """Three shards of a third of the ring each."""
    tokens = [slot_arc(0, count).last for count in (21845, 43690, 65536)]
    shards = [(number, f"s{number}", f"postgresql://s{number}", 100) for number in range(3)]
    return Topology.first(version, shards, tokens, [0, 1, 2]).declared(version + 1, sharded_tables(metadata))


def stripes(version: int = 1, metadata: MetaData = Base.metadata) -> Topology:
    """Three shards that own a hundred narrow arcs each; few and many arcs are in transit."""
    tokens = [slot_arc(0, 218 * number).last for number in range(1, 301)] + [slot_arc(0, 65536).last]
    owners = [number % 3 for number in range(300)] + [2]
    shards = [(number, f"s{number}", f"postgresql://s{number}", 100) for number in range(3)]
    topology = Topology.first(version, shards, tokens, owners).declared(version + 1, sharded_tables(metadata))
    of_second, of_third = list(topology.owned(1)), list(topology.owned(2))
    topology = topology.marked(version + 2, 0, ArcSet(of_second[::2]))
    topology = topology.marked(version + 3, 1, ArcSet(of_third[10:13]))
    return topology.marked(version + 4, 2, ~topology.owned(2))


def with_transit(topology: Topology) -> Topology:
    """The same, with much in transit: to shard 1 half of what 0 owns, to 2 many small arcs of what 1 owns."""
    coarse = topology.marked(topology.version + 1, 1, ArcSet([slot_arc(0, 12000)]))
    fine = ArcSet([slot_arc(21845 + 40 * number, 20) for number in range(500)])
    return coarse.marked(topology.version + 2, 2, fine)


def answering(url: str) -> URL:
    """A URL whose engine has what shards' engines have, but no fence."""
    return sqlalchemy_url(url).set(drivername="postgresql+answering")


@dataclass
class Fleet:
    """Engines of shards by id, the topology they are under, and the planner that routes to them."""

    name: str
    engines: Mapping[int, Engine] = field(repr=False)
    topology: Topology = field(repr=False)
    planner: Planner = field(repr=False)

    @classmethod
    def over(
        cls,
        name: str,
        urls: Sequence[str],
        topology: Topology,
        metadata: MetaData = Base.metadata,
        content: Iterable[tuple[Table, dict[str, Any]]] | None = None,
    ) -> Fleet:
        """A fleet on empty databases, filled with the rows that each shard owns and with stale ones in transit."""
        listed = list(rows() if content is None else content)
        engines = {number: create_engine(answering(url)) for number, url in enumerate(urls)}
        for number, engine in engines.items():
            metadata.create_all(engine)
            arcs = topology.by_id[number].in_transit
            with engine.begin() as connection:
                for table, row in listed:
                    at = position(row[key_column(table).name])
                    if topology.ring.owner_at(at) == number:
                        connection.execute(table.insert(), row)
                    elif at in arcs:
                        connection.execute(table.insert(), stale(row))
        return cls(name, engines, topology, Planner(engines[0].dialect))

    def dispose(self) -> None:
        for engine in self.engines.values():
            engine.dispose()

    @contextmanager
    def session(self) -> Iterator[FleetSession]:
        """A session over the shards; all is rolled back."""
        with ExitStack() as stack:
            connections = {
                number: stack.enter_context(engine.connect()) for number, engine in self.engines.items()
            }
            session = FleetSession(self, connections)
            yield session
            session.close()


class FleetSession(Session):
    """A session whose statements the planner routes. ``plans`` are those it made, in order."""

    def __init__(self, fleet: Fleet, connections: Mapping[int, Connection]) -> None:
        super().__init__(autoflush=False)
        self.fleet = fleet
        self.connections = connections
        self.plans: list[Plan] = []
        self.dialect = next(iter(fleet.engines.values())).dialect

    def get_bind(self, *args: Any, **kwargs: Any) -> Any:
        return self

    def _connection_for_bind(self, engine: Any, *args: Any, **kwargs: Any) -> Any:
        return _Dispatch(self)


class _Dispatch:
    """Stands where SQLAlchemy expects a connection."""

    def __init__(self, session: FleetSession) -> None:
        self._session = session
        self.dialect = session.dialect

    def execute(self, statement: Any, parameters: Any = None, *, execution_options: Any = None) -> Any:
        session = self._session
        statement = frozen(statement)
        plan = session.fleet.planner.plan(statement, parameters or None, execution_options)
        session.plans.append(plan)
        route = plan.route(session.fleet.topology)
        first = session.connections[next(iter(route.shards))]
        times = cache(lambda: ask(session.connections[0])) if plan.asks_the_time else None
        finish = Finishing(first, ShardPart(statement, parameters), execution_options or {}, times)
        results = {}
        for number, part in finish.parts(route).items():
            connection = session.connections[number]
            with nullcontext() if times is None else telling(connection, times):
                results[number] = connection.execute(
                    part.statement, part.parameters, execution_options=execution_options
                )
        if route.merge is None:
            return next(iter(results.values()))
        return route.merge.merged(results, finish)

    def scalar(self, statement: Any, parameters: Any = None, *, execution_options: Any = None) -> Any:
        return self.execute(statement, parameters, execution_options=execution_options).scalar()
