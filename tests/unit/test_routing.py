"""The planner on statements: which run on one shard, on several, or not at all. No server is needed for that."""

from __future__ import annotations

import decimal
import enum
import uuid
from typing import Any

import pytest
from sqlalchemy import (
    BigInteger,
    Column,
    Enum,
    Float,
    ForeignKey,
    Integer,
    MetaData,
    String,
    Table,
    and_,
    bindparam,
    case,
    cast,
    delete,
    except_,
    exists,
    extract,
    false,
    func,
    insert,
    lambda_stmt,
    literal,
    literal_column,
    not_,
    null,
    or_,
    select,
    text,
    true,
    tuple_,
    union,
    union_all,
    update,
    values,
)
from sqlalchemy import column as bare_column
from sqlalchemy.dialects.postgresql import distinct_on
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    aliased,
    column_property,
    joinedload,
    mapped_column,
    selectinload,
    with_loader_criteria,
    with_parent,
    with_polymorphic,
)
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeDecorator

from shardkit.core.errors import UnroutableQuery
from shardkit.core.ring import position
from shardkit.orm.declare import sharded
from shardkit.orm.planning.kept import Kept
from shardkit.orm.planning.plan import AnyShardPlan, OneKeyPlan, Plan
from shardkit.orm.planning.routing import Planner
from shardkit.orm.planning.statements import PullPlan, ReadingPlan, WritingPlan
from tests.routed import Account, Mark, Note, thirds

dialect: Any = PGDialect_psycopg()  # type: ignore[no-untyped-call]
TOPOLOGY = thirds()


class Colour(enum.Enum):
    RED = "r"


class Lower(TypeDecorator[str]):
    impl = String
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> Any:
        return None if value is None else value.lower()


class Base(DeclarativeBase):
    pass


class Free(Base):
    __tablename__ = "free"
    id: Mapped[int] = mapped_column(primary_key=True)


@sharded(by="login")
class Login(Base):
    __tablename__ = "login"
    login: Mapped[str] = mapped_column(Lower, primary_key=True)


@sharded(by="colour")
class Paint(Base):
    __tablename__ = "paint"
    colour: Mapped[Colour] = mapped_column(
        Enum(Colour, native_enum=False, values_callable=lambda colours: [one.value for one in colours]),
        primary_key=True,
    )


@sharded(by="id")
class Thing(Base):
    __tablename__ = "thing"
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)


@sharded(by="id")
class Person(Base):
    __tablename__ = "person"
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    kind: Mapped[str]
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "person"}  # noqa: RUF012


@sharded(by="id")
class Worker(Person):
    __tablename__ = "worker"
    id: Mapped[int] = mapped_column(BigInteger, ForeignKey("person.id"), primary_key=True)
    wage: Mapped[int]
    __mapper_args__ = {"polymorphic_identity": "worker"}  # noqa: RUF012


class Odd(FunctionElement[Any]):
    inherit_cache = True
    type = Integer()
    name = "odd"


@compiles(Odd)
def _odd(element: Any, compiler: Any, **kw: Any) -> str:
    return "(SELECT count(*) FROM note)"


A: Any = aliased(Account)
N: Any = aliased(Note)
TABLE = Account.metadata.tables["Account"]
ELSEWHERE = Table(
    "Account",
    MetaData(schema="elsewhere"),
    Column("id", BigInteger, primary_key=True, autoincrement=False),
    info={"shardkit": {"sharded_by": "id"}},
)


@pytest.fixture
def planner() -> Planner:
    return Planner(dialect)


def outcome(planner: Planner, statement: Any, parameters: Any = None, **options: Any) -> tuple[str, Any]:
    """How a statement is planned: ("one", position), ("any", None), ("scatter", None), ("pulled", None) or ("refused",
    reason)."""
    try:
        plan = planner.plan(statement, parameters, options)
    except UnroutableQuery as error:
        return "refused", error.fields.get("reason")
    plan.route(TOPOLOGY)
    if isinstance(plan, OneKeyPlan):
        return "one", plan.position
    if isinstance(plan, AnyShardPlan):
        return "any", None
    if isinstance(plan, PullPlan):
        return "pulled", None
    assert isinstance(plan, ReadingPlan | WritingPlan)
    return "scatter", None


FIVE = position(5)


# --- one shard -----------------------------------------------------------------------------------------------------

