"""Statements by slot-carrying ids over shards with many arcs and stale copies in transit: what one database answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import (
    BigInteger,
    Column,
    MetaData,
    Table,
    UniqueConstraint,
    bindparam,
    create_engine,
    exists,
    func,
    select,
    tuple_,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, aliased, mapped_column, outerjoin
from sqlalchemy.types import TypeDecorator

import shardkit
from shardkit.core import ids
from shardkit.core.keyrange import Arc, ArcSet, slot_arc, slot_of
from shardkit.core.ring import position
from shardkit.core.topology import Topology
from shardkit.orm.planning.idrouting import owners
from shardkit.orm.planning.statements import SeveralPlan
from shardkit.storage import membership
from shardkit.storage.urls import sqlalchemy_url
from tests.fix_postgres import FreshDatabase
from tests.routed import Fleet, stripes, thirds, with_transit

KEYS = range(40)


class Base(DeclarativeBase):
    pass


class Prefixed(TypeDecorator[str]):
    """An id as people see it: ``p-123``."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> Any:
        return None if value is None else int(value.removeprefix("p-"))

    def process_result_value(self, value: Any, dialect: Any) -> Any:
        return None if value is None else f"p-{value}"


@shardkit.sharded(by="owner")
class Page(Base):
    __tablename__ = "Page"

    id: Mapped[int] = mapped_column("Id", BigInteger, primary_key=True, default=shardkit.slot_id(floor=1000))
    owner: Mapped[str] = mapped_column("Owner", primary_key=False)
    n: Mapped[int | None]
    other: Mapped[str] = mapped_column(Prefixed, default=shardkit.slot_id())
    mark: Mapped[UUID] = mapped_column(default=shardkit.slot_id())
    __table_args__ = (UniqueConstraint("Owner", "Id"),)


TABLE: Any = Page.__table__


def content() -> Iterator[tuple[Table, dict[str, Any]]]:
    for key in KEYS:
        owner = f"owner {key}"
        slot = slot_of(position(owner))
        made = key if key % 10 == 0 else ids.timed_id(2**30 + key, slot, 5, key % 8)
        other = f"p-{ids.timed_id(2**30, slot, 6, 0)}"
        yield TABLE, {"Id": made, "Owner": owner, "n": key, "other": other, "mark": ids.uuid_id(9, key, slot)}


ROWS = [row for _, row in content()]


def divided() -> Topology:
    """Every slot that has a row is divided between two shards, in the middle or right at the row, and much of it is in
    transit."""
    topology = thirds(1)
    for number, row in enumerate(ROWS):
        at = position(row["Owner"])
        arc = slot_arc(slot_of(at))
        part = ArcSet([Arc(arc.first, at - number % 2)])
        source = topology.ring.owner_at(at - number % 2)
        target = (source + 1) % 3
        version = topology.version
        topology = topology.marked(version + 1, target, part).cut_over(version + 2, source, target, part)
        if number % 3:
            topology = topology.unmarked(version + 3, source, part)
    return topology


TOPOLOGIES = {
    "thirds": thirds,
    "stripes": stripes,
    "transit": lambda: with_transit(thirds()),
    "divided": divided,
}


@pytest.fixture(scope="module", params=TOPOLOGIES)
def fleet(request: pytest.FixtureRequest, servers: Any) -> Iterator[Fleet]:
    names = [f"ids_{request.param}_{number}" for number in range(3)]
    made = [(servers[number], name) for number, name in enumerate(names)]
    urls = [server.create_database(name) for server, name in made]
    fleet = Fleet.over("ids", urls, TOPOLOGIES[request.param](), Base.metadata, content())
    yield fleet
    fleet.dispose()
    type(servers[0]).drop_databases(made)


P: Any = aliased(Page)


def test_each_row_is_found_once_by_each_id(fleet: Fleet) -> None:
    with fleet.session() as session:
        for row in ROWS:
            for statement, parameters in (
                (select(TABLE.c.n).where(TABLE.c.Id == row["Id"]), None),
                (select(Page.n).where(Page.id == bindparam("wanted")), {"wanted": row["Id"]}),
                (select(P.n).where(P.id == row["Id"]), None),
                (select(Page.n).where(Page.other == row["other"]), None),
                (select(Page.n).where(Page.mark == row["mark"]), None),
                (select(Page.n).where(Page.id.in_([row["Id"], None])), None),
                (select(Page.n).where(tuple_(Page.id, Page.n).in_([(row["Id"], row["n"])])), None),
                (select(Page.n).where(Page.id == row["Id"], Page.mark == row["mark"]), None),
                (select(Page.n).join(P, P.owner == Page.owner).where(P.id == row["Id"]), None),
                (select(func.sum(Page.n)).where(Page.id == row["Id"]), None),
                (select(Page.n).where(Page.id == row["Id"]).order_by(Page.owner).limit(2), None),
                (select(Page.n).where(Page.id == row["Id"]).with_for_update(), None),
                (select(Page.n).outerjoin(P, P.owner == Page.owner).where(Page.id == row["Id"]), None),
                (select(Page.n).where(Page.id == row["Id"], exists().where(P.owner == Page.owner)), None),
            ):
                assert session.execute(statement, parameters).all() == [(row["n"],)], (row, statement)
            session.expunge_all()
            found = session.get_one(Page, row["Id"])
            assert (found.n, found.other, found.mark) == (row["n"], row["other"], row["mark"])


