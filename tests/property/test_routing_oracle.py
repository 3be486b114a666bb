"""Statements over shards against the same statements on one plain database.

Every statement returns the same or is refused. The shards of one fleet hold stale rows in transit, so that a row that
is read, changed or counted where it is not owned shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from sqlalchemy import (
    BigInteger,
    Engine,
    and_,
    bindparam,
    case,
    create_engine,
    delete,
    exists,
    func,
    insert,
    literal,
    not_,
    or_,
    select,
    tuple_,
    union,
    union_all,
    update,
)
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.exc import DBAPIError, StatementError
from sqlalchemy.orm import Session, aliased, joinedload, selectinload

from shardkit.core.errors import KeyTypeError, UnroutableQuery
from shardkit.core.ring import position
from shardkit.core.topology import Topology
from shardkit.dev import Clusters
from shardkit.orm.declare import key_column
from shardkit.storage.urls import sqlalchemy_url
from tests.fix_oracle import Outcomes
from tests.routed import KEYS, Account, Base, Fleet, Mark, Note, rows, stripes, thirds, with_transit

# SQLAlchemy warns of some drawn statements, and only when it compiles one for the first time.
pytestmark = pytest.mark.filterwarnings("ignore:.* statement has a cartesian product")

EXAMPLES = settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)


@dataclass
class World:
    """One plain database and fleets with its rows: at rest, and with rows in transit."""

    plain: Engine = field(repr=False)
    fleets: list[Fleet] = field(repr=False)
    outcomes: Outcomes


@pytest.fixture(scope="module")
def world(servers: Clusters, oracle_outcomes: Outcomes) -> Iterator[World]:
    def databases(name: str) -> list[str]:
        return [server.create_database(f"{name}_{number}") for number, server in enumerate(servers[:3])]

    plain = create_engine(sqlalchemy_url(servers[0].create_database("oracle_plain")))
    Base.metadata.create_all(plain)
    with plain.begin() as connection:
        for table, row in rows():
            connection.execute(table.insert(), row)
    fleets = [
        Fleet.over("at rest", databases("oracle_rest"), thirds()),
        Fleet.over("in transit", databases("oracle_transit"), with_transit(thirds())),
        Fleet.over("in stripes", databases("oracle_stripes"), stripes()),
    ]
    made = World(plain, fleets, oracle_outcomes)
    yield made
    plain.dispose()
    for fleet in fleets:
        fleet.dispose()


# --- what is compared ----------------------------------------------------------------------------------------------


def shown(value: Any) -> Any:
    """A value, or the content of an entity, with its type."""
    if isinstance(value, Base):
        loaded = [
            value.__dict__[name] for name in sorted(value.__mapper__.attrs.keys()) if name in value.__dict__
        ]
        return type(value).__name__, *(shown(attribute) for attribute in loaded)
    if isinstance(value, list):
        return [shown(item) for item in value]
    return type(value).__name__, str(value)


def answer(session: Session, statement: Any, parameters: Any, *, ordered: bool, unique: bool) -> Any:
    """The rows of a result, or the kind of error that the database raised."""
    try:
        result = session.execute(statement, parameters)
        found = [tuple(shown(value) for value in row) for row in (result.unique() if unique else result)]
    except (DBAPIError, StatementError) as error:
        return type(error.orig).__name__
    return found if ordered else sorted(found)


def compare(world: World, fleet: Fleet, statement: Any, parameters: Any, **how: bool) -> None:
    note(f"{statement.compile(world.plain)}\n{parameters}")
    with Session(world.plain) as session:
        expected = answer(session, statement, parameters, **how)
    with fleet.session() as routed:
        try:
            got = answer(routed, statement, parameters, **how)
        except (UnroutableQuery, KeyTypeError) as error:
            world.outcomes.refused(error)
            return
        world.outcomes.answered(routed.plans[-1])
    assert got == expected


# --- SELECT --------------------------------------------------------------------------------------------------------

keys = st.sampled_from(KEYS)
numbers = st.one_of(st.none(), st.integers(-1, 5))
ENTITIES: list[Any] = [Account, Note, Mark]


def key(entity: Any) -> Any:
    return entity.id if hasattr(entity, "name") else entity.owner


def identity(entity: Any) -> list[Any]:
    return [entity.owner, entity.number] if hasattr(entity, "body") else [entity.id]


class Statements:
    """Draws one statement. What it is made of is weighted towards what can be answered."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw
        self.parameters: dict[str, Any] = {}
        self.ordered = self.unique = False

    def chance(self, percent: int) -> bool:
        return bool(self.draw(st.integers(0, 99)) < percent)

    def one(self, *choices: Any) -> Any:
        return self.some(choices, 1, 1)[0]

    def some(self, choices: Sequence[Any], least: int, most: int) -> list[Any]:
        # By number: sampled_from() keeps strategies by the equality of their elements, and that of SQL elements is SQL.
        drawn = self.draw(st.lists(st.integers(0, len(choices) - 1), min_size=least, max_size=most))
        return [choices[number] for number in drawn]

    def source(self) -> Any:
        entity = self.one(*ENTITIES)
        return aliased(entity) if self.chance(30) else entity

    def value(self) -> Any:
        """A key as statements have it: mostly an int, sometimes something near it."""
        name = f"k{len(self.parameters)}"
        if self.chance(10):
            self.parameters[name] = self.one(None, "5", 5.0, 4.6, True, 2**70, "x")
            return bindparam(name, type_=BigInteger())
        number = self.draw(keys)
        if self.chance(30):
            self.parameters[name] = number
            return bindparam(name)
        return self.one(number, number, number, literal(number), literal(float(number)))

    def listed(self) -> Any:
        chosen = self.draw(st.lists(keys, max_size=5))
        if self.chance(30):
            name = f"k{len(self.parameters)}"
            self.parameters[name] = chosen
            return bindparam(name, expanding=True)
        return chosen

    # --- conditions ------------------------------------------------------------------------------------------------

    def condition(self, sources: list[Any], depth: int) -> Any:
        one, other = self.one(*sources), self.one(*sources)
        kinds = ["key", "key", "key", "in", "in", "number", "pair"]
        if depth:
            kinds += ["or", "and", "not", "exists", "exists", "in-subquery", "scalar"]
        kind = self.one(*kinds)
        if kind == "key":
            return self.one(key(one) == self.value(), key(one) == self.value(), key(one) > self.draw(keys))
        if kind == "in":
            if hasattr(one, "body") and self.chance(40):
                pairs = [
                    (number, self.draw(st.integers(0, 2))) for number in self.draw(st.lists(keys, max_size=4))
                ]
                return tuple_(one.owner, one.number).in_(pairs)
            return self.one(
                key(one).in_(self.listed()), key(one).in_(self.listed()), key(one).not_in(self.listed())
            )
        if kind == "number":
            return self.one(one.n == self.draw(numbers), one.n > 2, one.n.is_(None), one.n.in_([1, 2, None]))
        if kind == "pair":
            return self.one(key(one) == key(other), one.n == other.n, key(one) == other.n)
        if kind in ("or", "and"):
            parts = [self.condition(sources, depth - 1) for _ in range(2)]
            return or_(*parts) if kind == "or" else and_(*parts)
        if kind == "not":
            return not_(self.condition(sources, depth - 1))
        return self.subquery(kind, sources, one, depth)

    def subquery(self, kind: str, sources: list[Any], one: Any, depth: int) -> Any:
        inner = aliased(self.one(*ENTITIES))
        criteria = [self.condition([inner], depth - 1)] if self.chance(50) else []
        if self.chance(70):
            criteria.append(key(inner) == key(one))
        if kind == "exists":
            found = exists().where(*criteria) if criteria else exists(select(inner.n))
            return not_(found) if self.chance(30) else found
        if kind == "in-subquery":
            return key(one).in_(select(key(inner)).where(*criteria))
        return one.n == select(func.max(inner.n)).where(*criteria).scalar_subquery()

    # --- blocks ----------------------------------------------------------------------------------------------------

    def block(self, columns: Callable[[list[Any]], list[Any]]) -> Any:
        sources = [self.source(), *(aliased(self.one(*ENTITIES)) for _ in range(self.one(0, 0, 0, 1, 1, 2)))]
        statement = select(*columns(sources)).select_from(sources[0])
        for place, source in enumerate(sources[1:], start=1):
            statement = self.joined(statement, sources[:place], source)
        for _ in range(self.one(0, 1, 1, 1, 2)):
            statement = statement.where(self.condition(sources, self.one(0, 0, 0, 1, 2)))
        if self.chance(35):
            bound = self.value()
            for source in sources:
                statement = statement.where(key(source) == (self.value() if self.chance(15) else bound))
        return statement, sources

    def joined(self, statement: Any, before: list[Any], source: Any) -> Any:
        one = self.one(*before)
        on = key(source) == key(one)
        if self.chance(15):
            on = source.n == one.n
        if self.chance(30):
            on = and_(on, self.condition([one, source], 1))
        return statement.join(source, on, isouter=self.chance(30), full=self.chance(12))

    def plain_columns(self, sources: list[Any]) -> list[Any]:
        if self.chance(50):
            return list(dict.fromkeys(sources))
        made: list[Any] = []
        for source in sources:
            made += [key(source).label(f"k{len(made)}"), self.number_of(source).label(f"n{len(made)}")]
        return made

    def number_of(self, source: Any) -> Any:
        return self.one(
            source.n,
            source.n + 1,
            func.coalesce(source.n, 7),
            case((source.n > 2, 1), else_=0),
            func.rank().over(partition_by=key(source), order_by=identity(source)),
            func.rank().over(order_by=identity(source)),
            select(func.count()).where(key(m := aliased(Mark)) == key(source), m.n > 0).scalar_subquery(),
        )

    def aggregates(self, sources: list[Any]) -> list[Any]:
        source = self.one(*sources)
        choices = [
            func.count(),
            func.count(source.n),
            func.sum(source.n),
            func.sum(key(source)),
            func.min(source.n),
            func.max(key(source)),
            func.count(key(source)).filter(source.n > 1),
            func.count(source.n.distinct()),
            func.avg(source.n),
            func.sum(source.n) + 1,
        ]
        chosen = self.some(choices[:7] if self.chance(60) else choices, 1, 3)
        return [column.label(f"a{number}") for number, column in enumerate(chosen)]

    def statement(self) -> Any:
        kinds = (
            ["simple"] * 3
            + ["outer"] * 2
            + ["rows"] * 2
            + ["aggregates", "grouped", "wrapped", "union", "eager"]
        )
        kind = self.one(*kinds)
        if kind == "outer":
            return self.outer()
        if kind == "simple":
            return self.simple()
        if kind == "aggregates":
            return self.block(self.aggregates)[0]
        if kind == "grouped":
            statement, sources = self.block(
                lambda sources: [key(sources[0]).label("g"), *self.aggregates(sources)]
            )
            return statement.group_by(key(sources[0]))
        if kind == "eager":
            return self.eager()
        if kind == "union":
            return self.united()
        statement, sources = self.block(self.plain_columns)
        return self.wrapped(statement) if kind == "wrapped" else self.finished(statement, sources)

    def simple(self) -> Any:
        """One source or several that are joined by their keys: what can run on several shards, and one thing more."""
        sources = [self.source(), *(aliased(self.one(*ENTITIES)) for _ in range(self.one(0, 0, 1)))]
        columns = self.one(
            self.aggregates, self.plain_columns, self.plain_columns, lambda sources: [sources[0].n]
        )
        statement = select(*columns(sources)).select_from(sources[0])
        for source in sources[1:]:
            statement = statement.join(source, key(source) == key(sources[0]))
        for _ in range(self.one(0, 0, 1, 2)):
            statement = statement.where(self.condition(sources, 0))
        if self.chance(40):
            statement = statement.where(key(sources[0]).in_(self.listed()))
        return (
            self.finished(statement, sources) if columns != self.aggregates and self.chance(40) else statement
        )

    def outer(self) -> Any:
        """An outer join, with constants on either side of ON and WHERE."""
        one, other = self.source(), aliased(self.one(*ENTITIES))
        number = self.draw(keys)
        second = self.draw(keys) if self.chance(20) else number
        constants = [key(one) == number, key(other) == second, key(other).in_([second]), key(other).is_(None)]
        on = self.one(
            key(other) == key(one), key(other) == key(one), key(other) == key(one), other.n == one.n
        )
        if self.chance(50):
            on = and_(on, self.one(*constants))
        statement = select(key(one).label("a"), one.n.label("b"), key(other).label("c"), other.n.label("d"))
        if self.chance(15):
            return statement.where(*constants[:2])
        statement = statement.select_from(one).join(other, on, isouter=True, full=self.chance(40))
        return statement.where(*self.some(constants, 0, 2))

    def finished(self, statement: Any, sources: list[Any]) -> Any:
        """With a clause after WHERE, or none."""
        clause = self.one("order", "order", "distinct", "lock", "group", None, None)
        if clause == "order":
            self.ordered = True
            terms = [term for source in sources for term in identity(source)]
            statement = statement.order_by(
                *(self.one(term.asc(), term.desc().nulls_last()) for term in terms)
            )
            if self.chance(50):
                statement = statement.limit(self.one(0, 1, 3)).offset(self.one(None, 1, 50))
        elif clause == "distinct":
            statement = statement.with_only_columns(sources[0].n).distinct()
        elif clause == "group":
            columns = [sources[0].n, func.count()][: self.one(1, 2)]
            statement = statement.with_only_columns(*columns).group_by(sources[0].n)
        elif clause == "lock":
            statement = statement.with_for_update()
        return statement

    def eager(self) -> Any:
        self.unique = True
        criterion = Account.id == self.value() if self.chance(70) else self.condition([Account], 1)
        return select(Account).options(self.one(joinedload, selectinload)(Account.notes)).where(criterion)

    def wrapped(self, statement: Any) -> Any:
        inner = statement.limit(None).subquery() if self.chance(50) else statement.cte()
        columns = list(inner.c)
        wanted = select(*(column.label(f"w{number}") for number, column in enumerate(columns)))
        if self.chance(30):
            wanted = select(func.count()).select_from(inner)
        return wanted

    def united(self) -> Any:
        def branch() -> Any:
            return self.block(lambda sources: [key(sources[0]).label("k"), sources[0].n.label("n")])[0]

        return self.one(union, union_all)(branch(), branch())