BOUND: dict[str, Any] = {
    "equality": select(Account).where(Account.id == 5),
    "equality turned round": select(Account).where(literal(5) == Account.id),
    "literal": select(Account).where(Account.id == literal(5, BigInteger)),
    "core table": select(TABLE).where(TABLE.c.id == 5),
    "filter_by": select(Account).filter_by(id=5),
    "inside AND": select(Account).where(and_(Account.n > 3, and_(Account.id == 5, true()))),
    "IN of one": select(Account).where(Account.id.in_([5])),
    "IN of equal ones": select(Account).where(Account.id.in_([5, 5, None])),
    "IN and equality": select(Account).where(Account.id.in_([5, 6, 7]), Account.id == 5),
    "two INs": select(Account).where(Account.id.in_([5, 6]), Account.id.in_([7, 5])),
    "IN of tuples": select(Note).where(tuple_(Note.owner, Note.number).in_([(5, 1), (5, 2)])),
    "OR of one key": select(Account).where(or_(Account.id == 5, and_(Account.id == 5, Account.n == 1))),
    "OR of lists": select(Account).where(
        or_(Account.id.in_([5, 6]), Account.id == 5), Account.id.in_([5, 7])
    ),
    "OR over a join": select(Account, Note)
    .join(Account.notes)
    .where(or_(and_(Note.owner == 5, Note.n == 1), and_(Account.n == 2, Note.owner == 5))),
    "OR beside it": select(Account).where(Account.id == 5, or_(Account.n == 1, Account.id == 7)),
    "ORDER BY, LIMIT": select(Account).where(Account.id == 5).order_by(Account.name).limit(3).offset(1),
    "DISTINCT": select(Account.name).where(Account.id == 5).distinct(),
    "DISTINCT ON": select(Account.name).where(Account.id == 5).ext(distinct_on(Account.name)),
    "GROUP BY, HAVING": select(func.avg(Account.n))
    .where(Account.id == 5)
    .group_by(Account.name)
    .having(func.count() > 1),
    "window": select(func.row_number().over(order_by=Note.n)).where(Note.owner == 5),
    "functions": select(func.now(), func.random(), func.upper(Account.name)).where(Account.id == 5),
    "unknown function": select(func.similarity(Account.name, "x")).where(Account.id == 5),
    "FOR UPDATE": select(Account).where(Account.id == 5).with_for_update(skip_locked=True, of=Account),
    "join": select(Account, Note).join(Account.notes).where(Account.id == 5),
    "join bound at the other end": select(Account, Note).join(Account.notes).where(Note.owner == 5),
    "join on a condition": select(Account).join(Note, and_(Note.owner == Account.id, Note.owner == 5)),
    "both bound": select(Account, Note).where(Account.id == 5, Note.owner == 5),
    "chain of joins": select(Mark).join(Mark.note).join(Note.account).where(Account.id == 5),
    "self join": select(Account, A).join(A, A.id == Account.id).where(A.id == 5),
    "left join": select(Account, Note).outerjoin(Account.notes).where(Account.id == 5),
    "left join, constant for the right": select(Account)
    .outerjoin(Note, Note.owner == 5)
    .where(Account.id == 5),
    "left join, WHERE on the right": select(Account).outerjoin(Account.notes).where(Note.owner == 5),
    "left joins in a row": select(Account)
    .outerjoin(Account.notes)
    .outerjoin(Note.marks)
    .where(Account.id == 5),
    "left join to a join": select(Account)
    .outerjoin(Note.__table__.join(Mark.__table__, Mark.owner == Note.owner), Note.owner == Account.id)
    .where(Account.id == 5),
    "full join, both bound": select(Account)
    .join(Note, Note.n == Account.n, full=True)
    .where(Account.id == 5, Note.owner == 5),
    "eager load": select(Account)
    .options(joinedload(Account.notes).joinedload(Note.marks))
    .where(Account.id == 5),
    "EXISTS": select(Account).where(Account.id == 5, exists().where(Note.owner == Account.id)),
    "any()": select(Account).where(Account.id == 5, ~Account.notes.any(Note.marks.any(Mark.n > 1))),
    "has()": select(Note).where(Note.owner == 5, Note.account.has(Account.n > 1)),
    "subquery bound by itself": select(Account).where(
        Account.id == 5, Account.n.in_(select(Note.n).where(Note.owner == 5).limit(3))
    ),
    "scalar subquery": select(
        Account.id, select(func.count()).where(Note.owner == Account.id).correlate(Account).scalar_subquery()
    ).where(Account.id == 5),
    "subquery in a subquery": select(Account).where(
        Account.id == 5,
        exists().where(
            Note.owner == Account.id, exists().where(Mark.owner == Note.owner, Mark.number == Note.number)
        ),
    ),
    "subquery in FROM": select(select(Note.n).where(Note.owner == 5).subquery().c.n),
    "common table expression": select(select(Note.n).where(Note.owner == 5).cte().c.n),
    "lateral": select(Account, (select(Note.n).where(Note.owner == Account.id).limit(1).lateral())).where(
        Account.id == 5
    ),
    "set operation": union_all(
        select(Account.id).where(Account.id == 5), select(Note.n).where(Note.owner == 5)
    ),
    "set operation with a branch of no table": union_all(
        select(Account.id).where(Account.id == 5), select(literal(1))
    ),
    "criteria of a loader option": select(Account).options(with_loader_criteria(Account, Account.id == 5)),
    "joined inheritance": select(Worker).where(Worker.id == 5),
    "polymorphic": select(with_polymorphic(Person, "*")).where(Person.id == 5),
    "from_statement": select(Account).from_statement(select(Account).where(Account.id == 5)),
    "values": select(Account.id, values(bare_column("x", Integer), name="v").data([(1,)])).where(
        Account.id == 5
    ),
    "update": update(Account).where(Account.id == 5).values(n=Account.n + 1),
    "update of a core table": update(TABLE).where(TABLE.c.id == 5).values(n=1),
    "update from": update(Account).where(Account.id == Note.owner, Note.owner == 5).values(n=Note.n),
    "update with a subquery": update(Account)
    .where(Account.id == 5)
    .values(n=select(func.max(Note.n)).where(Note.owner == Account.id).scalar_subquery()),
    "delete": delete(Account).where(Account.id == 5).returning(Account),
    "delete using": delete(Note).where(Note.owner == Account.id, Account.id == 5),
}


