"""Reference and home tables: how they are declared, and how the planner places statements that name them."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import (
    BigInteger,
    Column,
    Computed,
    DateTime,
    ForeignKey,
    ForeignKeyConstraint,
    Identity,
    Integer,
    MetaData,
    Sequence,
    Table,
    Text,
    delete,
    exists,
    false,
    func,
    insert,
    literal_column,
    select,
    text,
    true,
    update,
)
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg
from sqlalchemy.orm import DeclarativeBase, Mapped, aliased, mapped_column

import shardkit
from shardkit.core.errors import DeclarationError, UnroutableQuery
from shardkit.core.topology import HomeTable, ReferenceTable, ShardedTable, Topology
from shardkit.orm.declare import declared_table, declared_tables, problems
from shardkit.orm.planning.plan import AnyShardPlan, OneKeyPlan
from shardkit.orm.planning.routing import Planner
from shardkit.orm.planning.statements import PullPlan, ReadingPlan, WritingPlan
from shardkit.orm.planning.whole import EveryShardPlan, FirstShardPlan, HomePlan
from shardkit.storage import tables
from tests.routed import thirds

dialect: Any = PGDialect_psycopg()  # type: ignore[no-untyped-call]


class Base(DeclarativeBase):
    pass


@shardkit.reference
class Country(Base):
    __tablename__ = "Country"
    code: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(default=lambda: "unnamed")


@shardkit.home("main")
class Setting(Base):
    __tablename__ = "setting"
    id: Mapped[int] = mapped_column(primary_key=True)
    value: Mapped[str] = mapped_column(server_default=func.now())


@shardkit.home("other")
class Elsewhere(Base):
    __tablename__ = "elsewhere"
    id: Mapped[int] = mapped_column(primary_key=True)


@shardkit.sharded(by="id")
class User(Base):
    __tablename__ = "users"
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    country: Mapped[str] = mapped_column(ForeignKey("Country.code"))


C: Any = aliased(Country)
REFERENCE: Any = {"shardkit": {"reference": True}}


def home(shard: str = "main") -> Any:
    return {"shardkit": {"home": shard}}


# --- declaring -----------------------------------------------------------------------------------------------------


def test_what_is_declared_by_decorators_and_by_info() -> None:
    assert declared_tables(Base.metadata) == (
        ReferenceTable("public", "Country"),
        HomeTable("public", "elsewhere", "other"),
        HomeTable("public", "setting", "main"),
        ShardedTable("public", "users", "id", "int"),
    )
    by_info = Table("t", MetaData(), Column("x", Text, primary_key=True), info=REFERENCE, schema="s")
    assert declared_table(by_info) == ReferenceTable("s", "t")
    assert declared_table(Table("u", MetaData(), info=home())) == HomeTable("public", "u", "main")


@pytest.mark.parametrize(
    "info",
    [
        {"reference": False},
        {"reference": 1, "home": "main"},
        {"home": ""},
        {"home": None},
        {"sharded_by": "x", "reference": True},
    ],
)
def test_a_table_is_of_one_kind(info: dict[str, Any]) -> None:
    metadata = MetaData()
    Table("t", metadata, Column("x", Text, primary_key=True), info={"shardkit": info})
    with pytest.raises(DeclarationError, match="no kind of table"):
        declared_tables(metadata)


def test_home_without_a_name_is_told_at_once() -> None:
    class Plain:
        pass

    with pytest.raises(DeclarationError, match="not the name of a shard"):
        shardkit.home(Plain)  # type: ignore[arg-type]
    with pytest.raises(DeclarationError, match="not mapped to a table"):
        shardkit.reference(Plain)


MADE_BY_THE_SHARD: dict[str, Column[Any]] = {
    "serial": Column("x", Integer, primary_key=True),
    "identity": Column("x", Integer, Identity(), primary_key=True),
    "sequence": Column("x", Integer, Sequence("s")),
    "server default": Column("x", DateTime, server_default=func.now()),
    "text of a function": Column("x", DateTime, server_default=text("now()")),
    "text of a function, cast": Column("x", DateTime, server_default=text("now()::date")),
    "the moment of creation": Column("x", DateTime, server_default="now"),
    "the moment of creation, cast": Column("x", DateTime, server_default=text("'now'::timestamp")),
    "SQL default": Column("x", DateTime, default=func.now()),
    "SQL onupdate": Column("x", DateTime, onupdate=func.now()),
    "fetched onupdate": Column("x", DateTime, server_onupdate=text("x")),
}


@pytest.mark.parametrize("name", MADE_BY_THE_SHARD)
def test_reference_rows_are_not_made_by_each_shard(name: str) -> None:
    column = MADE_BY_THE_SHARD[name]._copy()
    (problem,) = problems(Table("t", MetaData(), column, info=REFERENCE).metadata)
    assert problem.fatal
    assert "differ from shard to shard" in problem.what
    assert problems(Table("t", MetaData(), MADE_BY_THE_SHARD[name]._copy(), info=home()).metadata) == []


@pytest.mark.parametrize(
    "column",
    [
        Column("x", Integer, primary_key=True, autoincrement=False),
        Column("x", Integer, default=5, onupdate=lambda: 6),
        Column("x", Text, server_default="it's"),
        Column("x", Text, server_default=text("'it''s'::character varying")),
        Column("x", Integer, server_default=text("-1")),
        Column("x", Text, server_default=true()),
        Column("x", Text, server_default=false()),
        Column("x", Text, server_default=text("ARRAY[]::text[]")),
        Column("x", Integer, Computed("1 + 1")),
    ],
    ids=str,
)
def test_constants_and_python_defaults_are_the_same_everywhere(column: Column[Any]) -> None:
    assert problems(Table("t", MetaData(), column._copy(), info=REFERENCE).metadata) == []


@pytest.mark.parametrize(
    "sql",
    ["now()", "1 + random()", "nextval('s'::regclass)", "'a' || now()", "CURRENT_TIMESTAMP", "x()::text"],
)
def test_what_is_no_constant(sql: str) -> None:
    assert not tables.is_constant(sql)


SHARDED: Any = {"shardkit": {"sharded_by": "k"}}


def pair(own: Any, target: Any, **actions: Any) -> MetaData:
    metadata = MetaData()
    columns = (Column("k", BigInteger, primary_key=True, autoincrement=False),)
    Table("target", metadata, *[column._copy() for column in columns], info=target)
    foreign = ForeignKeyConstraint(["ref"], ["target.k"], **actions)
    Table("own", metadata, *columns, Column("ref", BigInteger), foreign, info=own)
    return metadata


@pytest.mark.parametrize(
    ("own", "target"),
    [(SHARDED, REFERENCE), (REFERENCE, REFERENCE), (home(), REFERENCE), (home(), home())],
)
def test_foreign_keys_whose_rows_are_on_the_same_shard(own: Any, target: Any) -> None:
    assert problems(pair(own, target)) == []


@pytest.mark.parametrize(
    ("own", "target", "what"),
    [
        (SHARDED, home(), "leaves the shards"),
        (REFERENCE, SHARDED, "names rows that are spread"),
        (REFERENCE, home(), "leaves the shards"),
        (REFERENCE, None, "leaves the shards"),
        (home(), SHARDED, "names rows that are spread"),
        (home(), home("other"), "leaves the shard main"),
        (home(), None, "leaves the shard main"),
        (None, REFERENCE, "place is not known"),
        (None, home(), "place is not known"),
    ],
)
def test_foreign_keys_that_leave_the_shard(own: Any, target: Any, what: str) -> None:
    (problem,) = problems(pair(own, target))
    assert what in problem.what
    assert problem.fatal


def test_a_reference_row_does_not_take_spread_rows_with_it() -> None:
    (problem,) = problems(pair(SHARDED, REFERENCE, ondelete="CASCADE"))
    assert "on their way to another shard" in problem.what
    assert problems(pair(SHARDED, REFERENCE, ondelete="RESTRICT")) == []
    assert problems(pair(REFERENCE, REFERENCE, ondelete="CASCADE")) == []


# --- the topology --------------------------------------------------------------------------------------------------


def topology() -> Topology:
    first = Topology.first(1, [(4, "main", "u", 1), (7, "other", "u", 1)], [2**63 - 1], [7])
    return first.declared(2, declared_tables(Base.metadata))


def test_the_topology_holds_them_apart() -> None:
    made = topology()
    assert [table.name for table in made.tables] == ["users"]
    assert made.references == (ReferenceTable("public", "Country"),)
    assert [table.name for table in made.homes] == ["elsewhere", "setting"]
    assert Topology.from_json(made.to_json()) == made
    assert Topology.from_json(made.to_json()).digest == made.digest


def test_documents_without_them_are_read_and_written_as_before() -> None:
    before = thirds()
    document = before.to_json()
    assert not {"references", "homes", "whole"} & document.keys()
    assert Topology.from_json(document).digest == before.digest


def test_a_joining_shard_closes_the_one_where_reference_rows_are_written_first() -> None:
    before = topology()
    joined = before.joined(3, shard_id=8, name="new", url="u", weight=1)
    assert joined.closing_since(before) == (4,)
    assert joined.changed_since(before) == (4, 7, 8)
    without = before.declared(3, before.tables)
    assert without.joined(4, shard_id=8, name="new", url="u", weight=1).closing_since(without) == ()


def test_a_home_is_a_shard() -> None:
    with pytest.raises(shardkit.ShardkitError, match="is no shard"):
        topology().declared(3, [HomeTable("public", "x", "nowhere")])


# --- the planner ---------------------------------------------------------------------------------------------------


@pytest.fixture
def planner() -> Planner:
    return Planner(dialect)


def outcome(planner: Planner, statement: Any, parameters: Any = None) -> tuple[str, Any]:
    """The kind of plan and the shards under `topology`, or ("refused", reason)."""
    try:
        plan = planner.plan(statement, parameters)
    except UnroutableQuery as error:
        return "refused", error.fields.get("reason")
    kinds = {
        OneKeyPlan: "one",
        AnyShardPlan: "any",
        ReadingPlan: "scatter",
        WritingPlan: "scatter",
        PullPlan: "pulled",
        HomePlan: "home",
        EveryShardPlan: "every",
        FirstShardPlan: "first",
    }
    return kinds[type(plan)], list(plan.route(topology()).shards)


PLACED: dict[str, tuple[Any, tuple[str, list[int]]]] = {
    "reference": (select(Country), ("any", [7])),
    "an alias of it": (select(C).where(C.code == "de"), ("any", [7])),
    "its aggregate": (select(func.avg(func.length(Country.name)), func.now()), ("any", [7])),
    "itself outer joined": (select(Country, C).join(C, C.code == Country.code, full=True), ("any", [7])),
    "its subquery": (select(Country).where(exists().where(C.code == Country.code)).limit(1), ("any", [7])),
    "its rows locked": (select(Country).with_for_update(), ("first", [4])),
    "home": (select(Setting), ("home", [4])),
    "another home": (select(Elsewhere), ("home", [7])),
    "home with reference": (select(Setting, Country), ("home", [4])),
    "home rows locked": (select(Setting).with_for_update(), ("home", [4])),
    "insert into home": (insert(Setting).values(id=5), ("home", [4])),
    "insert of list into home": (insert(Setting).values([{"id": 5}, {"id": 6}]), ("home", [4])),
    "insert from select into home": (
        insert(Setting).from_select(["value"], select(Country.name)),
        ("home", [4]),
    ),
    "update of home": (update(Setting).values(value=func.now()), ("home", [4])),
    "delete of home": (delete(Setting).where(Setting.value.in_(select(Country.name))), ("home", [4])),
    "insert into reference": (insert(Country).values(code="de"), ("every", [4, 7])),
    "insert of list into reference": (insert(Country).values([{"code": "de"}]), ("every", [4, 7])),
    "upsert of reference": (
        upsert(Country).values(code="de", name="x").on_conflict_do_nothing(),
        ("every", [4, 7]),
    ),
    "update of reference": (update(Country).values(name=func.upper(Country.name)), ("every", [4, 7])),
    "delete of reference": (delete(Country).where(Country.code == "de"), ("every", [4, 7])),
    "delete of reference by reference": (
        delete(Country).where(exists().where(C.name == Country.name, C.code > Country.code)),
        ("every", [4, 7]),
    ),
    "one key beside reference": (
        select(User, Country).outerjoin(Country, Country.code == User.country).where(User.id == 5),
        ("one", [7]),
    ),
    "one key on the nullable side": (
        select(Country, User).outerjoin(User, (User.country == Country.code) & (User.id == 5)),
        ("one", [7]),
    ),
    "one key in a subquery of reference": (
        select(Country).where(exists().where(User.country == Country.code, User.id == 5)),
        ("one", [7]),
    ),
    "scatter beside reference": (
        select(User, Country).join(Country, Country.code == User.country),
        ("scatter", [7]),
    ),
    "update of one key from reference": (
        update(User).where(User.id == 5, Country.code == User.country).values(country=Country.name),
        ("one", [7]),
    ),
    "delete of all using reference": (
        delete(User).where(Country.code == User.country, Country.name == "x"),
        ("scatter", [7]),
    ),
    "reference LEFT JOIN sharded": (
        select(Country, User).outerjoin(User, User.country == Country.code),
        ("pulled", [7]),
    ),
    "reference WHERE EXISTS sharded": (
        select(Country).where(exists().where(User.country == Country.code)),
        ("pulled", [7]),
    ),
    "reference WHERE NOT EXISTS sharded": (
        select(Country).where(~exists().where(User.country == Country.code)),
        ("pulled", [7]),
    ),
    "one of the reference rows, whichever": (
        select(User).where(User.country == select(Country.code).limit(1).scalar_subquery()),
        ("pulled", [7]),
    ),
    "the first of the reference rows by key": (
        select(User).where(User.id == 5, User.country == select(Country.code).limit(1).scalar_subquery()),
        ("one", [7]),
    ),
    "any of the reference rows": (
        select(User).where(User.country.in_(select(Country.code).where(Country.name == "x"))),
        ("scatter", [7]),
    ),
    "entities locked, not reference": (
        select(User).join(Country).where(User.id == 5).with_for_update(of=User),
        ("one", [7]),
    ),
}


@pytest.mark.parametrize("name", PLACED)
def test_where_a_statement_runs(planner: Planner, name: str) -> None:
    statement, expected = PLACED[name]
    assert outcome(planner, statement) == expected
    assert outcome(planner, statement) == expected  # by the proof that was kept


REFUSED: dict[str, tuple[Any, str]] = {
    "two homes": (select(Setting, Elsewhere), "home"),
    "home beside sharded, locked": (select(User, Setting).with_for_update(), "for-update"),
    "update of reference by one key": (
        update(Country).where(Country.code == User.country, User.id == 5).values(name="x"),
        "reference-write",
    ),
    "delete of reference where not used": (
        delete(Country).where(~exists().where(User.country == Country.code)),
        "reference-write",
    ),
    "update of reference by home": (
        update(Country).values(name=select(Setting.value).limit(1).scalar_subquery()),
        "reference-write",
    ),
    "now in reference": (update(Country).values(name=func.now()), "reference-write"),
    "random in reference": (insert(Country).values(code=func.random()), "reference-write"),
    "moment as raw SQL in reference": (
        update(Country).values(name=literal_column("current_timestamp")),
        "raw-sql",
    ),
    "aggregate in reference": (
        update(Country).values(name=select(func.min(C.name)).scalar_subquery()),
        "reference-write",
    ),
    "limit in reference": (
        delete(Country).where(Country.code.in_(select(C.code).limit(1))),
        "reference-write",
    ),
    "update of reference from another row": (
        update(Country).where(C.name == Country.name).values(name=C.code),
        "reference-write",
    ),
    "insert from select": (
        insert(Country).from_select(["code"], select(C.name)),
        "insert-from-select",
    ),
    "reference rows locked beside one key": (
        select(User).join(Country).where(User.id == 5).with_for_update(),
        "reference-lock",
    ),
    "insert of sharded by home": (
        insert(User).values(id=5, country=select(Setting.value).scalar_subquery()),
        "home",
    ),
    "unknown function on reference": (select(func.similarity(Country.name, "x")), "function"),
}


@pytest.mark.parametrize(
    "statement",
    [
        select(User, Setting),
        select(User, Setting).where(User.id == 5),
        select(User, Setting).where(User.id.in_([])),
        select(User).where(User.id == 5, exists().where(Setting.id == 5)),
        select(User, Setting.id).join(Setting, Setting.id == User.id).where(Setting.id == 5),
        select(User, Setting, Country).join(Country),
    ],
)
def test_home_beside_sharded_runs_at_home_over_rows_that_are_read(planner: Planner, statement: Any) -> None:
    for _ in range(2):
        kind, shards = outcome(planner, statement)
        assert kind == "pulled"
        assert shards[0] == topology().named("main").id


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(planner: Planner, name: str) -> None:
    statement, reason = REFUSED[name]
    assert outcome(planner, statement) == ("refused", reason)


def test_the_column_of_a_reference_table_binds_no_key(planner: Planner) -> None:
    """Also where it is named as the key of a sharded table around the block is."""
    inner = select(Country.code).where(Country.code == "5").subquery("users")
    statement = select(User).where(exists(select(inner.c.code)))
    assert outcome(planner, statement) == ("scatter", [7])
    joined = select(User).join(Country, Country.code == User.country).where(Country.code == "de")
    assert outcome(planner, joined) == ("scatter", [7])


def test_lists_of_parameters(planner: Planner) -> None:
    table: Any = Country.__table__
    assert outcome(planner, insert(table), [{"code": "a"}, {"code": "b"}]) == ("every", [4, 7])
    assert outcome(planner, insert(Country), [{"code": "a"}, {"code": "b"}]) == ("every", [4, 7])
    assert outcome(planner, update(Country), [{"code": "a", "name": "b"}]) == ("every", [4, 7])
    assert outcome(planner, insert(Setting), [{"id": 1}, {"id": 2}]) == ("home", [4])
    assert outcome(planner, select(table), [{}, {}]) == ("refused", "many")


def test_python_defaults_of_bulk_rows_are_evaluated_once(planner: Planner) -> None:
    plan = planner.plan(insert(Country), [{"code": "a"}, {"code": "b", "name": "c"}])
    first, second = plan.route(topology()).shards.values()
    assert first.parameters == [{"code": "a", "name": "unnamed"}, {"code": "b", "name": "c"}]
    assert second.parameters is first.parameters
    listed = planner.plan(insert(Country).values([{"code": "a"}, {"code": "b", "name": "c"}]))
    part, _ = listed.route(topology()).shards.values()
    rows = part.statement._multi_values[0]  # type: ignore[attr-defined]
    assert [{getattr(key, "key", key): row[key] for key in row}["name"] for row in rows] == ["unnamed", "c"]


def test_any_shard_that_is_open_is_preferred(planner: Planner) -> None:
    plan = planner.plan(select(Country))
    assert list(plan.route(topology(), prefer={4}).shards) == [4]