@given(data=st.data())
@EXAMPLES
def test_a_select_returns_what_one_database_returns_or_is_refused(world: World, data: st.DataObject) -> None:
    drawn = Statements(data.draw)
    statement = drawn.statement()
    fleet = data.draw(st.sampled_from(world.fleets))
    compare(world, fleet, statement, drawn.parameters, ordered=drawn.ordered, unique=drawn.unique)


# --- writing -------------------------------------------------------------------------------------------------------


class Writes(Statements):
    """Draws one statement that writes."""

    def write(self) -> tuple[Any, Any]:
        kind = self.one("update", "update", "update from", "delete", "insert", "values", "upsert", "many")
        if kind.startswith("insert") or kind in ("values", "upsert"):
            return self.insertion(kind)
        entity = self.one(*ENTITIES)
        if kind == "many":
            return self.many(entity)
        criteria = [self.condition([entity], self.one(0, 0, 1, 2)) for _ in range(self.one(0, 1, 2))]
        if self.chance(40):
            criteria.append(key(entity) == self.value())
        value: Any = self.one(
            entity.n + 1,
            77,
            None,
            case((entity.n > 1, 5), else_=entity.n),
            case((func.now() == func.current_timestamp(), entity.n + 2), else_=0),
        )
        if self.chance(15):
            criteria.append(self.one(func.now() <= func.statement_timestamp(), func.current_date() > func.now()))
        if kind == "update from":
            other = aliased(self.one(*ENTITIES))
            criteria.append(
                self.one(key(other) == key(entity), key(other) == key(entity), other.n == entity.n)
            )
            value = select(func.max(other.n)).scalar_subquery() if self.chance(10) else key(other)
        statement: Any = update(entity).values(n=value)
        if kind == "delete" or (kind == "update from" and self.chance(40)):
            statement = delete(entity)
        statement = statement.where(*criteria).execution_options(synchronize_session=False)
        return (statement.returning(*identity(entity)) if self.chance(40) else statement), self.parameters

    def many(self, entity: Any) -> tuple[Any, Any]:
        table = entity.__table__
        column = table.c[{"note": "user"}.get(table.name, key(entity).key)]
        statement = update(table).where(column == bindparam("wanted")).values(n=bindparam("given"))
        chosen = self.draw(st.lists(keys, min_size=1, max_size=4))
        return statement, [{"wanted": number, "given": number + 50} for number in chosen]

    def insertion(self, kind: str) -> tuple[Any, Any]:
        table = Base.metadata.tables["note"]
        chosen = self.draw(st.lists(keys, min_size=1, max_size=4, unique=True))
        given = [{"user": number, "number": self.one(0, 5), "body": "new", "n": None} for number in chosen]
        if kind == "insert":
            if self.chance(50):
                return insert(table).values(**given[0]), {}
            return insert(table), given
        if kind == "values":
            statement: Any = insert(table).values(given)
            return (statement.returning(table.c.user, table.c.number) if self.chance(60) else statement), {}
        made = upsert(table)
        target = self.one(["user", "number"], ["number"])
        if self.chance(50):
            changed = {"body": made.excluded.body, "n": table.c.n + 1}
            return made.on_conflict_do_update(index_elements=target, set_=changed), given
        return made.on_conflict_do_nothing(index_elements=self.one(target, None)), given