@pytest.mark.parametrize("name", BOUND)
def test_a_statement_bound_to_one_key_runs_on_one_shard(planner: Planner, name: str) -> None:
    for _ in range(2):  # analysed, then known
        assert outcome(planner, BOUND[name]) == ("one", FIVE)


def test_the_recursive_term_is_bound_too(planner: Planner) -> None:
    tree = select(Note.number, Note.n).where(Note.owner == 5, Note.number == 1).cte(recursive=True)
    child = select(Note.number, Note.n).where(Note.n == tree.c.number)
    assert outcome(planner, select(tree.union_all(child.where(Note.owner == 5)))) == ("one", FIVE)
    assert outcome(planner, select(tree.union_all(child))) == ("pulled", None)


@pytest.mark.parametrize(
    ("statement", "parameters", "key"),
    [
        (select(Account).where(Account.id == bindparam("k")), {"k": 7}, 7),
        (select(Account).where(Account.id == bindparam("k", 9)), {}, 9),
        (select(Account).where(Account.id == bindparam("k", 9)), {"k": 7}, 7),
        (select(Account).where(Account.id == bindparam("k", 9)).params(k=8), {}, 8),
        (select(Account).where(Account.id == bindparam("k", callable_=lambda: 3)), {}, 3),
        (select(Account).where(Account.id.in_(bindparam("k", expanding=True))), {"k": [7]}, 7),
        (select(Account).where(Account.id.in_(bindparam("k"))), {"k": [7]}, 7),
        (select(Account).where(Account.id == 5), {"id_1": 7}, 7),
        (select(Login).where(Login.login == "ABC"), {}, "abc"),
        (select(Login).where(Login.login.in_(["ABC", "abc"])), {}, "abc"),
        (select(Paint).where(Paint.colour == Colour.RED), {}, "r"),
        (select(Thing).where(Thing.id == uuid.UUID(int=7)), {}, uuid.UUID(int=7)),
        (select(Account).where(Account.id == -(2**63)), {}, -(2**63)),
    ],
)
def test_the_value_is_the_one_that_is_sent(
    planner: Planner, statement: Any, parameters: Any, key: Any
) -> None:
    for _ in range(2):
        assert outcome(planner, statement, parameters) == ("one", position(key))


def test_a_proof_is_of_a_shape_and_takes_the_values_of_each_call(planner: Planner) -> None:
    for key in (1, 2, 3):
        account: Any = aliased(Account)
        assert outcome(planner, select(account).where(account.id == key, account.n == 4)) == (
            "one",
            position(key),
        )
    assert len(planner._proofs) == 1


