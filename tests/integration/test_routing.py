"""Routed statements on real servers: other key types, loaders, rows in transit."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import (
    BigInteger,
    Column,
    ForeignKey,
    Integer,
    MetaData,
    SmallInteger,
    String,
    Table,
    Text,
    Uuid,
    bindparam,
    create_engine,
    delete,
    func,
    insert,
    select,
    update,
)
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    aliased,
    joinedload,
    mapped_column,
    selectinload,
    with_loader_criteria,
    with_polymorphic,
)

from shardkit.core.errors import IdentityConflict
from shardkit.core.keyrange import POSITION_MAX, POSITION_MIN, Arc, ArcSet, slot_arc
from shardkit.core.ring import position
from shardkit.dev import Clusters
from shardkit.orm.declare import sharded
from shardkit.orm.planning.ownership import owned_only
from shardkit.orm.planning.plan import AnyShardPlan, OneKeyPlan
from shardkit.orm.planning.statements import ReadingPlan
from shardkit.storage.urls import sqlalchemy_url
from tests.fix_postgres import FreshDatabase
from tests.routed import KEYS, Account, Fleet, FleetSession, Mark, Note, stripes, thirds, with_transit


@pytest.fixture(scope="module")
def fleet(servers: Clusters) -> Iterator[Fleet]:
    urls = [server.create_database(f"routing_{number}") for number, server in enumerate(servers[:3])]
    made = Fleet.over("in transit", urls, with_transit(thirds()))
    yield made
    made.dispose()


@pytest.fixture
def session(fleet: Fleet) -> Iterator[FleetSession]:
    with fleet.session() as opened:
        yield opened


def kinds(session: FleetSession) -> list[str]:
    return [type(plan).__name__ for plan in session.plans]


# --- the predicate -------------------------------------------------------------------------------------------------

INTS = [-1, 2**31, 2**63 - 1, -(2**63), *range(200)]
TEXTS = ["", " ", "a", "A", "ä", "😀", "it's", '"q"', "x" * 100, *map(str, range(200))]
ARCS = [
    (ArcSet([Arc(POSITION_MIN, -1)]), ArcSet([Arc(0, POSITION_MAX)])),
    (
        ArcSet([slot_arc(0, 100), slot_arc(40000, 9000)]),
        ArcSet([slot_arc(200), slot_arc(300), slot_arc(10000, 30000)]),
    ),
    (ArcSet([slot_arc(2 * n) for n in range(30000)]), ArcSet([slot_arc(2 * n + 1) for n in range(30000)])),
    (ArcSet([slot_arc(2 * n) for n in range(30000)]), ArcSet([Arc(POSITION_MAX, POSITION_MAX)])),
    (ArcSet([slot_arc(n * 3, 2) for n in range(21845)]), ArcSet([slot_arc(65535)])),
]
UUIDS = [
    uuid.UUID(int=0),
    uuid.UUID(int=2**128 - 1),
    *(uuid.uuid5(uuid.NAMESPACE_URL, str(n)) for n in range(200)),
]


@pytest.mark.parametrize(
    ("type_", "family", "values"),
    [
        (BigInteger(), "int", INTS),
        (Integer(), "int", [value for value in INTS if -(2**31) <= value < 2**31]),
        (SmallInteger(), "int", list(range(-100, 100))),
        (Text(), "text", TEXTS),
        (String(120), "text", TEXTS),
        (Uuid(), "uuid", UUIDS),
    ],
)
def test_the_predicate_holds_of_owned_rows_and_of_none_in_transit(
    fresh_database: FreshDatabase, type_: Any, family: Any, values: list[Any]
) -> None:
    table = Table("Odd Name", MetaData(), Column("select", type_, primary_key=True, autoincrement=False))
    engine = create_engine(sqlalchemy_url(fresh_database()))
    try:
        with engine.connect() as connection:
            table.create(connection)
            connection.execute(table.insert(), [{"select": value} for value in values])
            column = table.c["select"]
            for owned, in_transit in ARCS:
                predicate = owned_only(column, family, owned, in_transit)
                found = set(connection.scalars(select(column).where(predicate)))
                assert found >= {value for value in values if position(value) in owned}
                assert not found & {value for value in values if position(value) in in_transit}
    finally:
        engine.dispose()


# --- loading -------------------------------------------------------------------------------------------------------


def test_entities_come_from_their_owners_only(session: FleetSession) -> None:
    accounts = session.scalars(select(Account)).all()
    assert sorted(account.id for account in accounts) == list(KEYS)
    assert all(account.n is None or account.n < 1000 for account in accounts)
    assert kinds(session) == ["ReadingPlan"]


def test_get_and_refresh_go_to_one_shard(session: FleetSession) -> None:
    for key in KEYS:
        assert session.get_one(Account, key).id == key
    session.refresh(session.get_one(Account, 5))
    session.expire_all()
    assert session.get_one(Note, (5, 1)).body == "y"
    assert set(kinds(session)) == {"OneKeyPlan"}


def test_get_by_a_uuid_that_holds_no_key_looks_everywhere(session: FleetSession) -> None:
    mark = session.scalars(select(Mark).where(Mark.owner == 5)).first()
    assert mark is not None
    session.expunge_all()
    assert session.get_one(Mark, mark.id).owner == 5
    assert kinds(session) == ["OneKeyPlan", "ReadingPlan"]


def test_lazy_loads_go_to_one_shard(session: FleetSession) -> None:
    for account in session.scalars(select(Account)).all():
        assert len(account.notes) == account.id % 3
        for note in account.notes:
            assert note.account is account
            assert all(mark.n is not None and mark.n < 1000 for mark in note.marks)
    assert set(kinds(session)[1:]) == {"OneKeyPlan"}


def test_composite_keys_load_in_one_statement(session: FleetSession) -> None:
    notes = session.scalars(select(Note).options(selectinload(Note.marks))).all()
    assert len(notes) == sum(key % 3 for key in KEYS)
    assert all(len(note.marks) == (note.owner + note.number) % 3 for note in notes)
    assert kinds(session) == ["ReadingPlan", "ReadingPlan"]


def test_collections_keep_their_order_over_several_shards(session: FleetSession) -> None:
    accounts = session.scalars(
        select(Account).options(selectinload(Account.notes).selectinload(Note.marks))
    ).all()
    assert all([note.number for note in account.notes] == list(range(account.id % 3)) for account in accounts)
    assert kinds(session) == ["ReadingPlan"] * 3
    keys: Any = bindparam("primary_keys", list(KEYS), expanding=True)
    notes = session.scalars(select(Note).where(Note.owner.in_(keys)).order_by(Note.number, Note.owner))
    assert [(note.number, note.owner) for note in notes] == sorted(
        (number, key) for key in KEYS for number in range(key % 3)
    )


def test_many_to_one_loads_are_split(session: FleetSession) -> None:
    notes = session.scalars(select(Note).options(selectinload(Note.account))).all()
    assert all(note.account.id == note.owner for note in notes)
    assert kinds(session) == ["ReadingPlan", "ReadingPlan"]


def test_eager_loads_scatter(session: FleetSession) -> None:
    notes = session.scalars(select(Note).options(joinedload(Note.account, innerjoin=True))).all()
    assert all(note.account.n is None or note.account.n < 1000 for note in notes)
    eager = select(Account).options(joinedload(Account.notes))
    for account in session.scalars(eager.order_by(Account.name, Account.id)).unique():
        assert [note.number for note in account.notes] == list(range(account.id % 3))
    (account,) = session.scalars(eager.where(Account.id == 5)).unique()
    assert [note.number for note in account.notes] == [0, 1]
    assert kinds(session) == ["ReadingPlan", "ReadingPlan", "OneKeyPlan"]


def test_criteria_of_options_route_and_take_each_call_s_value(session: FleetSession) -> None:
    def tenant(key: int) -> Any:
        return with_loader_criteria(Account, lambda account: account.id == key, include_aliases=True)

    for key in (1, 2, 7):
        account = aliased(Account)
        assert session.scalars(select(account).options(tenant(key)).order_by(account.name)).one().id == key
        assert session.plans[-1].position == position(key)  # type: ignore[attr-defined]


def test_a_list_is_split_wherever_it_stands(session: FleetSession) -> None:
    wanted = [1, 2, 3, 4, 5]
    account = aliased(Account)
    joined = select(account.id, Note.number).join(Note, Note.owner == account.id)
    for statement in (joined.where(account.id.in_(wanted)), joined.where(Note.owner.in_(wanted))):
        assert sorted(session.execute(statement).all()) == [(1, 0), (2, 0), (2, 1), (4, 0), (5, 0), (5, 1)]
    on = select(account.id).join(Note, (Note.owner == account.id) & Note.owner.in_(wanted))
    assert sorted(session.scalars(on)) == [1, 2, 2, 4, 5, 5]


def test_aggregates_keep_their_types(session: FleetSession) -> None:
    row = session.execute(
        select(func.count(), func.sum(Account.id), func.sum(Account.n), func.max(Account.id))
    ).one()
    small = [key % 5 for key in KEYS if key % 4]
    assert row == (len(KEYS), Decimal(sum(KEYS)), sum(small), max(KEYS))
    assert [type(value) for value in row] == [int, Decimal, int, int]
    nothing = session.execute(
        select(func.count(), func.sum(Account.id), func.min(Account.n)).where(Account.n > 500)
    )
    assert nothing.one() == (0, None, None)
    assert session.scalar(select(func.count()).select_from(Account)) == len(KEYS)


def test_all_shards_have_one_clock(session: FleetSession) -> None:
    # Their transactions began at different times.
    began = [one.scalar(select(func.now())) for one in session.connections.values()]
    assert len(set(began)) == 3
    now: Any = func.now()
    assert set(session.scalars(select(now).select_from(Account))) == {began[0]}
    both = select(func.localtimestamp(), func.current_date(), Account.id).order_by(Account.id)
    assert len({(row[0], row[1]) for row in session.execute(both)}) == 1
    grouped = select(Account.name, func.count(), now).where(now == began[0]).group_by(Account.name)
    assert {row[2] for row in session.execute(grouped)} == {began[0]}
    assert session.scalars(select(Account.id).where(now > began[0])).all() == []
    assert session.execute(select(now, func.avg(Account.n)).where(now != began[0])).one() == (began[0], None)
    # What runs over rows that are read has the clock of the shard it runs on.
    pulled = (
        select(now, func.count()).select_from(Account).join(Note, Note.n == Account.n).where(now == began[0])
    )
    time, count = session.execute(pulled).one()
    assert time == began[0]
    assert count > 0
    assert kinds(session) == ["ReadingPlan"] * 5 + ["PullPlan"]


def test_what_any_shard_answers_is_asked_of_one(session: FleetSession) -> None:
    assert session.scalar(select(func.upper("x"))) == "X"
    assert session.scalars(select(Account).where(Account.id.in_([])).order_by(Account.n)).all() == []
    assert session.execute(select(func.count()).where(Account.id.in_([]))).scalar_one() == 0
    assert set(kinds(session)) == {AnyShardPlan.__name__}


# --- writing -------------------------------------------------------------------------------------------------------


def test_updates_and_deletes_leave_rows_in_transit_alone(fleet: Fleet) -> None:
    stale = select(func.count()).select_from(Account).where(Account.n >= 1000)
    for statement in (
        update(Account).values(n=7),
        update(Account).where(Account.id.in_(list(KEYS))).values(n=7),
        update(Account).where(Account.id == Note.owner).values(n=7),
        delete(Mark),
    ):
        with fleet.session() as session:
            before = {number: one.scalar(stale) for number, one in session.connections.items()}
            session.execute(statement, execution_options={"synchronize_session": False})
            assert {number: one.scalar(stale) for number, one in session.connections.items()} == before
            assert any(before.values())


def test_row_counts_are_added(session: FleetSession) -> None:
    result: Any = session.execute(update(Account.metadata.tables["Account"]).values(n=7))
    assert result.rowcount == len(KEYS)


def test_an_orm_update_synchronizes_the_session(session: FleetSession) -> None:
    accounts = {
        account.id: account for account in session.scalars(select(Account).where(Account.n.is_not(None)))
    }
    before = {key: account.n for key, account in accounts.items()}
    session.execute(update(Account).where(Account.n.is_not(None)).values(n=Account.n + 1))
    assert {key: account.n for key, account in accounts.items()} == {
        key: (n or 0) + 1 for key, n in before.items()
    }


def test_objects_are_synchronized_by_what_all_shards_return(session: FleetSession) -> None:
    accounts = session.scalars(select(Account)).all()
    fetching = {"synchronize_session": "fetch"}
    session.execute(update(Account).values(n=7), execution_options=fetching)
    assert {account.n for account in accounts} == {7}
    returned = update(Account).values(n=Account.n + 1).returning(Account.id, Account.n)
    rows = session.execute(returned, execution_options=fetching).all()
    assert sorted(rows) == [(key, 8) for key in KEYS]
    assert {account.n for account in accounts} == {8}


def test_rows_are_returned_in_the_order_they_were_given(session: FleetSession) -> None:
    table = Account.metadata.tables["Account"]
    keys = [40, 41, 42, 43, 44, 45, 46]
    rows = [{"id": key, "name": "new", "n": None} for key in keys]
    assert session.scalars(insert(table).values(rows).returning(table.c.id)).all() == keys
    session.rollback()


def test_one_identity_on_two_shards_is_an_error(session: FleetSession) -> None:
    topology = session.fleet.topology
    key = next(key for key in KEYS if topology.ring.owner(key) == 2)  # shard 0 has nothing in transit
    stray = {"id": key, "name": "stray", "n": None}
    session.connections[0].execute(Account.metadata.tables["Account"].insert(), stray)
    for statement in (select(Account), select(Account.n, Account.id)):
        with pytest.raises(IdentityConflict):
            session.execute(statement)
    # Asked for its own keys only, a shard does not show a row of another.
    assert len(session.execute(select(Account).where(Account.id.in_(list(KEYS)))).all()) == len(KEYS)
    assert session.get_one(Account, key).name != "stray"


# --- other models --------------------------------------------------------------------------------------------------


class Base(DeclarativeBase):
    pass


@sharded(by="key")
class Label(Base):
    __tablename__ = "Label"
    __table_args__ = {"schema": "Other Schema"}  # noqa: RUF012
    key: Mapped[str] = mapped_column("Key", Text, primary_key=True)
    n: Mapped[int | None]


@sharded(by="id")
class Person(Base):
    __tablename__ = "person"
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(String(10))
    n: Mapped[int | None]
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "person"}  # noqa: RUF012


@sharded(by="id")
class Worker(Person):
    __tablename__ = "worker"
    id: Mapped[uuid.UUID] = mapped_column(ForeignKey("person.id"), primary_key=True)
    wage: Mapped[int | None] = mapped_column("n")
    __mapper_args__ = {"polymorphic_identity": "worker"}  # noqa: RUF012


def other_rows() -> Iterator[tuple[Table, dict[str, Any]]]:
    labels, people, workers = (
        Base.metadata.tables[name] for name in ("Other Schema.Label", "person", "worker")
    )
    for text in TEXTS:
        yield labels, {"Key": text, "n": len(text)}
    for number, identity in enumerate(UUIDS[:60]):
        yield people, {"id": identity, "kind": "worker" if number % 2 else "person", "n": number}
        if number % 2:
            yield workers, {"id": identity, "n": number}


@pytest.fixture(scope="module")
def others(servers: Clusters) -> Iterator[Fleet]:
    urls = [server.create_database(f"routing_others_{number}") for number, server in enumerate(servers[:3])]
    for url in urls:
        engine = create_engine(sqlalchemy_url(url))
        with engine.begin() as connection:
            connection.exec_driver_sql('CREATE SCHEMA "Other Schema"')
        engine.dispose()
    made = Fleet.over("others", urls, stripes(), Base.metadata, other_rows())
    yield made
    made.dispose()


def test_text_keys_of_any_kind_in_any_schema(others: Fleet) -> None:
    with others.session() as session:
        for text in TEXTS[:20]:
            assert session.get_one(Label, text).n == len(text)
        assert set(kinds(session)) == {OneKeyPlan.__name__}
        assert sorted(session.scalars(select(Label.key))) == sorted(TEXTS)
        assert sorted(session.scalars(select(Label.key).where(Label.key.in_(TEXTS[:9])))) == sorted(TEXTS[:9])
        assert session.scalar(select(func.count()).select_from(Label)) == len(TEXTS)


def test_joined_inheritance(others: Fleet) -> None:
    with others.session() as session:
        assert {worker.id for worker in session.scalars(select(Worker))} == set(UUIDS[1:60:2])
        assert all(worker.n == worker.wage for worker in session.scalars(select(Worker)))
        assert len(session.scalars(select(Person)).all()) == 60
        everyone = with_polymorphic(Person, "*")
        assert isinstance(session.scalars(select(everyone).where(everyone.id == UUIDS[3])).one(), Worker)
        found = session.scalars(select(everyone)).all()
        assert len(found) == 60
        assert all(one.n == one.wage for one in found if isinstance(one, Worker))
    assert {type(plan) for plan in session.plans} == {ReadingPlan, OneKeyPlan}