def contents(connections: Any, topology: Topology | None) -> tuple[list[Any], list[Any]]:
    """The rows of all tables, those in transit apart."""
    owned: list[Any] = []
    strays: list[Any] = []
    for number, connection in connections.items():
        for table in Base.metadata.sorted_tables:
            for row in connection.execute(select(table)):
                at = position(row._mapping[key_column(table)])
                here = topology is None or topology.ring.owner_at(at) == number
                (owned if here else strays).append((table.name, *map(str, row)))
    return sorted(owned), sorted(strays)


def written(
    session: Session, connections: Any, topology: Topology | None, statement: Any, parameters: Any
) -> Any:
    """What a statement returned, its row count and all rows after it, or the kind of error."""
    try:
        result: Any = session.execute(statement, parameters)
        returned = (
            sorted(tuple(map(str, row)) for row in result) if getattr(result, "returns_rows", True) else None
        )
        return returned, getattr(result, "rowcount", None), contents(connections, topology)[0]
    except (DBAPIError, StatementError) as error:
        return type(error.orig).__name__


@given(data=st.data())
@EXAMPLES
def test_a_write_leaves_what_one_database_has_or_is_refused(world: World, data: st.DataObject) -> None:
    drawn = Writes(data.draw)
    statement, parameters = drawn.write()
    fleet = data.draw(st.sampled_from(world.fleets))
    note(f"{statement.compile(world.plain)}\n{parameters}")
    with world.plain.connect() as connection, Session(connection) as session:
        expected = written(session, {0: connection}, None, statement, parameters)
        session.rollback()
    with fleet.session() as routed:
        before = contents(routed.connections, fleet.topology)[1]
        try:
            got = written(routed, routed.connections, fleet.topology, statement, parameters)
        except (UnroutableQuery, KeyTypeError) as error:
            world.outcomes.refused(error)
            return
        assert got == expected
        world.outcomes.answered(routed.plans[-1])
        if not isinstance(got, str):
            assert contents(routed.connections, fleet.topology)[1] == before
