"""Everything a SELECT may be, over shards against one plain database: types, orders, aggregates, what the ORM adds.

`test_routing_oracle` looks at what binds a statement to a key; here statements are mostly not bound, so that they are
made in parts, finished by a shard, or run over rows that are read. Equal rows, NULL and values next to each other are
common. Where ORDER BY leaves rows tied and LIMIT cuts among them any choice is right, and it is checked that the choice
is one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import HealthCheck, given, note, seed, settings
from hypothesis import strategies as st
from sqlalchemy import (
    BigInteger,
    Engine,
    and_,
    case,
    create_engine,
    desc,
    distinct,
    except_,
    except_all,
    exists,
    func,
    intersect,
    intersect_all,
    literal,
    not_,
    null,
    or_,
    select,
    union,
    union_all,
)
from sqlalchemy.exc import DBAPIError, InvalidRequestError, StatementError
from sqlalchemy.orm import (
    Session,
    aliased,
    joinedload,
    selectinload,
    subqueryload,
    with_loader_criteria,
    with_polymorphic,
)

from shardkit.core.errors import KeyTypeError, UnroutableQuery
from shardkit.dev import Clusters
from shardkit.storage.urls import sqlalchemy_url
from tests.fix_oracle import Outcomes
from tests.routed import Fleet, stripes, thirds, with_transit
from tests.wide import KEYS, NAMES, Base, Mood, Person, Photo, Post, Star, Worker, rows

# SQLAlchemy warns of some drawn statements, and only when it compiles one for the first time.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.* statement has a cartesian product"),
    pytest.mark.filterwarnings("ignore:Multiple rows returned with uselist=False"),
]

CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


@dataclass
class World:
    """One plain database and fleets with its rows, all of which one planner plans for: to it they are one cluster at
    rest, in the middle of moves, and after them."""

    plain: Engine = field(repr=False)
    fleets: list[Fleet] = field(repr=False)
    outcomes: Outcomes


@pytest.fixture(scope="module")
def world(servers: Clusters, oracle_outcomes: Outcomes) -> Iterator[World]:
    def databases(name: str) -> list[str]:
        return [server.create_database(f"{name}_{number}") for number, server in enumerate(servers[:3])]

    metadata = Base.metadata
    plain = create_engine(sqlalchemy_url(servers[0].create_database("wide_plain")))
    metadata.create_all(plain)
    with plain.begin() as connection:
        for table, row in rows():
            connection.execute(table.insert(), row)
    topologies = {
        "rest": thirds(metadata=metadata),
        "transit": with_transit(thirds(metadata=metadata)),
        "stripes": stripes(metadata=metadata),
    }
    fleets = [
        Fleet.over(name, databases(f"wide_{name}"), topology, metadata, rows())
        for name, topology in topologies.items()
    ]
    for fleet in fleets[1:]:
        fleet.planner = fleets[0].planner
    yield World(plain, fleets, oracle_outcomes)
    plain.dispose()
    for fleet in fleets:
        fleet.dispose()


# --- what is compared ----------------------------------------------------------------------------------------------


def shown(value: Any) -> Any:
    """A value, or the content of an entity, with its type.

    Sums of floats depend on the order of what is added; and of equal values that are written differently (1.5 and 1.50,
    0 and -0) any one may stand for a group.
    """
    if isinstance(value, Base):
        names = sorted(value.__mapper__.attrs.keys())
        return type(value).__name__, *(
            shown(value.__dict__[name]) for name in names if name in value.__dict__
        )
    if isinstance(value, list):
        return [shown(item) for item in value]
    if isinstance(value, float):
        return "float", f"{value or 0.0:.9g}"
    if isinstance(value, Decimal):
        return "Decimal", str(value.normalize())
    return type(value).__name__, str(value)


class Failed(str):
    """The kind of error that the database raised."""


def answer(session: Session, statement: Any, *, unique: bool) -> list[Any] | Failed:
    """The rows of a result, or the kind of error."""
    try:
        result = session.execute(statement)
        return [tuple(shown(value) for value in row) for row in (result.unique() if unique else result)]
    except (DBAPIError, StatementError) as error:
        return Failed(type(error.orig).__name__)
    except InvalidRequestError:  # rows of a FULL JOIN that no class of the hierarchy can be made of
        return Failed("InvalidRequestError")


def check(drawn: Drawn, expected: Any, got: Any, everything: Callable[[], Any]) -> None:
    """Whether what the shards answer is what one database might answer."""
    if isinstance(expected, Failed) or isinstance(got, Failed):
        assert got == expected
    elif not drawn.cut:
        assert Counter(map(str, got)) == Counter(map(str, expected))
    else:
        assert len(got) == len(expected)
        whole = everything()
        # All of the rows may hold one that no entity can be made of, where the cut ones do not.
        assert isinstance(whole, Failed) or not Counter(map(str, got)) - Counter(map(str, whole))
    if drawn.keys and not isinstance(got, Failed):
        # Rows that are tied may be in any order, but what they are ordered by is in one.
        assert [row[: drawn.keys] for row in got] == [row[: drawn.keys] for row in expected]


def compare(world: World, fleets: Sequence[Fleet], drawn: Drawn) -> None:
    note(str(drawn.statement.compile(world.plain)))
    with Session(world.plain) as session:
        expected = answer(session, drawn.statement, unique=drawn.unique)

    def everything() -> Any:
        with Session(world.plain) as session:
            return answer(session, drawn.whole, unique=drawn.unique)

    for fleet in fleets:
        with fleet.session() as routed:
            try:
                got = answer(routed, drawn.statement, unique=drawn.unique)
            except (UnroutableQuery, KeyTypeError) as error:
                world.outcomes.refused(error)
                continue
            world.outcomes.answered(routed.plans[-1])
        check(drawn, expected, got, everything)


# --- drawing -------------------------------------------------------------------------------------------------------


@dataclass
class Drawn:
    """A statement, ``whole`` without its LIMIT and OFFSET; its first ``keys`` columns are what it is ordered by."""

    statement: Any
    whole: Any
    keys: int = 0
    cut: bool = False
    unique: bool = False


class Statements:
    """Draws one statement."""

    def __init__(self, draw: Callable[[st.SearchStrategy[Any]], Any]) -> None:
        self._draw = draw

    def chance(self, percent: int) -> bool:
        return bool(self._draw(st.integers(0, 99)) < percent)

    def one(self, *choices: Any) -> Any:
        # By number: SQL elements redefine equality.
        return choices[self._draw(st.integers(0, len(choices) - 1))]

    def several(self, choices: Sequence[Any], least: int, most: int) -> list[Any]:
        return [self.one(*choices) for _ in range(self._draw(st.integers(least, most)))]

    # --- sources ---------------------------------------------------------------------------------------------------

    def source(self) -> Any:
        entity = self.one(Person, Person, Person, Post, Post, Post, Star, Worker, Photo)
        return aliased(entity) if self.chance(35) else entity

    def key(self, source: Any) -> Any:
        return source.id if self.is_person(source) else source.owner

    def is_person(self, source: Any) -> bool:
        return hasattr(source, "height")

    def identity(self, source: Any) -> list[Any]:
        if self.is_person(source) or hasattr(source, "by"):
            return [source.id]
        return [source.owner, source.number]

    def attributes(self, source: Any) -> list[Any]:
        """Columns of all types, and what the ORM makes of them."""
        if self.is_person(source):
            own = [source.wage] if hasattr(source, "wage") else []
            return [
                *own, source.id, source.name, source.code, source.score, source.height, source.born, source.mood,
                source.flag, source.gap, source.token, source.double, source.post_count, source.kind,
            ]  # fmt: skip
        if hasattr(source, "by"):
            return [source.owner, source.number, source.by, source.id]
        return [
            source.owner,
            source.number,
            source.title,
            source.likes,
            source.rating,
            source.at,
            source.kind,
        ]

    def number(self, source: Any) -> Any:
        if self.is_person(source):
            return self.one(source.score, source.id, func.length(source.name), source.post_count)
        if hasattr(source, "by"):
            return self.one(source.number, source.by)
        return self.one(source.likes, source.rating, source.number, source.likes * 2 - source.number)

    def expression(self, source: Any) -> Any:
        """Something to select, to sort or to group by."""
        column = self.one(*self.attributes(source))
        return self.one(
            column, column, column, column,
            func.coalesce(self.number(source), 3),
            case((self.number(source) > 1, "big"), else_="small"),
            func.upper(source.name) if self.is_person(source) else source.number % 2,
            self.number(source).is_(None),
        )  # fmt: skip

    # --- conditions ------------------------------------------------------------------------------------------------

    def condition(self, sources: Sequence[Any], depth: int) -> Any:
        source = self.one(*sources)
        kinds = ["key", "key", "column", "column", "column", "pair"]
        kinds += ["or", "and", "not", "exists", "in", "scalar"] if depth else []
        kind = self.one(*kinds)
        if kind == "key":
            number = self.one(*KEYS)
            key = self.key(source)
            some = self.several(KEYS, 0, 5)
            return self.one(
                key == number, key > number, key.in_(some), key.not_in(some), key.between(-1, number)
            )
        if kind == "column":
            return self.on_column(source)
        if kind == "pair":
            other = self.one(*sources)
            return self.one(self.key(source) == self.key(other), self.number(source) >= self.number(other))
        if kind in ("or", "and"):
            parts = [self.condition(sources, depth - 1) for _ in range(2)]
            return or_(*parts) if kind == "or" else and_(*parts)
        if kind == "not":
            return not_(self.condition(sources, depth - 1))
        return self.subquery(kind, source, depth)

    def on_column(self, source: Any) -> Any:
        if self.is_person(source):
            return self.one(
                source.name.in_([name for name in self.several(NAMES, 0, 3) if name is not None]),
                source.name > self.one("", "a", "Z"),
                source.score.between(Decimal(-3), Decimal("1.5")),
                source.height < 2,
                source.mood == self.one(*Mood),
                source.mood > Mood.SAD,
                source.flag.is_(True),
                source.gap > timedelta(days=1),
                source.tags.contains(["x"]),
                source.data["a"].as_integer() == 1,
                source.double > 0,
                source.post_count > 1,
                source.posts.any(),
            )
        if hasattr(source, "by"):
            return self.one(source.by.is_(None), source.by == self.one(*KEYS), source.number > 0)
        return self.one(
            source.title.like("%a%"),
            source.likes.is_not(None),
            source.rating * 2 > 1,
            source.at.is_(None),
            source.person.has(Person.flag.is_(None)),
            source.stars.any(Star.by.is_not(None)),
        )

    def subquery(self, kind: str, source: Any, depth: int) -> Any:
        inner = aliased(self.one(Person, Post, Star))
        criteria = [self.condition([inner], depth - 1)] if self.chance(50) else []
        if self.chance(65):
            criteria.append(self.key(inner) == self.key(source))
        if kind == "exists":
            found = exists().where(*criteria) if criteria else exists(select(self.key(inner)))
            return not_(found) if self.chance(30) else found
        if kind == "in":
            wanted = select(self.key(inner)).where(*criteria)
            if self.chance(15):
                wanted = wanted.order_by(*self.identity(inner)).limit(3)
            return self.one(self.key(source).in_(wanted), self.key(source).not_in(wanted))
        made = self.one(func.max, func.count, func.sum, func.avg)(self.number(inner))
        return self.number(source) > select(made).where(*criteria).scalar_subquery()

    # --- blocks ----------------------------------------------------------------------------------------------------

    def sources(self) -> tuple[list[Any], Callable[[Any], Any]]:
        """Sources, and what puts them and some conditions into a statement."""
        first = self.source()
        others = [aliased(self.one(Person, Post, Star, Photo)) for _ in range(self.one(0, 0, 0, 1, 1, 2))]
        joins = []
        for place, other in enumerate(others):
            one = self.one(first, *others[:place])
            on = self.key(other) == self.key(one)
            if self.chance(15):
                on = self.number(other) == self.number(one)
            if self.chance(25):
                on = and_(on, self.condition([one, other], 0))
            joins.append((other, on, self.chance(35), self.chance(8)))
        criteria = [
            self.condition([first, *others], self.one(0, 0, 1, 2)) for _ in range(self.one(0, 0, 1, 1, 2))
        ]

        def build(statement: Any) -> Any:
            statement = statement.select_from(first)
            for other, on, outer, full in joins:
                statement = statement.join(other, on, isouter=outer, full=full)
            return statement.where(*criteria)

        return [first, *others], build

    def ordered(self, statement: Any, terms: Sequence[Any]) -> Any:
        def directed(term: Any) -> Any:
            term = self.one(term, term.asc(), term.desc())
            return self.one(term, term, term.nulls_first(), term.nulls_last())

        return statement.order_by(*(directed(term) for term in terms))

    def limited(self, statement: Any, keys: int = 0, *, unique: bool = False) -> Drawn:
        if not self.chance(60 if keys else 10):
            return Drawn(statement, statement, keys, unique=unique)
        limit, offset = self.one(0, 1, 2, 3, 5, 7, 100, None), self.one(None, None, 0, 1, 2, 6, 1000)
        return Drawn(statement.limit(limit).offset(offset), statement, keys, cut=True, unique=unique)

    def statement(self) -> Drawn:
        drawn = self.plain_statement()
        if not self.chance(15):
            return drawn
        # Conditions of options hold in every block that names the entity.
        entity, criterion = self.one(
            (Post, Post.likes > 1), (Post, Post.owner == self.one(*KEYS)), (Person, Person.flag.is_not(None)),
            (Star, Star.owner.in_(self.several(KEYS, 0, 4))),
        )  # fmt: skip
        option = with_loader_criteria(entity, criterion, include_aliases=self.chance(80))
        return replace(drawn, statement=drawn.statement.options(option), whole=drawn.whole.options(option))

    def plain_statement(self) -> Drawn:
        kind = self.one(
            "rows", "rows", "rows", "rows", "entities", "entities", "distinct", "grouped", "grouped", "grouped",
            "totals", "window", "united", "wrapped", "eager",
        )  # fmt: skip
        return getattr(self, f"draw_{kind}")()  # type: ignore[no-any-return]

    def draw_rows(self) -> Drawn:
        sources, build = self.sources()
        terms = [self.expression(self.one(*sources)).label(f"o{n}") for n in range(self.one(0, 1, 1, 2, 3))]
        columns = [self.expression(self.one(*sources)).label(f"c{n}") for n in range(self.one(1, 1, 2))]
        statement = build(select(*terms, *columns))
        return self.limited(self.ordered(statement, terms) if terms else statement, len(terms))

    def draw_entities(self) -> Drawn:
        sources, build = self.sources()
        if sources[0] is Worker:
            # SQLAlchemy reads the wage of a person who is a worker from the row's worker.wage, whose row that may be:
            # then the order of the rows decides what is loaded, in one database as well.
            sources = [source for source in sources if source is Worker or not self.is_person(source)]
        statement = build(select(*dict.fromkeys(sources)))
        if not self.chance(50):
            return Drawn(statement, statement)
        terms = [self.expression(self.one(*sources)) for _ in range(self.one(1, 2))]
        terms += [term for source in sources for term in self.identity(source)]
        whole = self.ordered(statement, terms)
        drawn = self.limited(whole)
        # Nothing is tied, so that what LIMIT leaves is known.
        return Drawn(drawn.statement, whole, keys=len(sources), cut=drawn.cut)

    def draw_distinct(self) -> Drawn:
        sources, build = self.sources()
        columns = [self.expression(self.one(*sources)).label(f"c{n}") for n in range(self.one(1, 1, 2, 3))]
        statement = build(select(*columns)).distinct()
        if self.chance(50):
            return self.limited(self.ordered(statement, columns), len(columns))
        return self.limited(statement)

    def aggregate(self, source: Any) -> Any:
        number = self.number(source)
        return self.one(
            func.count(), func.count(number), func.sum(number), func.min(number), func.max(number), func.avg(number),
            func.min(self.one(*self.attributes(source)[:7])), func.count(number.distinct()),
            func.count(number).filter(number > 1), func.sum(number) + func.count(), func.round(func.avg(number), 2),
            func.coalesce(func.sum(number), 0), func.bool_or(number > 1), func.bit_or(self.key(source)),
            func.stddev(number), func.array_agg(func.coalesce(number, 0).distinct()),
        )  # fmt: skip

    def draw_grouped(self) -> Drawn:
        sources, build = self.sources()
        groups = [self.expression(self.one(*sources)).label(f"g{n}") for n in range(self.one(1, 1, 2))]
        if self.chance(20):
            groups[0] = self.key(sources[0]).label("g0")
        made = [self.aggregate(self.one(*sources)).label(f"a{n}") for n in range(self.one(0, 1, 2))]
        statement = build(select(*groups, *made)).group_by(*groups)
        if self.chance(30):
            statement = statement.having(self.one(func.count() > 1, func.max(self.number(sources[0])) > 1))
        if self.chance(50):
            return self.limited(self.ordered(statement, groups), len(groups))
        return self.limited(statement)

    def draw_totals(self) -> Drawn:
        sources, build = self.sources()
        made = [self.aggregate(self.one(*sources)).label(f"a{n}") for n in range(self.one(1, 2, 3))]
        statement = build(select(*made))
        if self.chance(15):
            statement = statement.having(func.count() > self.one(0, 1000))
        return Drawn(statement, statement)

    def draw_window(self) -> Drawn:
        sources, build = self.sources()
        source = self.one(*sources)
        by = [term for one in sources for term in self.identity(one)]
        partition = self.one(None, self.key(sources[0]), self.expression(source))
        made = self.one(
            func.rank().over(partition_by=partition, order_by=by),
            func.sum(self.number(source)).over(partition_by=partition),
            func.lag(self.number(source)).over(partition_by=partition, order_by=by),
            func.count().over(),
        )
        statement = build(select(*(term.label(f"i{n}") for n, term in enumerate(by)), made.label("w")))
        return self.limited(statement)

    def draw_united(self) -> Drawn:
        """Set operations: of columns of which the first is the key, or of columns of one kind of all entities."""
        kind = self.one("keys", "keys", "texts", "texts", "numbers", "moments")
        made = self.united(kind, self.one(0, 0, 1))
        how = self.one("rows", "rows", "read", "joined", "entities")
        if how == "entities" and kind == "keys":
            return self.united_entities()
        if how == "joined" and kind == "keys":
            derived, other = made.subquery(), aliased(self.one(Person, Post))
            statement = select(derived, self.key(other).label("o")).join(
                other, self.key(other) == derived.c.k, isouter=self.chance(30)
            )
            if self.chance(40):
                statement = statement.where(self.one(derived.c.k, self.key(other)) == self.one(*KEYS))
            return self.limited(self.ordered(statement, [derived.c.k, derived.c.n]), 2)
        if how == "read":
            return self.read_united(made.subquery() if self.chance(60) else made.cte())
        if self.chance(50):
            names = self.one(("k", "n"), ("k", "n"), (desc("k"), "n"))
            return self.limited(made.order_by(*names), 2)
        return self.limited(made)

    def united(self, kind: str, depth: int) -> Any:
        operation = self.one(
            union_all, union_all, union_all, union, union, except_, intersect, except_all, intersect_all
        )
        branches = [self.branch(kind, depth) for _ in range(self.one(2, 2, 3))]
        return operation(*branches)

    def branch(self, kind: str, depth: int) -> Any:
        if depth and self.chance(30):
            return self.united(kind, depth - 1)
        n = literal(self.one(1, 2)).label("n")
        if self.chance(12):
            free = {"keys": literal(self.one(*KEYS), BigInteger), "texts": literal(self.one("a", "b")),
                    "numbers": literal(self.one(1, 2)), "moments": null()}  # fmt: skip
            statement = select(self.one(free[kind], null()).label("k"), n)
            return statement.where(literal(1) == 2) if self.chance(10) else statement
        sources, build = self.sources()
        source = sources[0]
        if kind == "keys":
            column = self.key(source)
        elif kind == "texts":
            column = (
                self.one(source.name, source.code)
                if self.is_person(source)
                else source.kind
                if not hasattr(source, "by")
                else null()
            )
        elif kind == "numbers":
            column = self.number(source)
        else:
            column = source.born if self.is_person(source) else getattr(source, "at", null())
        if kind != "moments" and self.chance(10):
            made = self.one(func.min(column), func.max(column)).label("k")
            return (
                build(select(made, n)).where(self.key(source) == self.one(*KEYS))
                if self.chance(70)
                else build(select(made, n))
            )
        statement = build(select(column.label("k"), n))
        return statement.distinct() if self.chance(15) else statement

    def read_united(self, derived: Any) -> Drawn:
        k, n = derived.c.k, derived.c.n
        if self.chance(40):
            statement = select(k.label("o0"), n.label("o1"), (n * 2).label("c"))
            statement = statement.where(self.one(n > 1, k.is_not(None), n.in_([1, 2])))
            statement = statement.distinct() if self.chance(20) else statement
            return self.limited(self.ordered(statement, [k, n]), 2)
        made = self.one(
            func.count(),
            func.count(k),
            func.max(k),
            func.min(k),
            func.sum(n),
            func.avg(n),
            func.count(distinct(k)),
        )
        statement = (
            select(made.label("m")) if self.chance(50) else select(n.label("o"), made.label("m")).group_by(n)
        )
        return Drawn(statement, statement)

    def united_entities(self) -> Drawn:
        entity = self.one(Person, Post, Star)
        branches = [select(entity).where(self.condition([entity], 1)) for _ in range(2)]
        if entity is Person:  # its json and arrays are not compared
            made = union_all(*branches)
        else:
            made = self.one(union_all, union, except_, intersect)(*branches)
        whole = select(entity).from_statement(made)
        return Drawn(whole, whole)

    def draw_wrapped(self) -> Drawn:
        inner = self.one(self.draw_rows, self.draw_grouped, self.draw_distinct, self.draw_window)()
        derived = (
            inner.whole.order_by(None).subquery() if self.chance(50) else inner.whole.order_by(None).cte()
        )
        columns = [column.label(f"w{n}") for n, column in enumerate(derived.c)]
        statement = self.one(select(*columns), select(func.count()).select_from(derived))
        return Drawn(statement, statement)

    def draw_eager(self) -> Drawn:
        loader = self.one(joinedload, selectinload, subqueryload)
        entity: Any = self.one(Person, Person, Post, with_polymorphic(Person, "*"))
        if entity is Post:
            options = [
                self.one(loader(Post.person), loader(Post.stars), joinedload(Post.person, innerjoin=True))
            ]
        elif entity is Person:
            options = [loader(Person.posts)]
            options += (
                [self.one(joinedload, selectinload)(Person.posts, Post.stars)] if self.chance(20) else []
            )
        else:
            options = []
        statement = select(entity).options(*options)
        statement = statement.where(*(self.condition([entity], 1) for _ in range(self.one(0, 1))))
        whole = statement.order_by(*self.identity(entity))
        drawn = self.limited(whole, unique=True)
        return Drawn(drawn.statement, whole, keys=1, cut=drawn.cut, unique=True)


def one_statement(world: World, data: st.DataObject) -> None:
    drawn = Statements(data.draw).statement()
    fleets = data.draw(st.lists(st.sampled_from(world.fleets), min_size=1, max_size=2, unique_by=id))
    compare(world, fleets, drawn)


@given(data=st.data())
@settings(max_examples=1200, deadline=None, suppress_health_check=CHECKS)
def test_a_select_returns_what_one_database_returns_or_is_refused(world: World, data: st.DataObject) -> None:
    one_statement(world, data)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(1, 11))
def test_a_hundred_thousand_selects(world: World, part: int) -> None:
    """In ten parts, which can be run by several processes, or one today and one tomorrow."""

    @seed(part)
    @settings(max_examples=10_000, deadline=None, suppress_health_check=CHECKS)
    @given(data=st.data())
    def select_ten_thousand_times(data: st.DataObject) -> None:
        one_statement(world, data)

    select_ten_thousand_times()


def test_few_statements_are_refused(world: World) -> None:
    assert world.outcomes.refused_share < 0.1
