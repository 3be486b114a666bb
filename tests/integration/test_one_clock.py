"""What time it is in statements that write rows of several shards: one answer, as one database has it.

Each session begins on its shards one after the other, so that each of them has another `now()`. Sync and async.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import (
    BigInteger,
    Column,
    DateTime,
    String,
    Table,
    bindparam,
    delete,
    func,
    insert,
    literal,
    literal_column,
    select,
    text,
    update,
)
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.orm import DeclarativeBase, Mapped, aliased, mapped_column, with_loader_criteria
from sqlalchemy.types import TypeDecorator

import shardkit
from shardkit.core.errors import UnroutableQuery
from tests.fix_sharded import InSession
from tests.sharded import ShardedCluster

KEYS = list(range(40))


class Base(DeclarativeBase):
    pass


class Stamped(TypeDecorator[str]):
    """Text with the time of the server behind it."""

    impl = String
    cache_ok = True

    def bind_expression(self, bindvalue: Any) -> Any:
        return func.concat(bindvalue, "@", func.now().op("AT TIME ZONE")("UTC"))


@shardkit.sharded(by="id")
class Stamp(Base):
    __tablename__ = "Stamp"
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    name: Mapped[str | None] = mapped_column(String)
    made: Mapped[datetime] = mapped_column(DateTime(timezone=True), default=func.now())
    changed: Mapped[datetime | None] = mapped_column(DateTime(timezone=True), onupdate=func.now())
    day: Mapped[date | None]
    began: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))
    signed: Mapped[str | None] = mapped_column(Stamped)


copies = Table(
    "copy",
    Base.metadata,
    Column("id", BigInteger, primary_key=True, autoincrement=False),
    Column("made", DateTime(timezone=True), default=func.current_timestamp()),
    Column("name", String),
    info={"shardkit": {"sharded_by": "id"}},
)
stamps: Table = Stamp.metadata.tables["Stamp"]

Clocks = dict[str, datetime]
Work = Callable[[Any], Any]


@pytest.fixture(scope="module")
def _stamped(_sharded: ShardedCluster) -> None:
    with _sharded.connect() as cluster:
        cluster.create_all(Base.metadata)


@pytest.fixture
def clocks(_stamped: None, in_session: InSession) -> Callable[[Work], Any]:
    """`clocks(work)`: what work returns, given a session of which each shard has another time. It is rolled back."""

    def apart(session: Any, work: Work) -> Any:
        names = [f"s{number}" for number in range(3)]
        own = [session.connection(shard=name).scalar(select(func.now())) for name in names]
        assert len(set(own)) == 3
        return work(session)

    return lambda work: in_session(lambda session: apart(session, work), mode="two_phase")


def fill(session: Any) -> None:
    session.execute(insert(Stamp), [{"id": key, "made": datetime(2020, 1, 1, tzinfo=UTC)} for key in KEYS])


def stored(session: Any, column: Any) -> list[Any]:
    """The values of a column in all rows; more than one shard has such rows."""
    found = session.execute(select(column)).scalars().all()
    shards = [
        session.connection(shard=f"s{number}").scalar(select(func.count(column))) for number in range(3)
    ]
    assert sum(count > 0 for count in shards) == 3
    return list(found)


def is_now(session: Any, column: Any) -> None:
    """All rows have the time that one statement over all shards tells in this transaction."""
    (now,) = set(session.scalars(select(func.now()).select_from(Stamp)))
    assert set(stored(session, column)) == {now}
    assert session.scalar(select(func.count()).where(column == func.now())) == len(KEYS)


rows: list[dict[str, Any]] = [{"id": key, "name": "x"} for key in KEYS]

INSERTS: dict[str, Any] = {
    "rows, Core": (insert(stamps), rows),
    "rows, ORM": (insert(Stamp), rows),
    "rows that differ, ORM": (insert(Stamp), [row if row["id"] % 3 else {"id": row["id"]} for row in rows]),
    "VALUES, Core": (insert(stamps).values(rows), None),
    "VALUES, ORM": (insert(Stamp).values(rows), None),
    "VALUES with now()": (
        insert(Stamp).values([{**row, "made": func.current_timestamp()} for row in rows]),
        None,
    ),
    "value of the statement": (insert(stamps).values(made=func.transaction_timestamp()), rows),
    "returned": (insert(Stamp).returning(Stamp.made), rows),
    "upsert": (upsert(Stamp).on_conflict_do_update(index_elements=["id"], set_={"made": func.now()}), rows),
}


@pytest.mark.parametrize("name", INSERTS)
def test_rows_that_are_inserted(clocks: Callable[[Work], Any], name: str) -> None:
    statement, parameters = INSERTS[name]

    def work(session: Any) -> None:
        result = session.execute(statement, parameters)
        if name == "returned":
            assert len(set(result.scalars())) == 1
        is_now(session, Stamp.made)

    clocks(work)


def test_rows_that_an_upsert_meets(clocks: Callable[[Work], Any]) -> None:
    def work(session: Any) -> None:
        fill(session)
        session.execute(*INSERTS["upsert"])
        is_now(session, Stamp.made)

    clocks(work)


UPDATES: dict[str, Any] = {
    "by the ORM": update(Stamp).values(changed=func.now()),
    "by Core": update(stamps).values(changed=func.now()),
    "onupdate, ORM": update(Stamp).values(name="y"),
    "onupdate, Core": update(stamps).values(name="y"),
    "onupdate of a list of keys": update(Stamp).where(Stamp.id.in_(KEYS)).values(name="y"),
    "returned": update(Stamp).values(name="y").returning(Stamp.changed),
    "fetched": update(Stamp).values(name="y").execution_options(synchronize_session="fetch"),
}


@pytest.mark.parametrize("name", UPDATES)
def test_rows_that_are_updated(clocks: Callable[[Work], Any], name: str) -> None:
    def work(session: Any) -> None:
        fill(session)
        loaded = session.scalars(select(Stamp)).all()
        result = session.execute(UPDATES[name])
        if name == "returned":
            assert len(set(result.scalars())) == 1
        is_now(session, Stamp.changed)
        if "Core" not in name and name != "by Core":
            assert len({one.changed for one in loaded}) == 1

    clocks(work)


def test_lists_of_updates(clocks: Callable[[Work], Any]) -> None:
    """By primary key, which the ORM does shard by shard, and by parameters of one statement."""

    def work(session: Any) -> None:
        fill(session)
        session.execute(update(Stamp), [{"id": key, "name": "y"} for key in KEYS])
        is_now(session, Stamp.changed)
        session.execute(update(stamps).values(changed=None))
        many = update(stamps).where(stamps.c.id == bindparam("wanted"))
        session.execute(many.values(name=bindparam("given")), [{"wanted": key, "given": "z"} for key in KEYS])
        is_now(session, Stamp.changed)

    clocks(work)


def test_what_the_time_is_made_into(clocks: Callable[[Work], Any]) -> None:
    """Dates, expressions, a rounded time, the expression of a type; as one server makes them of its own time."""

    def work(session: Any) -> None:
        fill(session)
        session.execute(
            update(Stamp).values(
                day=func.current_date(),
                changed=func.now() - timedelta(days=1),
                made=func.current_timestamp(literal_column("0")),
                signed="me",
                name=func.localtimestamp(),
            )
        )
        (now,) = set(session.scalars(select(func.now()).select_from(Stamp)))
        made = select(
            literal(now).cast(DateTime(timezone=True)) - timedelta(days=1),
            text("(:now)::date").bindparams(now=now),
            text("(:now)::timestamptz(0)").bindparams(now=now),
            text("'me@' || ((:now)::timestamptz AT TIME ZONE 'UTC')::text").bindparams(now=now),
            text("(:now)::timestamptz::timestamp::text").bindparams(now=now),
        )
        expected = session.connection(shard="s0").execute(made).one()
        found = session.execute(
            select(Stamp.changed, Stamp.day, Stamp.made, stamps.c.signed, Stamp.name).select_from(Stamp)
        )
        assert {tuple(row) for row in found} == {tuple(expected)}

    clocks(work)


def test_when_a_statement_began(clocks: Callable[[Work], Any]) -> None:
    """One time for all rows, later than that of the transaction."""

    def work(session: Any) -> None:
        fill(session)
        session.execute(update(Stamp).values(began=func.statement_timestamp()))
        (began,) = set(stored(session, Stamp.began))
        assert session.scalar(select(func.count()).where(Stamp.began > func.now())) == len(KEYS)
        session.execute(update(Stamp).values(began=func.statement_timestamp()))
        (again,) = set(stored(session, Stamp.began))
        assert again > began
        late = select(func.statement_timestamp(), func.clock_timestamp()).select_from(Stamp)
        (read,) = set(session.execute(late).all())
        assert again < read[0] <= read[1]
        with pytest.raises(UnroutableQuery) as error:
            session.execute(update(Stamp).values(began=func.clock_timestamp()))
        assert error.value.fields["reason"] == "function"

    clocks(work)


def test_rows_that_are_deleted(clocks: Callable[[Work], Any]) -> None:
    def work(session: Any) -> None:
        fill(session)
        session.execute(update(Stamp).where(Stamp.id < 20).values(made=func.now()))
        assert session.execute(delete(Stamp).where(Stamp.made > func.now())).rowcount == 0
        assert session.execute(delete(Stamp).where(Stamp.made == func.now())).rowcount == 20
        only = with_loader_criteria(Stamp, Stamp.made < func.now())
        assert session.execute(delete(Stamp).options(only)).rowcount == 20

    clocks(work)


def test_rows_made_of_rows(clocks: Callable[[Work], Any]) -> None:
    """INSERT .. SELECT: with the time in its SELECT, in its condition, and in the default of a column."""

    def work(session: Any) -> None:
        fill(session)
        session.execute(update(Stamp).values(made=func.now()))
        selected = select(Stamp.id, func.now())
        session.execute(insert(copies).from_select(["id", "made"], selected))
        is_now(session, copies.c.made)
        session.execute(delete(copies))
        of_now = select(Stamp.id, Stamp.name).where(Stamp.made == func.now())
        session.execute(insert(copies).from_select(["id", "name"], of_now))
        is_now(session, copies.c.made)
        with pytest.raises(UnroutableQuery) as error:
            session.execute(
                insert(copies).from_select(["id", "made"], select(Stamp.id, func.clock_timestamp()))
            )
        assert error.value.fields["reason"] == "function"

    clocks(work)


def test_all_statements_of_a_transaction_have_one_clock(clocks: Callable[[Work], Any]) -> None:
    """Those of one key, of several and of all, of no table, and those that run over rows that are read."""

    def work(session: Any) -> None:
        first = session.connection(shard="s0").scalar(select(func.now()))
        assert session.scalar(select(func.now())) == first
        for key in KEYS:
            session.execute(insert(stamps).values(id=key))
        is_now(session, Stamp.made)
        for key in KEYS:
            session.execute(update(Stamp).where(Stamp.id == key).values(name="y"))
            assert session.scalar(select(func.now()).where(Stamp.id == key)) == first
        is_now(session, Stamp.changed)
        session.execute(update(stamps), [{"name": "z"}])
        other = aliased(Stamp)
        pulled = select(func.now(), func.count()).select_from(Stamp).join(other, other.made == Stamp.changed)
        assert session.execute(pulled.where(Stamp.made == func.now())).one() == (first, len(KEYS) ** 2)

    clocks(work)


def test_a_transaction_of_one_shard_asks_nobody(
    sharded: ShardedCluster, clocks: Callable[[Work], Any]
) -> None:
    def work(session: Any) -> None:
        session.rollback()
        own = session.connection(key=5).scalar(select(func.now()))
        session.execute(insert(stamps).values(id=5, changed=func.now()))
        found = session.execute(select(Stamp.made, Stamp.changed, func.now()).where(Stamp.id == 5)).one()
        assert set(found) == {own}

    clocks(work)