# --- no row --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "statement",
    [
        select(literal(1)),
        select(func.now(), func.upper("x")),
        func.now(),
        select(func.generate_series(1, 3).table_valued("x")),
        select(Account).where(Account.id.in_([])),
        select(Account).where(Account.id.in_([None])),
        select(Account).where(Account.id == bindparam("k", None, BigInteger)),
        select(Account).where(Account.id == 5, Account.id == 6),
        select(Account).where(Account.id == 5, Account.id.in_([6, 7])).order_by(Account.id),
        select(Account, Note).join(Account.notes).where(Account.id == 5, Note.owner == 6),
        select(Account, Note).where(Account.id.in_([])).order_by(Note.n),
        update(Account).where(Account.id.in_([])).values(n=1),
    ],
)
def test_a_statement_that_no_row_can_match_runs_on_any_shard(planner: Planner, statement: Any) -> None:
    assert outcome(planner, statement) == ("any", None)


def test_an_impossible_key_of_the_right_side_of_a_left_join_empties_that_side_only(planner: Planner) -> None:
    statement = select(Account, Note).outerjoin(Note, and_(Note.owner == Account.id, Note.owner.in_([])))
    assert outcome(planner, statement) == ("scatter", None)
    assert outcome(planner, statement.where(Account.id == 5)) == ("one", FIVE)


# --- several shards ------------------------------------------------------------------------------------------------

SCATTERED: dict[str, Any] = {
    "two keys in a set operation": union_all(
        select(Account.id).where(Account.id == 5), select(Account.id).where(Account.id == 6)
    ),
    "a branch unbound": union_all(select(Account.id).where(Account.id == 5), select(Account.id)),
    "a branch of no table": union_all(select(Account.n), select(literal(1))),
    "a set operation of keys": except_(select(Account.id, Account.n), select(Note.owner, Note.n)),
    "UNION of no keys": union(select(Account.n), select(Note.n)),
    "a set operation in FROM": select(func.count()).select_from(
        union_all(select(Account.n), select(Note.n)).subquery()
    ),
    "entities of a set operation": select(Account).from_statement(
        union_all(select(Account).where(Account.n == 1), select(Account).where(Account.n == 2))
    ),
    "all": select(Account),
    "columns": select(
        Account.id, Account.name + "x", case((Account.n > 1, 2), else_=3), cast(Account.n, String)
    ),
    "conditions": select(Account).where(
        or_(Account.n.is_(None), Account.name.like("a%")), not_(Account.n.between(1, 2))
    ),
    "functions of a row": select(
        func.coalesce(Account.n, 0), func.lower(Account.name), extract("year", func.make_date(1, 2, 3))
    ),
    "keys in OR": select(Account).where(or_(Account.id == 5, Account.id == 6)),
    "a branch of OR unbound": select(Account).where(or_(Account.id == 5, Account.n == 5)),
    "a branch of OR of no key": select(Account).where(or_(Account.id == 5, Account.id == 5.0)),
    "keys in a range": select(Account).where(Account.id.between(5, 5)),
    "NOT": select(Account).where(not_(Account.id == 5)),
    "NOT IN": select(Account).where(Account.id.not_in([5])),
    "IN": select(Account).where(Account.id.in_([5, 6])),
    "IN of expressions": select(Account).where(Account.id.in_([literal(5) + 0, literal(6)])),
    "function of the key": select(Account).where(func.abs(Account.id) == 5),
    "arithmetic on the key": select(Account).where(Account.id + 0 == 5),
    "cast of the key": select(Account).where(cast(Account.id, Integer) == 5),
    "collated key": select(Login).where(Login.login.collate("C") == "x"),
    "raw number": select(Account).where(Account.id == literal_column("5")),
    "another column": select(Account).where(Account.n == 5),
    "co-located join": select(Account, Note).join(Account.notes).join(Note.marks),
    "co-located in WHERE": select(Account, A).where(Account.id == A.id),
    "inner eager load of one": select(Note).options(joinedload(Note.account, innerjoin=True)),
    "select in load": select(Account).options(selectinload(Account.notes)),
    "joined inheritance": select(Worker),
    "count": select(func.count()).select_from(Account),
    "aggregates": select(
        func.count(Note.n).label("x"), func.sum(Note.n), func.min(Note.owner), func.max(Note.number)
    ),
    "aggregates of a join": select(func.count()).select_from(Account).join(Account.notes).where(Note.n > 1),
    "filtered aggregate": select(
        func.count(Note.n).filter(Note.n > 1), func.sum(case((Note.n > 1, 1), else_=0))
    ),
    "ORDER BY": select(Account).order_by(Account.id),
    "LIMIT": select(Account).limit(1),
    "OFFSET": select(Account).offset(1),
    "DISTINCT": select(Account.n).distinct(),
    "GROUP BY": select(func.count()).select_from(Account).group_by(Account.n),
    "GROUP BY the key": select(Account.id, func.count()).group_by(Account.id),
    "HAVING": select(func.count()).select_from(Account).having(func.count() > 1),
    "FOR UPDATE": select(Account).with_for_update(),
    "window": select(func.row_number().over(partition_by=Account.id)).select_from(Account),
    "outer join": select(Account, Note).outerjoin(Account.notes),
    "left join, constant for the left": select(Account).outerjoin(
        Note, and_(Note.owner == Account.id, Account.id == 5)
    ),
    "eager load of all": select(Account).options(joinedload(Account.notes)),
    "polymorphic of all": select(with_polymorphic(Person, "*")),
    "EXISTS": select(Account).where(Account.notes.any()),
    "IN a subquery": select(Account).where(Account.id.in_(select(Note.owner).where(Note.owner == 5))),
    "avg": select(func.avg(Account.n)),
    "arithmetic over an aggregate": select(func.sum(Account.n) + 1),
    "aggregate in a function": select(func.coalesce(func.sum(Account.n), 0)),
    "min of text": select(func.min(Account.name)),
    "sum of a quotient": select(func.sum(Account.n / 2)),
    "now": select(Account.id, func.now()),
    "time in a condition": select(Account.id).where(func.now() > func.current_date()),
    "GROUP BY a function": select(func.lower(Account.name), func.avg(Account.n)).group_by(
        func.lower(Account.name)
    ),
    "GROUP BY the key and a function": select(func.lower(Account.name), func.stddev(Account.n)).group_by(
        Account.id, func.lower(Account.name)
    ),
    "time beside groups": select(func.current_timestamp(), func.count())
    .select_from(Account)
    .group_by(Account.name),
    "update": update(Account).where(Account.n > 3).values(n=4).returning(Account.id),
    "update from": update(Account).where(Account.id == Note.owner).values(n=Note.n),
    "delete": delete(Account).where(Account.n > 3),
    "delete of several": delete(Account).where(Account.id.in_([1, 2, 3])),
}