def test_lists_of_ids(fleet: Fleet) -> None:
    with fleet.session() as session:
        for start in range(0, 31, 7):
            chosen = ROWS[start : start + 9]
            wanted = [(row["n"],) for row in chosen]
            for statement in (
                select(Page.n).where(Page.id.in_([row["Id"] for row in chosen])),
                select(Page.n).where(Page.mark.in_([row["mark"] for row in chosen])),
            ):
                assert sorted(session.execute(statement).all()) == wanted
            mixed = select(Page.n).where(
                Page.id.in_([row["Id"] for row in chosen]),
                Page.mark.in_([row["mark"] for row in chosen[::2]]),
            )
            assert sorted(session.execute(mixed).all()) == wanted[::2]


def test_only_shards_of_the_slot_are_asked(fleet: Fleet) -> None:
    with fleet.session() as session:
        for row in ROWS:
            session.plans.clear()
            session.execute(select(Page.n).where(Page.id == row["Id"])).all()
            (plan,) = session.plans
            assert isinstance(plan, SeveralPlan)
            asked = set(plan.route(fleet.topology).shards)
            arcs = ArcSet([slot_arc(slot_of(position(row["Owner"])))])
            here = {shard.id for shard in fleet.topology.shards if fleet.topology.owned(shard.id) & arcs}
            assert asked == ({0, 1, 2} if row["Id"] < 1000 else here)


def test_owners_of_slots() -> None:
    for topology in (thirds(), stripes(), divided()):
        for slot in [0, 65535, 21844, 21845, *(slot_of(position(row["Owner"])) for row in ROWS)]:
            arcs = ArcSet([slot_arc(slot)])
            assert owners(topology, [slot]) == {
                shard.id: bool(shard.in_transit & arcs)
                for shard in topology.shards
                if topology.owned(shard.id) & arcs
            }


def test_what_binds_no_slot(fleet: Fleet) -> None:
    """Answers stay those of one database where an id decides nothing; refusals do not depend on the topology."""
    first, second = ROWS[1], ROWS[2]
    with fleet.session() as session:
        for statement, wanted in (
            (select(Page.n).where((Page.id == first["Id"]) | (Page.n == second["n"])), [(1,), (2,)]),
            (select(Page.n).where(Page.id == first["Id"], Page.id == second["Id"]), []),
            (select(Page.n).where(Page.id == None), []),  # noqa: E711
            (select(Page.n).where(Page.id.in_([])), []),
            (select(Page.n).where(Page.id == Page.n), [(n,) for n in range(0, 40, 10)]),
            (select(Page.n).where(Page.id + 0 == first["Id"]), [(1,)]),
            (select(Page.n).where(Page.id == first["Id"] + 0.0), None),
        ):
            found = sorted(session.execute(statement).all())
            assert wanted is None or found == wanted, statement
        joined = select(Page.n, P.n).select_from(outerjoin(Page, P, P.id == first["Id"])).where(Page.n == 3)
        assert session.execute(joined).all() == [(3, 1)]


def test_a_default_of_a_decorated_type(fresh_database: FreshDatabase) -> None:
    """What a default makes is what a query returns."""
    metadata = MetaData()
    table = Table("t", metadata, Column("owner", BigInteger, primary_key=True, autoincrement=False),
                  Column("public", Prefixed, default=shardkit.slot_id(json_safe=True)),
                  info={"shardkit": {"sharded_by": "owner"}})  # fmt: skip

    url = fresh_database(0)
    membership.initialise(url)
    engine = create_engine(sqlalchemy_url(url))
    metadata.create_all(engine)
    shardkit.lease_ids(url)
    try:
        with engine.begin() as connection:
            (made,) = connection.execute(table.insert().values(owner=5).returning(table.c.public)).one()
        assert ids.counted(int(made.removeprefix("p-"))).slot == slot_of(position(5))
    finally:
        shardkit.lease_ids(None)
        engine.dispose()
