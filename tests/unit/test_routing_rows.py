"""The planner on rows that are written, and routes under topologies: who is given what."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any, cast

import pytest
from sqlalchemy import (
    BigInteger,
    Column,
    Float,
    Integer,
    MetaData,
    String,
    Table,
    UniqueConstraint,
    Uuid,
    bindparam,
    delete,
    exists,
    func,
    insert,
    literal,
    select,
    tuple_,
    update,
)
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg
from sqlalchemy.orm import DeclarativeBase, Mapped, aliased, make_transient_to_detached, mapped_column

from shardkit.core.errors import DeclarationError, KeyTypeError, UnroutableQuery
from shardkit.core.keyrange import ArcSet, slot_arc
from shardkit.core.ring import position
from shardkit.core.topology import Topology
from shardkit.orm.declare import sharded
from shardkit.orm.keys import fill_default_key, instance_position
from shardkit.orm.planning.gather import Interleaved, Rows
from shardkit.orm.planning.plan import OneKeyPlan, Route
from shardkit.orm.planning.prepared import Prepared
from shardkit.orm.planning.routing import Planner
from shardkit.orm.planning.totals import Totals
from tests.routed import Account, Mark, Note, thirds, with_transit

dialect: Any = PGDialect_psycopg()  # type: ignore[no-untyped-call]

TOPOLOGY = thirds()
ACCOUNT, NOTE = Account.metadata.tables["Account"], Account.metadata.tables["note"]
KEYS = range(12)
OWNER = {key: TOPOLOGY.ring.owner(key) for key in range(100)}
HERE = [key for key in range(100) if OWNER[key] == 0][:3]
"""Three keys of one shard."""


class Base(DeclarativeBase):
    pass


numbers = iter(range(1000, 2000))


@sharded(by="owner")
class Defaulted(Base):
    __tablename__ = "defaulted"
    owner: Mapped[int] = mapped_column(
        "o", BigInteger, primary_key=True, autoincrement=False, default=lambda: next(numbers)
    )
    n: Mapped[int | None]


@sharded(by="k")
class Contextual(Base):
    __tablename__ = "contextual"
    k: Mapped[int] = mapped_column(
        primary_key=True, autoincrement=False, default=lambda context: context.get_current_parameters()["n"]
    )
    n: Mapped[int | None]


@pytest.fixture
def planner() -> Planner:
    return Planner(dialect)


def given(route: Route, shard: int) -> Any:
    """The parameters that a shard is given."""
    return route.shards[shard].parameters


def route(planner: Planner, statement: Any, parameters: Any = None, topology: Topology = TOPOLOGY) -> Route:
    return planner.plan(statement, parameters).route(topology)


def refusal(planner: Planner, statement: Any, parameters: Any = None) -> Any:
    with pytest.raises(UnroutableQuery) as caught:
        planner.plan(statement, parameters)
    return caught.value.fields["reason"]


def compiled(statement: Any) -> Any:
    return statement.compiled if isinstance(statement, Prepared) else statement.compile(dialect=dialect)


def sql(statement: Any) -> str:
    return " ".join(str(compiled(statement)).split())


# --- INSERT --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statement", "parameters"),
    [
        (insert(ACCOUNT).values(id=5, name="x"), None),
        (insert(ACCOUNT).values({"id": 5, "name": "x"}), None),
        (insert(ACCOUNT).values({ACCOUNT.c.id: literal(5), ACCOUNT.c.name: func.lower("X")}), None),
        (insert(ACCOUNT).values(name="x"), {"id": 5}),
        (insert(ACCOUNT), {"id": 5, "name": "x"}),
        (insert(ACCOUNT), [{"id": 5, "name": "x"}]),
        (insert(ACCOUNT).values(id=bindparam("key")), {"key": 5, "name": "x"}),
        (insert(ACCOUNT).values([{"id": 5, "name": "x"}]), None),
        (insert(ACCOUNT).values([(5, "x", 1), (5, "y", 2)]), None),
        (insert(Account).values(id=5, name="x").returning(Account), None),
        (insert(Note).values(owner=5, number=1), None),
        (insert(Note).values([{"owner": 5, "number": 1}, {"owner": 5, "number": 2}]), None),
        (
            insert(ACCOUNT).values(
                id=5, name=select(func.max(ACCOUNT.c.name)).where(ACCOUNT.c.id == 5).scalar_subquery()
            ),
            None,
        ),
    ],
)
def test_a_row_goes_to_the_owner_of_its_key(planner: Planner, statement: Any, parameters: Any) -> None:
    for _ in range(2):
        plan = planner.plan(statement, parameters)
        assert isinstance(plan, OneKeyPlan)
        assert plan.position == position(5)
        (part,) = plan.route(TOPOLOGY).shards.values()
        assert part == (statement, parameters)


def test_each_call_has_its_own_key(planner: Planner) -> None:
    for key in KEYS:
        assert set(route(planner, insert(ACCOUNT).values(id=key, name="x")).shards) == {OWNER[key]}
        assert set(route(planner, insert(ACCOUNT), {"id": key, "name": "x"}).shards) == {OWNER[key]}


def grouped(rows: list[dict[str, Any]], name: str) -> dict[int, list[dict[str, Any]]]:
    found: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(OWNER[row[name]], []).append(row)
    return found


def test_lists_of_rows_are_split_in_order(planner: Planner) -> None:
    rows = [{"id": key, "name": f"{key}"} for key in reversed(KEYS)]
    found = route(planner, insert(ACCOUNT), rows)
    assert {shard: part.parameters for shard, part in found.shards.items()} == grouped(rows, "id")
    assert found.merge == Rows()
    orm = route(planner, insert(Account), rows)
    assert {shard: part.parameters for shard, part in orm.shards.items()} == grouped(rows, "id")


def test_rows_of_one_shard_stay_one_list(planner: Planner) -> None:
    rows = [{"id": key, "name": "x"} for key in HERE]
    found = route(planner, insert(ACCOUNT), rows)
    assert found.merge is None
    assert found.shards[0].parameters == rows


def test_lists_of_values_are_split_in_order(planner: Planner) -> None:
    rows = [{"owner": key, "number": key, "body": "x"} for key in KEYS]
    statement = insert(Note).values(rows).returning(Note.owner)
    found = route(planner, statement)
    for shard, part in found.shards.items():
        own = grouped(rows, "owner")[shard]
        assert sql(part.statement).count("(%(user_m") == len(own)
        sent = compiled(part.statement).params
        assert [sent[f"user_m{number}"] for number in range(len(own))] == [row["owner"] for row in own]
    assert found.merge == Interleaved(
        {shard: tuple(key for key in KEYS if OWNER[key] == shard) for shard in found.shards}
    )
    assert len(statement._multi_values[0]) == len(KEYS)  # the application's own statement is as it was


def test_values_of_keys_on_one_shard_stay_one_statement(planner: Planner) -> None:
    statement = insert(ACCOUNT).values([{"id": key, "name": "x"} for key in HERE])
    assert route(planner, statement).shards[0] == (statement, None)


def test_returned_rows_come_in_the_order_of_the_input(planner: Planner) -> None:
    rows = [{"id": key, "name": "x"} for key in KEYS]
    found = route(planner, insert(Account).returning(Account), rows)
    assert isinstance(found.merge, Interleaved)
    assert sorted(number for own in found.merge.order.values() for number in own) == list(KEYS)
    made = upsert(Account).on_conflict_do_nothing(index_elements=["id"])
    assert route(planner, made.returning(Account.id), rows).merge == Rows()
    ordered = made.returning(Account.id, sort_by_parameter_order=True)
    assert refusal(planner, ordered, rows) == "returning-order"


@pytest.mark.parametrize("value", [None, "5", 5.0, True, 2**63, uuid.UUID(int=5), b"5"])
def test_a_row_whose_key_is_no_key_is_an_error(planner: Planner, value: Any) -> None:
    for statement, parameters in (
        (insert(ACCOUNT).values(id=value, name="x"), None),
        (insert(ACCOUNT), {"id": value, "name": "x"}),
        (insert(ACCOUNT), [{"id": 5, "name": "x"}, {"id": value, "name": "x"}]),
        (insert(ACCOUNT).values([{"id": 5, "name": "x"}, {"id": value, "name": "x"}]), None),
        (insert(Account), [{"id": value, "name": "x"}]),
    ):
        with pytest.raises(KeyTypeError):
            planner.plan(statement, parameters)


def test_a_text_key_that_would_be_stored_shorter_is_an_error(planner: Planner) -> None:
    table = Table(
        "short",
        MetaData(),
        Column("k", String(5), primary_key=True),
        info={"shardkit": {"sharded_by": "k"}},
    )
    for statement in (insert(table).values(k="äöü😀e"), select(table).where(table.c.k == "abcde ")):
        assert len(route(planner, statement).shards) == 1
    for wrong in (insert(table).values(k="abcde "), insert(table).values([{"k": "a"}, {"k": "abcdef"}])):
        with pytest.raises(KeyTypeError, match="cannot be the shard key") as caught:
            planner.plan(wrong)
        assert "of 5 characters at most" in caught.value.hint


def test_a_key_bound_as_another_type_is_refused(planner: Planner) -> None:
    for value in (literal(5, Float()), literal("5", String()), literal(2**53 + 1, Float())):
        assert refusal(planner, insert(ACCOUNT).values(id=value, name="x")) == "key-expression"


def test_rows_that_name_different_columns_are_not_split(planner: Planner) -> None:
    rows = [{"id": key, "name": "x"} for key in KEYS]
    assert refusal(planner, insert(ACCOUNT), [*rows, {"id": 1, "name": "x", "n": 1}]) == "row-names"
    assert len(route(planner, insert(Account), [*rows, {"id": 1, "name": "x", "n": 1}]).shards) == 3
    statement = update(ACCOUNT).where(ACCOUNT.c.id == bindparam("key")).values(n=bindparam("new"))
    assert refusal(planner, statement, [{"key": 1, "new": 1}, {"key": 2}]) == "row-names"


@pytest.mark.filterwarnings("ignore:Column 'Account.id' is marked as a member of the primary key")
def test_a_row_without_a_key_is_an_error(planner: Planner) -> None:
    for statement, parameters in (
        (insert(ACCOUNT).values(name="x"), None),
        (insert(ACCOUNT), {"name": "x"}),
        (insert(Account), [{"name": "x"}]),
        (insert(ACCOUNT).values([{"name": "x"}, {"name": "y"}]), None),
    ):
        with pytest.raises(KeyTypeError, match="no value for the shard key"):
            planner.plan(statement, parameters)


def test_a_python_default_is_evaluated_before_the_shard_is_chosen(planner: Planner) -> None:
    table = Base.metadata.tables["defaulted"]
    for statement, name in ((insert(table), "o"), (insert(Defaulted), "owner")):
        found = route(planner, statement, [{"n": number} for number in range(8)])
        for shard in found.shards:
            assert all(TOPOLOGY.ring.owner(row[name]) == shard for row in given(found, shard))
    found = route(planner, insert(table).values(n=1))
    (shard,) = found.shards
    assert TOPOLOGY.ring.owner(given(found, shard)["o"]) == shard
    assert planner.plan(insert(Defaulted), [{"owner": None, "n": 1}])._positions  # type: ignore[attr-defined]


def test_a_default_that_needs_its_statement_is_refused(planner: Planner) -> None:
    with pytest.raises(UnroutableQuery, match="looks at the context"):
        planner.plan(insert(Contextual), [{"n": 1}])


def test_inserts_that_only_one_database_could_do_are_refused(planner: Planner) -> None:
    unbound = select(func.max(ACCOUNT.c.name)).scalar_subquery()
    elsewhere = select(func.max(ACCOUNT.c.name)).where(ACCOUNT.c.id == 6).scalar_subquery()
    rows = [{"id": key} for key in KEYS]
    cases = [
        (
            insert(ACCOUNT).from_select(["id", "name"], select(ACCOUNT.c.id + 1, ACCOUNT.c.name)),
            None,
            "insert-from-select",
        ),
        (insert(ACCOUNT).values(id=func.abs(5), name="x"), None, "key-expression"),
        (insert(ACCOUNT).values(id=literal(4) + 1, name="x"), None, "key-expression"),
        (
            insert(ACCOUNT).values([{"id": func.abs(5), "name": "x"}, {"id": 5, "name": "y"}]),
            None,
            "key-expression",
        ),
        (insert(ACCOUNT).values(id=5, name=unbound), None, "subquery"),
        (insert(ACCOUNT).values(id=5, name=elsewhere), None, "subquery"),
        (insert(ACCOUNT).values(name=elsewhere), rows, "subquery"),
        (insert(ACCOUNT).values(name=func.nextval("s")), rows, "function"),
        (insert(Account).values(name="x"), rows, "bulk-values"),
        (
            select(Account).from_statement(insert(Account).values(id=5, name="x").returning(Account)),
            None,
            "from-statement",
        ),
    ]
    for statement, parameters, reason in cases:
        assert refusal(planner, statement, parameters) == reason
    assert len(route(planner, insert(ACCOUNT).values(name=func.now()), rows).shards) == 3


# --- ON CONFLICT ---------------------------------------------------------------------------------------------------

UNIQUE = Table(
    "unique_one",
    MetaData(),
    Column("k", BigInteger, primary_key=True, autoincrement=False),
    Column("id", Uuid, primary_key=True),
    Column("name", String),
    UniqueConstraint("k", "name", name="by_key"),
    UniqueConstraint("name", name="by_name"),
    info={"shardkit": {"sharded_by": "k"}},
)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"index_elements": ["id"], "set_": {"name": "y"}}, None),
        ({"index_elements": [ACCOUNT.c.id], "set_": {"name": "y"}}, None),
        ({"constraint": "Account_pkey", "set_": {"name": "y"}}, None),
        ({"constraint": ACCOUNT.primary_key, "set_": {"name": "y"}}, None),
        ({"index_elements": ["name"], "set_": {"name": "y"}}, "conflict-target"),
        ({"index_elements": [func.lower(ACCOUNT.c.name)], "set_": {"name": "y"}}, "conflict-target"),
        ({"constraint": "unknown", "set_": {"name": "y"}}, "conflict-target"),
        ({"index_elements": ["id"], "set_": {"id": 6}}, "changed-key"),
    ],
)
def test_an_upsert_names_the_shard_key(
    planner: Planner, options: Mapping[str, Any], reason: str | None
) -> None:
    statement = upsert(ACCOUNT).values(id=5, name="x").on_conflict_do_update(**options)
    if reason is None:
        assert set(route(planner, statement).shards) == {OWNER[5]}
    else:
        assert refusal(planner, statement) == reason


def test_do_nothing_without_a_target_needs_every_unique_constraint_to_hold_the_key(planner: Planner) -> None:
    assert len(route(planner, upsert(ACCOUNT).values(id=5, name="x").on_conflict_do_nothing()).shards) == 1
    row = {"k": 5, "id": uuid.UUID(int=1), "name": "x"}
    assert refusal(planner, upsert(UNIQUE).values(row).on_conflict_do_nothing()) == "conflict-target"
    for target, fine in (("by_key", True), ("by_name", False), ("unique_one_pkey", True)):
        statement = upsert(UNIQUE).values(row).on_conflict_do_nothing(constraint=target)
        if fine:
            assert len(route(planner, statement).shards) == 1
        else:
            assert refusal(planner, statement) == "conflict-target"


def test_a_bulk_upsert_changes_no_key_either(planner: Planner) -> None:
    made = upsert(Note).on_conflict_do_update(index_elements=["user", "number"], set_={"user": 7})
    assert refusal(planner, made, [{"owner": 5, "number": 1}]) == "changed-key"


# --- UPDATE row by row ---------------------------------------------------------------------------------------------


def test_a_bulk_update_goes_by_the_primary_key(planner: Planner) -> None:
    rows = [{"id": key, "name": "x"} for key in KEYS]
    found = route(planner, update(Account), rows)
    assert {shard: part.parameters for shard, part in found.shards.items()} == grouped(rows, "id")
    assert refusal(planner, update(Mark), [{"id": uuid.UUID(int=1), "owner": 5, "n": 1}]) == "bulk-key"
    assert refusal(planner, update(Account).where(Account.n == 1), rows) == "bulk-values"
    with pytest.raises(KeyTypeError):
        planner.plan(update(Account), [{"name": "x"}])


def test_each_set_of_parameters_goes_to_its_own_shard(planner: Planner) -> None:
    statement = update(ACCOUNT).where(ACCOUNT.c.id == bindparam("key")).values(n=bindparam("new"))
    rows = [{"key": key, "new": 1} for key in KEYS]
    found = route(planner, statement, rows)
    assert {shard: part.parameters for shard, part in found.shards.items()} == grouped(rows, "key")
    by_name = update(ACCOUNT).where(ACCOUNT.c.name == bindparam("key")).values(n=bindparam("new"))
    assert refusal(planner, by_name, rows) == "many"
    assert refusal(planner, statement, [*rows, {"key": "5", "new": 1}]) == "many"
    nulls = route(
        planner, delete(ACCOUNT).where(ACCOUNT.c.id == bindparam("key")), [{"key": 1}, {"key": None}]
    )
    assert OWNER[1] in nulls.shards


# --- routes --------------------------------------------------------------------------------------------------------


def test_one_plan_is_routed_under_each_topology(planner: Planner) -> None:
    plan = planner.plan(select(Account).where(Account.id == 5))
    assert set(plan.route(TOPOLOGY).shards) == {OWNER[5]}
    at = position(5)
    arcs = ArcSet([slot_arc((at + 2**63) >> 48)])
    target = (OWNER[5] + 1) % 3
    moved = TOPOLOGY.marked(7, target, arcs).cut_over(8, OWNER[5], target, arcs)
    assert set(plan.route(moved).shards) == {target}


def test_a_statement_for_any_shard_takes_one_that_is_open(planner: Planner) -> None:
    plan = planner.plan(select(literal(1)))
    for shard in range(3):
        assert set(plan.route(TOPOLOGY, prefer={shard}).shards) == {shard}
    assert len(plan.route(TOPOLOGY).shards) == 1
    assert len(plan.route(TOPOLOGY, prefer={17}).shards) == 1


def test_a_scatter_goes_to_every_shard_that_owns_something(planner: Planner) -> None:
    joined = TOPOLOGY.joined(9, shard_id=3, name="s3", url="postgresql://s3", weight=1)
    found = route(planner, select(func.count()).select_from(Account), None, joined)
    assert set(found.shards) == {0, 1, 2}
    assert found.merge == Totals(("count",))
    alone = Topology.first(1, [(0, "s0", "postgresql://s0", 1)], [2**63 - 1], [0])
    assert route(planner, select(Account), None, alone).merge is None


@pytest.mark.parametrize(
    "statement",
    [
        select(Account, Note).where(Account.id == HERE[0], Note.owner == HERE[1]).with_for_update(),
        select(Account).where(Account.id.in_(HERE)).limit(1).with_for_update(),
        delete(Account).where(Account.id == HERE[0], Note.owner == HERE[1]),
        update(Account).values(id=5),
    ],
)
def test_a_refusal_does_not_depend_on_where_keys_live(planner: Planner, statement: Any) -> None:
    with pytest.raises(UnroutableQuery):
        planner.plan(statement)


def lists(found: Route) -> dict[int, Any]:
    """The bound list of each part of a route."""
    sent = {}
    for shard, part in found.shards.items():
        held = {} if isinstance(part.statement, Prepared) else compiled(part.statement).params
        bound = {**held, **cast(Mapping[str, Any], part.parameters or {})}
        sent[shard] = next(value for value in bound.values() if isinstance(value, list))
    return sent


def test_a_list_of_keys_is_split(planner: Planner) -> None:
    split: dict[int, list[int]] = {}
    for key in KEYS:
        split.setdefault(OWNER[key], []).append(key)
    for number in range(2):
        statement = select(Account).where(Account.n > number, Account.id.in_(list(KEYS)))
        assert lists(route(planner, statement)) == split
        named = select(Account).where(Account.id.in_(bindparam("keys", expanding=True)))
        assert lists(route(planner, named, {"keys": list(KEYS)})) == split
        assert lists(route(planner, named.params(keys=list(KEYS)))) == split
    assert lists(route(planner, delete(Account).where(Account.id.in_(list(KEYS))))) == split
    pairs = select(Note).where(tuple_(Note.owner, Note.number).in_([(key, 1) for key in KEYS]))
    assert lists(route(planner, pairs)) == {shard: [(key, 1) for key in own] for shard, own in split.items()}
    assert lists(
        route(planner, select(Account).where(Account.id.in_(list(KEYS)), Account.id.in_([0, 1])))
    ) == {OWNER[key]: [key] for key in (0, 1)}


def test_a_list_of_many_keys_is_split(planner: Planner) -> None:
    found = lists(route(planner, select(Account).where(Account.id.in_(list(range(10_000))))))
    assert sorted(key for own in found.values() for key in own) == list(range(10_000))


def test_a_split_statement_keeps_its_shape_and_the_given_one_its_list(planner: Planner) -> None:
    whole = delete(Account).where(Account.id.in_(list(KEYS)))
    before = whole._generate_cache_key()
    found = route(planner, whole, None, with_transit(TOPOLOGY))
    assert before is not None
    for part in found.shards.values():
        key = part.statement._generate_cache_key()  # type: ignore[attr-defined]
        assert key.key == before.key
    assert before.bindparams[0].value == list(KEYS)


def test_rows_in_transit_are_kept_out_of_what_is_not_bound(planner: Planner) -> None:
    topology = with_transit(TOPOLOGY)
    account = aliased(Account)
    twice: Any = bindparam("keys", list(KEYS), expanding=True)
    for statement, column in (
        (select(Account), '"Account".id'),
        (select(Account), '"Account".id'),
        (select(ACCOUNT.c.name), '"Account".id'),
        (select(account), '"Account_1".id'),
        (select(account, Note).join(account.notes), 'note."user"'),
        (select(account, Note).outerjoin(account.notes), '"Account_1".id'),
        (select(func.count()).select_from(Account), '"Account".id'),
        (select(func.avg(Account.n)).group_by(Account.name), '"Account".id'),
        (select(Account).where(Account.id.in_(twice), Account.n.not_in(twice)), '"Account".id'),
        (select(Note).where(Note.n == select(func.max(Account.n)).scalar_subquery()), 'note."user"'),
    ):
        predicate = f"width_bucket(pg_catalog.hashint8extended({column}, 0), %(shardkit_bounds)s"
        for _ in range(2):
            parts = route(planner, statement, None, topology).shards
            assert "hashint8extended" not in sql(parts[0].statement)
            for shard in (1, 2):
                assert predicate in sql(parts[shard].statement)
                given = cast(Mapping[str, Any], parts[shard].parameters)
                assert given["shardkit_bounds"] == topology.owned(shard).bounds()
                assert given["shardkit_odd"] == 1
        rest = route(planner, statement).shards.values()
        assert all("hashint8extended" not in sql(part.statement) for part in rest)


def test_writes_leave_rows_in_transit_alone(planner: Planner) -> None:
    topology = with_transit(TOPOLOGY)
    for statement, column in (
        (update(Account).values(n=1), '"Account".id'),
        (delete(NOTE).where(NOTE.c.user == ACCOUNT.c.id), 'note."user"'),
        (update(Account).where(exists().where(Note.owner == Account.id)).values(n=1), '"Account".id'),
    ):
        for _ in range(2):
            parts = {
                shard: sql(part.statement)
                for shard, part in route(planner, statement, None, topology).shards.items()
            }
            assert "hashint8extended" not in parts[0]
            assert f"pg_catalog.hashint8extended({column}, 0) BETWEEN" in parts[1]
            assert f"pg_catalog.hashint8extended({column}, 0) BETWEEN" in parts[2]
        rest = route(planner, statement).shards.values()
        assert all("hashint8extended" not in sql(part.statement) for part in rest)


def test_many_arcs_are_one_lookup(planner: Planner) -> None:
    topology = with_transit(TOPOLOGY)
    odd = ArcSet([slot_arc(43690 + 40 * number, 20) for number in range(500)])
    topology = topology.marked(20, 1, odd).cut_over(21, 2, 1, odd)
    part = route(planner, delete(Account), None, topology).shards[2]
    assert "pg_catalog.width_bucket(pg_catalog.hashint8extended(" in sql(part.statement)
    assert "::BIGINT[]" in sql(part.statement)


def test_a_statement_of_one_key_needs_no_predicate(planner: Planner) -> None:
    topology = with_transit(TOPOLOGY)
    for key in KEYS:
        statement = select(Account).where(Account.id == key)
        ((shard, part),) = route(planner, statement, None, topology).shards.items()
        assert (shard, part.statement) == (OWNER[key], statement)


def test_aliases_of_each_statement_are_its_own(planner: Planner) -> None:
    topology = with_transit(TOPOLOGY)
    for _ in range(3):
        one, other = aliased(Account), aliased(Account)
        statement = select(one, other).join(other, other.id == one.id).where(one.n > 1)
        part = route(planner, statement, None, topology).shards[1]
        assert sql(part.statement).count("JOIN") == 1
        assert 'FROM "Account" AS "Account_1" JOIN' in sql(part.statement)
    assert len(planner._proofs) == 1


def test_identities_are_where_primary_keys_are(planner: Planner) -> None:
    def identities(statement: Any) -> Any:
        merge: Any = route(planner, statement).merge
        return merge.arrangement.identities

    assert identities(select(Account)) == ((0,),)
    assert identities(select(Note.n, Note.number, Note.owner)) == ((2, 1),)
    assert identities(select(Note.n, Note.number)) == ()
    assert identities(select(Account, Note).join(Account.notes)) == ((0,), (3, 4))


# --- instances -----------------------------------------------------------------------------------------------------


def test_an_instance_has_the_position_of_its_key() -> None:
    assert instance_position(Account(id=5)) == position(5)
    assert instance_position(Note(owner=5)) == position(5)
    for wrong in (Account(), Account(id="5"), Account(id=True)):
        with pytest.raises(KeyTypeError):
            instance_position(wrong)


def test_a_persistent_instance_keeps_its_key() -> None:
    mark = Mark(id=uuid.UUID(int=1))
    make_transient_to_detached(mark)
    mark.owner = 5  # the row may have another
    with pytest.raises(UnroutableQuery, match="would be changed"):
        instance_position(mark)
    account = Account(id=5, name="x")
    make_transient_to_detached(account)
    assert instance_position(account) == position(5)
    account.id = 6
    with pytest.raises(UnroutableQuery, match="would be changed"):
        instance_position(account)
    account.id = 5
    assert instance_position(account) == position(5)


def test_an_instance_is_given_its_default_key() -> None:
    instance = Defaulted()
    fill_default_key(instance)
    given = instance.owner
    assert given >= 1000
    fill_default_key(instance)
    assert instance.owner == given
    plain = Account()
    fill_default_key(plain)
    assert plain.id is None


def test_a_mapped_class_without_a_declaration_is_an_error() -> None:
    class Plain(Base):
        __tablename__ = "plain"
        id: Mapped[int] = mapped_column(primary_key=True)

    with pytest.raises(DeclarationError, match="not declared"):
        instance_position(Plain(id=1))


def test_integers_of_all_widths_have_one_position() -> None:
    table = Table(
        "small",
        MetaData(),
        Column("k", Integer, primary_key=True, autoincrement=False),
        info={"shardkit": {"sharded_by": "k"}},
    )
    assert set(route(Planner(dialect), select(table).where(table.c.k == 5)).shards) == {OWNER[5]}