@pytest.mark.parametrize("name", SCATTERED)
def test_a_statement_whose_rows_are_each_made_on_one_shard_scatters(planner: Planner, name: str) -> None:
    for _ in range(2):
        assert outcome(planner, SCATTERED[name]) == ("scatter", None)


def test_keys_in_or_are_asked_of_their_owners(planner: Planner) -> None:
    statement = select(Account).where(or_(Account.id == 5, and_(Account.id.in_([6, 7]), Account.n > 1)))
    plan = planner.plan(statement.order_by(Account.id))
    owners = {TOPOLOGY.ring.owner(key) for key in (5, 6, 7)}
    assert set(plan.route(TOPOLOGY).shards) == owners
    assert not plan.everywhere
    nothing = select(Account).where(or_(Account.id == 5, Account.id == 6), Account.id == 7)
    assert outcome(planner, nothing) == ("any", None)


@pytest.mark.parametrize("value", ["5", " 5 ", 5.0, 5.7, decimal.Decimal(5), True, 2**63, "x", b"5", [5]])
def test_a_value_that_is_no_key_is_no_proof(planner: Planner, value: Any) -> None:
    bound = select(Account).where(Account.id == bindparam("k", type_=BigInteger()))
    assert outcome(planner, bound, {"k": value}) == ("scatter", None)
    assert outcome(planner, bound.with_for_update().limit(1), {"k": value}) == ("refused", "for-update")
    write = delete(Account).where(Account.id == bindparam("k", type_=BigInteger()))
    assert outcome(planner, write, {"k": value}) == ("refused", "key-value")
    listed = select(Account).where(Account.id.in_(bindparam("k", expanding=True)))
    assert outcome(planner, listed, {"k": [5, value]}) == ("scatter", None)


@pytest.mark.parametrize("value", [5.0, "5", decimal.Decimal(5), literal(5, Float()), literal("5", String())])
def test_a_bound_value_of_another_type_is_no_proof(planner: Planner, value: Any) -> None:
    assert outcome(planner, select(Account).where(Account.id == value)) == ("scatter", None)
    assert outcome(planner, update(Account).where(Account.id == value).values(n=1)) == (
        "refused",
        "key-value",
    )


_grouped = select(Note.owner, func.count().label("count")).group_by(Note.owner).subquery()
_limited = select(Note.owner, Note.n).limit(3).subquery()
_ranked = select(Note.owner, func.rank().over(order_by=Note.n).label("r")).subquery()
_ranked_by_key = select(Note.owner, func.rank().over(partition_by=Note.owner).label("r")).subquery()
_bound = select(Note.owner, Note.n).where(Note.owner == 5).cte()
_bound_limited = select(Note.owner, Note.n).where(Note.owner == 5).limit(3).subquery()
_twice = select(Note.owner, Note.n).cte()
_again = _twice.alias()
_keyless = select(Note.n).subquery()
_outer_key = select(Note.owner).select_from(Account).outerjoin(Note, Note.owner == Account.id).subquery()
_nested = select(select(Note.owner, Note.n).subquery()).subquery()

DERIVED: dict[str, tuple[Any, Any]] = {
    "key of a subquery": (select(select(Account.id).subquery()), ("scatter", None)),
    "bound outside": (select(_grouped).where(_grouped.c.owner == 5), ("one", FIVE)),
    "bound outside, nested": (select(_nested).where(_nested.c.owner == 5), ("one", FIVE)),
    "bound inside": (select(Account).join(_bound, _bound.c.owner == Account.id), ("one", FIVE)),
    "bound by the other": (
        select(Account, _grouped.c.count)
        .join(_grouped, _grouped.c.owner == Account.id)
        .where(Account.id == 5),
        ("one", FIVE),
    ),
    "bound inside, with LIMIT": (
        select(Account).join(_bound_limited, _bound_limited.c.owner == Account.id),
        ("one", FIVE),
    ),
    "bound in ON of its own join": (
        select(Account.id, _grouped.c.count)
        .outerjoin(_grouped, and_(_grouped.c.owner == Account.id, _grouped.c.owner == 5))
        .where(Account.id == 5),
        ("one", FIVE),
    ),
    "grouped by key": (select(_grouped).order_by(_grouped.c.count), ("scatter", None)),
    "joined by key": (select(Account).outerjoin(_grouped, _grouped.c.owner == Account.id), ("scatter", None)),
    "joined otherwise": (select(Account).join(_grouped, _grouped.c.count == Account.id), ("pulled", None)),
    "window by key": (select(_ranked_by_key).where(_ranked_by_key.c.owner == 5), ("one", FIVE)),
    "window over all": (select(_ranked).where(_ranked.c.owner == 5), ("pulled", None)),
    "LIMIT inside": (select(_limited).where(_limited.c.owner == 5), ("pulled", None)),
    "without its key": (select(_keyless), ("pulled", None)),
    "its key from the nullable side": (select(_outer_key).where(_outer_key.c.owner == 5), ("pulled", None)),
    "twice, joined by key": (
        select(_twice, _again).where(_twice.c.owner == _again.c.owner),
        ("scatter", None),
    ),
    "twice, two keys": (
        select(_twice, _again).where(_twice.c.owner == 5, _again.c.owner == 6),
        ("pulled", None),
    ),
    "twice, one of them bound": (select(_twice, _again).where(_twice.c.owner == 5), ("pulled", None)),
}


@pytest.mark.parametrize("name", DERIVED)
def test_a_key_goes_in_and_out_of_subqueries(planner: Planner, name: str) -> None:
    statement, expected = DERIVED[name]
    for _ in range(2):
        assert outcome(planner, statement) == expected


PULLED: dict[str, Any] = {
    "FETCH": select(Account).fetch(1),
    "DISTINCT ON": select(Account.n).ext(distinct_on(Account.id)),
    "full join": select(Account, Note).join(Note, Note.owner == Account.id, full=True),
    "full join, one bound": select(Account)
    .join(Note, Note.owner == Account.id, full=True)
    .where(Account.id == 5),
    "left join, only the right bound in ON": select(Account).outerjoin(Note, Note.owner == 5),
    "left join on another column": select(Account)
    .outerjoin(Note, Note.n == Account.n)
    .where(Account.id == 5),
    "two keys": select(Account, Note).where(Account.id == 5, Note.owner == 6),
    "a set operation that compares columns which are no keys": except_(
        select(Account.n).where(Account.id == 5), select(Account.n)
    ),
    "a branch that chooses": union_all(
        select(Account.id).where(Account.id == 5), select(Account.id).limit(3)
    ),
    "one of two": select(Account, Note).where(Account.id == 5),
    "one of two aliases": select(Account, A).where(Account.id == 5),
    "join on another column": select(Account).join(Note, Note.n == Account.n),
    "join in OR": select(Account).join(Note, or_(Note.owner == Account.id, Note.n == 1)),
    "keys of two types": select(Account, Login).where(Account.id == cast(Login.login, Integer)),
    "NOT EXISTS on another column": select(Account).where(
        Account.id == 5, ~exists().where(Note.n == Account.n)
    ),
    "scalar subquery": select(Account).where(
        Account.id == 5, Account.n > select(func.avg(Note.n)).scalar_subquery()
    ),
    "correlated in OR": select(Account).where(
        Account.id == 5, exists().where(or_(Note.owner == Account.id, Note.n == 1))
    ),
    "correlated to another alias": select(Account).where(Account.id == 5, exists().where(Note.owner == A.id)),
    "bound through a subquery": select(Account).where(
        Account.id == select(func.max(Note.owner)).where(Note.owner == 5).scalar_subquery()
    ),
    "column property": select(column_property(select(func.count(Note.n)).scalar_subquery())),
    "random": select(Account.id).where(func.random() > 0.5),
    "aggregate beside a column": select(Account.name, func.count()),
    "count distinct": select(func.count(Account.n.distinct())),
}
"""What runs on one shard, over the rows of its tables that are read from all."""


@pytest.mark.parametrize("name", PULLED)
def test_a_statement_of_rows_that_are_spread_runs_over_rows_that_are_read(
    planner: Planner, name: str
) -> None:
    for _ in range(2):
        assert outcome(planner, PULLED[name]) == ("pulled", None)


# --- not at all ----------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Any, str]] = {
    "prefix": (select(Account).prefix_with("ALL"), "text"),
    "unknown function": (select(func.similarity(Account.name, "x")), "function"),
    "sequence": (select(func.nextval("s")), "function"),
    "unsharded": (select(Free), "unsharded"),
    "unsharded beside": (select(Account, Free).where(Account.id == 5), "unsharded"),
    "unsharded in a subquery": (select(Account).where(Account.id == 5, exists(select(Free.id))), "unsharded"),
    "text": (text("SELECT 1"), "text"),
    "text in WHERE": (select(Account).where(Account.id == 5, text("true")), "text"),
    "text in columns": (select(text("1")).where(Account.id == 5), "text"),
    "text in ORDER BY": (select(Account).where(Account.id == 5).order_by(text("1")), "text"),
    "text with columns": (select(Account).from_statement(text("SELECT * FROM account")), "text"),
    "raw SQL": (select(literal_column("(SELECT count(*) FROM note)")).where(Account.id == 5), "raw-sql"),
    "raw operator": (
        select(Account).where(Account.id == 5, Account.n.op("IN (SELECT 1) AND")(True)),
        "raw-sql",
    ),
    "raw SQL in a scatter": (select(literal_column("name")).select_from(Account), "raw-sql"),
    "custom element": (select(Odd()).where(Account.id == 5), "custom"),
    "whole row": (select(func.count(TABLE.table_valued())).where(TABLE.c.id == 5), "unknown-element"),
    "sample": (select(TABLE.tablesample(10)).where(TABLE.c.id == 5), "unknown-element"),
    "two tables of one name": (
        select(TABLE).where(
            TABLE.c.id == 5, exists(select(ELSEWHERE.c.id).where(ELSEWHERE.c.id == TABLE.c.id))
        ),
        "ambiguous-name",
    ),
    "hint": (select(TABLE).where(TABLE.c.id == 5).with_statement_hint("x"), "hint"),
    "lambda": (lambda_stmt(lambda: select(Account)), "unknown-statement"),
    "from_statement of all": (select(Account).from_statement(select(Account)), "from-statement"),
    "insert in a CTE": (
        select(insert(TABLE).values(id=5, name="x").returning(TABLE.c.id).cte()),
        "dml-in-cte",
    ),
    "delete in a CTE": (
        select(delete(TABLE).where(TABLE.c.id == 5).returning(TABLE.c.id).cte()),
        "dml-in-cte",
    ),
    "update of all from another": (update(Account).where(Account.n == Note.n).values(n=1), "not-co-located"),
    "update with a subquery": (
        update(Account).values(n=select(func.max(Note.n)).scalar_subquery()),
        "not-co-located",
    ),
    "update to a time of each row": (update(Account).values(name=func.clock_timestamp()), "function"),
    "changed key": (update(Account).where(Account.id == 5).values(id=6), "changed-key"),
    "changed key of a core table": (
        update(TABLE).where(TABLE.c.id == 5).values({TABLE.c.id: 6}),
        "changed-key",
    ),
    "changed key by ordered values": (
        update(TABLE).where(TABLE.c.id == 5).ordered_values((TABLE.c.n, 1), (TABLE.c.id, 6)),
        "changed-key",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_proved_is_refused_and_says_why(planner: Planner, name: str) -> None:
    statement, reason = REFUSED[name]
    for _ in range(2):
        assert outcome(planner, statement) == ("refused", reason)


def test_a_key_changed_by_parameters_is_refused(planner: Planner) -> None:
    assert outcome(planner, update(TABLE).where(TABLE.c.n == 5), {"id": 6}) == ("refused", "changed-key")


def test_a_refusal_names_the_columns_that_would_have_to_be_equal(planner: Planner) -> None:
    with pytest.raises(UnroutableQuery) as caught:
        planner.plan(select(Account, Note).join(Note, Note.n == Account.n).with_for_update())
    assert "Account.id, note.user" in caught.value.message
    assert "Bind Account.id, note.user to one value" in caught.value.hint
    with pytest.raises(UnroutableQuery) as caught:
        planner.plan(delete(Account).where(Account.n == Note.n))
    assert "Join on note.user = Account.id" in caught.value.hint


def test_what_has_to_be_seen_together_is_not_streamed(planner: Planner) -> None:
    for option in ("yield_per", "stream_results"):
        assert outcome(planner, select(Account), None, **{option: 10}) == ("scatter", None)
        assert outcome(planner, select(Account).order_by(Account.n), None, **{option: 10}) == (
            "scatter",
            None,
        )
        by_name = select(Account).order_by(Account.name)
        assert outcome(planner, by_name, None, **{option: 10}) == ("refused", "stream")
        assert outcome(planner, by_name.limit(5), None, **{option: 10}) == ("scatter", None)
        assert outcome(planner, by_name.where(Account.id == 5), None, **{option: 10}) == ("one", FIVE)
    assert outcome(planner, select(1), None, schema_translate_map={"a": "b"}) == ("refused", "schema-map")


def test_a_list_of_parameters_is_for_writing(planner: Planner) -> None:
    statement = select(Account).where(Account.id == bindparam("k"))
    assert outcome(planner, statement, [{"k": 5}, {"k": 6}]) == ("refused", "many")
    assert outcome(planner, statement, [{"k": 5}]) == ("one", FIVE)


# --- what a plan says ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statement", "writes"),
    [
        (select(Account), False),
        (select(Account).where(Account.id == 5).with_for_update(), False),
        (select(func.now()).where(Account.id == 5), False),
        (select(func.pg_advisory_xact_lock(1)).where(Account.id == 5), True),
        (select(func.app.upper("x")).where(Account.id == 5), True),
        (select(func.pg_catalog.upper("x")).where(Account.id == 5), False),
        (delete(Account).where(Account.id == 5), True),
        (update(Account).values(n=1), True),
        (insert(TABLE).values(id=5, name="x"), True),
    ],
)
def test_a_plan_says_whether_it_can_write(planner: Planner, statement: Any, writes: bool) -> None:
    assert planner.plan(statement).writes is writes


def test_a_plan_names_its_tables(planner: Planner) -> None:
    def names(plan: Plan) -> set[str]:
        return {table.name for table in plan.tables}

    assert names(planner.plan(select(Account).join(Account.notes))) == {"Account", "note"}
    assert names(planner.plan(select(Account).where(Account.id == 5, Account.notes.any()))) == {
        "Account",
        "note",
    }
    assert names(planner.plan(insert(TABLE).values(id=5, name="x"))) == {"Account"}
    assert names(planner.plan(select(literal(1)))) == set()


def test_an_object_in_a_condition_is_its_key(planner: Planner) -> None:
    for key in (3, 4):
        for condition in (Note.account == Account(id=key), with_parent(Account(id=key), Account.notes)):
            assert outcome(planner, select(Note).where(condition).order_by(Note.n)) == ("one", position(key))


def test_proofs_are_bounded_and_the_least_used_go_first() -> None:
    planner = Planner(dialect, size=10)
    often = select(Account.id.label("often"))
    for number in range(30):
        planner.plan(often)
        planner.plan(select(Account.id.label(f"c{number}")))
    assert len(planner._proofs) <= 10
    key = often._generate_cache_key()
    assert key is not None
    assert planner._proofs.get((key.key, (), False)) is not None


def test_what_is_kept_is_bounded_and_what_is_used_stays() -> None:
    kept: Kept[str] = Kept(6)
    kept.put("used", "value")
    for number in range(100):
        kept.put(number, "other")
        assert kept.get("used") == "value"
        assert len(kept) <= 6
    assert kept.get(99) == "other"
    assert kept.get(0) is None


def test_nulls_and_constants_bind_nothing(planner: Planner) -> None:
    assert outcome(planner, select(Account).where(Account.id == null())) == ("scatter", None)
    assert outcome(planner, select(Account).where(false(), Account.id.is_(None))) == ("scatter", None)
